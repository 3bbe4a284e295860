"""What a sampler holds in hand on its way: the head learns from it, since it will be asked there."""

from dataclasses import dataclass

import torch
from torch import nn

from ... import MinimPipeline
from ...evaluation.sampling import batches, bytes_of, decode_latents, draw_batch, joined
from ...minim_filter.estimate import estimate_clean, noise_angles
from .rubric import Sampler


@dataclass
class Trajectories:
    """N images on their way, each at K steps; half precision but for the angles, on the CPU.

    Args:
        noisy, clean: [N, K, C, h, w], what the U-Net was given, and the clean latents that its answer stands for.
        angle: [N, K], arctan(sigma / alpha).
        final: [N, C, h, w], the finished latents.
        images: uint8 [N, 3, H, W].
    """

    noisy: torch.Tensor
    clean: torch.Tensor
    angle: torch.Tensor
    final: torch.Tensor
    images: torch.Tensor


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
    observed = []

    def note(unet: nn.Module, arguments: tuple, answer: tuple) -> None:
        noisy, t = arguments[:2]
        angle = noise_angles(pipe.scheduler.alphas_cumprod, t.cpu().reshape(1)).to(noisy.device).expand(len(noisy))
        clean = estimate_clean(noisy, answer[0], angle, pipe.scheduler.config.prediction_type)
        # With guidance the second half is the prompt's.
        observed.append((noisy[-count:].half(), clean[-count:].half(), angle[-count:].float()))

    generator, parts = torch.Generator().manual_seed(seeds[0] if seeds else 0), []
    hook = pipe.unet.register_forward_hook(note)
    try:
        for batch in batches(len(rows), batch_size, f"{sampler.num_inference_steps} steps"):
            texts, modalities = ([row[column] for row in rows[batch]] for column in ("Text", "modality"))
            count = len(texts)
            observed.clear()
            settings = {name: getattr(sampler, name) for name in ("num_inference_steps", "guidance_scale")}
            final = draw_batch(pipe, texts, modalities, seeds[batch], bf16, **settings)
            images = bytes_of(decode_latents(pipe, final, modalities, bf16))
            noisy, clean, angle = (torch.stack(steps, 1) for steps in zip(*observed, strict=True))  # [n, steps, ...]
            first = torch.rand(count, 1, generator=generator)
            steps = ((torch.arange(keep)[None] + first) / keep * len(observed)).long()  # [n, K]
            where = torch.arange(count)[:, None].to(noisy.device), steps.to(noisy.device)
            parts.append(
                Trajectories(noisy[where].cpu(), clean[where].cpu(), angle[where].cpu(), final.half().cpu(), images)
            )
    finally:
        hook.remove()
    return joined(parts)
