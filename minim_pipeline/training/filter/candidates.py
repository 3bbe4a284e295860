"""Candidates drawn to their end, and what the filter said of them at every step: to calibrate it, and to compare it.

A survivor of the funnel is the image that its seed draws alone (tests/minim_filter/test_filter.py), so what any
plan of dropping would give back can be read from ratings of candidates that were all drawn to the end.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from ... import MinimPipeline, resolve_modality
from ...evaluation.sampling import batches, bytes_of, decode_latents, draw_batch, joined
from ...minim_filter import FilterHead
from ...minim_filter.funnel import combine, rank
from .estimates import watch_steps


@dataclass
class Candidates:
    """N candidates, S steps; the last of S + 1 ratings is that of the finished image. On the CPU."""

    quality: torch.Tensor  # [N, S + 1], expected ratings from 1 to 3
    finding: torch.Tensor  # [N, S + 1]
    guidance: torch.Tensor  # [N, S], `guidance_strength` of each step, 0 where it is not guided
    levels: torch.Tensor  # [S + 1], sigma / alpha of each step, 0 at the end
    code: torch.Tensor  # [N, B], of the finished images
    images: torch.Tensor  # uint8 [N, 3, H, W]

    @property
    def score(self) -> torch.Tensor:
        """[N, S + 1]"""
        return combine(self.quality, self.finding)

    @property
    def guidance_sum(self) -> torch.Tensor:
        """[N, S + 1], as the funnel has it when it rates."""
        total = self.guidance.cumsum(1)
        return torch.cat([total, total[:, -1:]], 1)

    def rank(self, head: FilterHead) -> torch.Tensor:
        """By what the funnel chooses, [N, S + 1]."""
        config = head.config
        return rank(self.quality, self.finding, self.guidance_sum, config.enough, config.guidance_weight)


@torch.no_grad()
def draw_candidates(
    pipe: MinimPipeline,
    prompts: Sequence[str],
    modalities: Sequence[str],
    seeds: Sequence[int],
    batch_size: int = 64,
    bf16: bool = False,
) -> Candidates:
    """Draws one candidate for each prompt, modality and seed at the pipeline's own settings.

    With `bf16` networks are autocast on a GPU; the filter's own arithmetic stays fp32.
    """
    parts = []
    for batch in batches(len(prompts), batch_size, "candidates"):
        texts, kinds = list(prompts[batch]), [resolve_modality(name) for name in modalities[batch]]
        funnel = pipe.prepare_funnel(texts, kinds, list(range(len(texts))), 1, pipe.device)
        with watch_steps(pipe, len(texts)) as steps:
            latents = draw_batch(pipe, texts, modalities[batch], seeds[batch], bf16)
        rated = [pipe.filter_head(*step[:3], text=funnel.text) for step in steps]
        decoded = decode_latents(pipe, latents, modalities[batch], bf16)
        # As the pipeline has the last word: on the picture, not on the latents that it was decoded from
        pictures = pipe.image_processor.postprocess(decoded, output_type="pil")
        rated.append(pipe.rate_pictures(pictures, texts, kinds, pipe.device))
        quality, finding = (torch.stack([getattr(r, part) for r in rated], 1) for part in ("quality", "finding"))
        levels = torch.stack([angle[0].clamp(max=1.5707).tan() for _, _, angle, _ in steps]).cpu()
        guidance = torch.stack([moved for *_, moved in steps], 1)
        quality, finding, guidance = quality.cpu(), finding.cpu(), guidance.cpu()
        code, levels = rated[-1].code.cpu(), F.pad(levels, (0, 1))
        parts.append(Candidates(quality, finding, guidance, levels, code, bytes_of(decoded)))
    return replace(joined(parts), levels=parts[0].levels)


def follow(
    score: torch.Tensor, levels: torch.Tensor, guided: torch.Tensor, plan: list[tuple[float, int]]
) -> tuple[torch.Tensor, int]:
    """What the funnel would do with candidates that were drawn to their end.

    Args:
        score: [M, K, S + 1], by which candidates of each of M images are dropped, and at last chosen.
        levels: [S + 1], as of `Candidates`.
        guided: bool [S], steps of which each sample costs two of the U-Net's.
        plan: (sigma / alpha, candidates left) as `plan_stages` gives them.

    Returns:
        The index [M] of the candidate that comes back, and the U-Net's samples that an image costs.
    """
    alive = torch.ones(score.shape[:2], dtype=torch.bool)
    left, samples, plan = score.shape[1], 0, list(plan)
    for i, level in enumerate(levels[:-1].tolist()):
        samples += left * (2 if guided[i] else 1)
        count = left
        while plan and level <= plan[0][0]:
            count = min(count, plan.pop(0)[1])
        if count < left:
            ranked = score[:, :, i].masked_fill(~alive, -torch.inf).sort(dim=1, descending=True, stable=True)
            alive = torch.zeros_like(alive).scatter(1, ranked.indices[:, :count], True)
            left = count
    return score[:, :, -1].masked_fill(~alive, -torch.inf).argmax(1), samples
