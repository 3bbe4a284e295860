"""The images that a step learns from, and what the filter head says of them."""

import itertools
from dataclasses import dataclass, field

import torch

from ... import MinimPipeline
from ...evaluation.sampling import batches, draw_batch
from .config import PreferenceConfig
from .rewards import are_copies, finding_reward, rate, spread


@dataclass
class Samples:
    """N finished images, those of a prompt one after the other.

    Args:
        latents: fp32 [N, C, h, w].
        prompt: int64 [N], of the list of prompts.
        counts: bool [N], whether the reward of each counts: all, until `score` has looked for copies.
    """

    latents: torch.Tensor
    prompt: torch.Tensor
    counts: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.counts = torch.ones_like(self.prompt, dtype=torch.bool)


@torch.no_grad()
def sample(pipe: MinimPipeline, prompts: list[dict], config: PreferenceConfig, generator: torch.Generator) -> Samples:
    """Draws `images_per_prompt` images for each of `prompts_per_step` prompts, at the pipeline's own settings.

    Prompts are chosen so that every finding comes up equally often.
    """
    queues: dict[tuple[str, str], list[int]] = {}
    for i in torch.randperm(len(prompts), device=generator.device, generator=generator).tolist():
        queues.setdefault((prompts[i]["modality"], prompts[i].get("finding") or prompts[i]["Text"]), []).append(i)
    # The findings in turn, and of each its prompts in turn, both in an order of chance.
    turns = itertools.cycle([itertools.cycle(queue) for queue in queues.values()])
    order = [next(queue) for queue in itertools.islice(turns, config.prompts_per_step)]
    chosen = [i for i in order for _ in range(config.images_per_prompt)]
    seeds = torch.randint(2**62, (len(chosen),), device=generator.device, generator=generator).tolist()
    texts, modalities = ([prompts[i][column] for i in chosen] for column in ("Text", "modality"))
    steps = {"num_inference_steps": config.num_inference_steps}
    latents = [
        draw_batch(pipe, texts[batch], modalities[batch], seeds[batch], config.bf16, **steps).float()
        for batch in batches(len(chosen), config.sampling_batch_size)
    ]
    return Samples(torch.cat(latents), torch.tensor(chosen, device=pipe.device))


def score(pipe: MinimPipeline, drawn: Samples, prompts: list[dict]) -> dict[str, torch.Tensor]:
    """Rates the finished images: `reward` and `spread` [N], to be watched. Copies of training images do not count."""
    chosen = drawn.prompt.tolist()
    modalities = [prompts[i]["modality"] for i in chosen]
    rated = rate(pipe, drawn.latents, [prompts[i]["Text"] for i in chosen], modalities)
    drawn.counts = ~are_copies(pipe, rated, modalities)
    return {"reward": finding_reward(rated), "spread": spread(drawn.latents, drawn.prompt)}
