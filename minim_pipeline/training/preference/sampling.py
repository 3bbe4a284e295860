"""The images that a step learns from: drawn ones, and what the filter head says of them; real ones of `--replay`."""

import itertools
from dataclasses import dataclass, field

import torch

from ... import MODALITIES, MinimPipeline, resolve_modality
from ...evaluation.sampling import batches, draw_batch
from ..captions import load_captions, phrase
from ..latents import Latents
from ..rows import check_processes, read_splits
from ..run import Run
from .config import PreferenceConfig
from .rewards import are_copies, finding_reward, rate, spread


@dataclass
class Samples:
    """N finished images, those of a prompt one after the other."""

    latents: torch.Tensor  # fp32 [N, C, h, w]
    prompt: torch.Tensor  # int64 [N], of the list of prompts
    counts: torch.Tensor = field(init=False)  # bool [N], whose reward does: all, until `score` has looked for copies

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


class Replay:
    """Real images, so that a U-Net does not forget what they look like.

    Latents of the train images of `--replay`, each in some versions, with captions in some phrasings.

    Raises:
        ValueError: the CSV has no train rows of the pipeline's modalities.
    """

    def __init__(self, config: PreferenceConfig, run: Run, pipe: MinimPipeline):
        known = pipe.config.modalities or list(MODALITIES)
        data = config.replay_data(pipe.unet.config.sample_size * pipe.vae_scale_factor)
        rows, _ = read_splits(data)
        rows = [row for row in rows if resolve_modality(row["modality"]).id in known]
        if not rows:
            raise ValueError(f"{config.replay} has no train images of {', '.join(known)}.")
        check_processes(rows, f"--replay {config.replay}")
        self.text_encoder = pipe.text_encoder
        self.variants = config.latent_variants
        captions = load_captions(config.captions)
        self.ids = phrase(rows, captions, pipe.tokenizer, config.caption_variants, config.seed).to(run.device)
        self.latents = Latents.encode(run, pipe.vae, data, rows, "replay", config.latent_variants)

    @torch.no_grad()
    def draw(self, count: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents [count, C, h, w], scaled as the U-Net takes them, and hidden states [count, L, D]."""

        def randint(high: int) -> torch.Tensor:
            return torch.randint(high, (count,), device=g.device, generator=g)

        index = randint(len(self.ids))
        latents = self.latents.draw(index, randint(self.variants), g)
        text = self.ids[index, randint(self.ids.shape[1])]
        return latents, self.text_encoder(text).last_hidden_state
