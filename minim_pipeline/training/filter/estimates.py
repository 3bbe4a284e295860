"""What a sampler has in hand on its way, or would have at any noise level: the filter head is asked there."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ... import MinimPipeline
from ...evaluation.sampling import batches, bytes_of, decode_latents, draw_batch, joined
from ...minim_filter.estimate import estimate_clean, noise_angles
from ...minim_filter.funnel import Funnel, guidance_strength
from ..denoising import noise_scheduler
from .rubric import Sampler


class NoisedEstimates:
    """Noisy latents of any level, and what the pipeline's U-Net, which is frozen, estimates of the clean ones."""

    def __init__(self, pipe: MinimPipeline, bf16: bool):
        self.unet, self.text_encoder, self.tokenizer, self.bf16 = pipe.unet, pipe.text_encoder, pipe.tokenizer, bf16
        self.prediction_type = pipe.scheduler.config.prediction_type
        self.alphas_cumprod = noise_scheduler(pipe.scheduler.config, pipe.device).alphas_cumprod

    @torch.no_grad()
    def __call__(
        self, latents: torch.Tensor, timesteps: torch.Tensor, ids: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Noisy latents and estimates of the clean ones, both [N, C, h, w], and angles [N].

        Of latents and noise [N, C, h, w], timesteps int64 [N], and the token ids [N, L] of captions.
        """
        angle = noise_angles(self.alphas_cumprod, timesteps)
        noisy = angle.cos()[:, None, None, None] * latents + angle.sin()[:, None, None, None] * noise
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=self.bf16):
            text = self.text_encoder(ids).last_hidden_state
            prediction = self.unet(noisy, timesteps, text, return_dict=False)[0]
        return noisy, estimate_clean(noisy, prediction, angle, self.prediction_type), angle

    def of_half(
        self, latents: torch.Tensor, ids: torch.Tensor, finished: int, g: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As a call, of latents whose first `finished` stay as they are; noised are the others, to any level."""
        levels, count, device = len(self.alphas_cumprod), len(latents) - finished, latents.device
        timesteps = torch.randint(levels, (count,), device=device, generator=g)
        noise = torch.randn(latents[finished:].shape, device=device, generator=g)
        noisy, clean, angle = self(latents[finished:], timesteps, ids[finished:], noise)
        whole = latents[:finished]
        return torch.cat([whole, noisy]), torch.cat([whole, clean]), torch.cat([angle.new_zeros(finished), angle])


@contextmanager
def watch_steps(pipe: MinimPipeline, count: int) -> Iterator[list[tuple[torch.Tensor, ...]]]:
    """A list that fills while `count` images are drawn, with four tensors of each step.

    What the U-Net was given and the clean latents that its answer for the prompt stands for, [count, C, h, w];
    arctan(sigma / alpha), [count]; and `guidance_strength`, [count], 0 where a step is not guided.
    """
    steps: list[tuple[torch.Tensor, ...]] = []

    def note(unet: nn.Module, arguments: tuple, answer: tuple) -> None:
        # With guidance the first half is the negative side's; without it both are the same.
        noisy, prediction, negative = arguments[0][-count:], answer[0][-count:], answer[0][:count]
        angle = Funnel.angle(pipe.scheduler, arguments[1]).to(noisy.device).expand(count)
        clean = estimate_clean(noisy, prediction, angle, pipe.scheduler.config.prediction_type)
        steps.append((noisy, clean, angle, guidance_strength(prediction, negative)))

    hook = pipe.unet.register_forward_hook(note)
    try:
        yield steps
    finally:
        hook.remove()


@dataclass
class Trajectories:
    """N images on their way, each at K steps; half precision but for the angles, on the CPU."""

    noisy: torch.Tensor  # [N, K, C, h, w], what the U-Net was given
    clean: torch.Tensor  # [N, K, C, h, w], the clean latents that its answer stands for
    angle: torch.Tensor  # [N, K], arctan(sigma / alpha)
    final: torch.Tensor  # [N, C, h, w], the finished latents
    images: torch.Tensor  # uint8 [N, 3, H, W]


@torch.no_grad()
def draw_trajectories(
    pipe: MinimPipeline,
    rows: list[dict],
    sampler: Sampler,
    seeds: list[int],
    batch_size: int,
    keep: int,
    bf16: bool = False,
) -> Trajectories:
    """Draws one image for each row's caption, and keeps what the sampler held at `keep` of its steps.

    The steps are spread evenly from a random one on; a sampler of fewer steps repeats some.
    """
    generator, parts = torch.Generator().manual_seed(seeds[0] if seeds else 0), []
    settings = {name: getattr(sampler, name) for name in ("num_inference_steps", "guidance_scale")}
    for batch in batches(
        len(rows), batch_size, f"{sampler.num_inference_steps or pipe.config.num_inference_steps} steps"
    ):
        texts, modalities = ([row[column] for row in rows[batch]] for column in ("Text", "modality"))
        count = len(texts)
        with watch_steps(pipe, count) as observed:
            final = draw_batch(pipe, texts, modalities, seeds[batch], bf16, **settings)
        images = bytes_of(decode_latents(pipe, final, modalities, bf16))
        noisy, clean, angle, _ = (torch.stack(steps, 1) for steps in zip(*observed, strict=True))  # [n, steps, ...]
        first = torch.rand(count, 1, generator=generator)
        steps = ((torch.arange(keep)[None] + first) / keep * len(observed)).long()  # [n, K]
        where = torch.arange(count)[:, None].to(noisy.device), steps.to(noisy.device)
        held = noisy[where].half().cpu(), clean[where].half().cpu(), angle[where].float().cpu()
        parts.append(Trajectories(*held, final.half().cpu(), images))
    return joined(parts)
