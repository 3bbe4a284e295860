"""What images are rewarded for: plain functions of latents, or of what the filter head says of them."""

import torch
import torch.nn.functional as F

from ... import MinimPipeline, resolve_modality
from ...minim_filter import FilterHeadOutput, selection
from ...minim_filter.selection import Thresholds


@torch.no_grad()
def rate(
    pipe: MinimPipeline, latents: torch.Tensor, prompts: list[str], modalities: list[str], batch_size: int = 512
) -> FilterHeadOutput:
    """What the pipeline's filter head says of finished latents [N, C, h, w] for their prompts. Nothing is decoded."""
    head, parts = pipe.filter_head, []
    for start in range(0, len(prompts), batch_size):
        batch = slice(start, start + batch_size)
        kinds = [resolve_modality(name) for name in modalities[batch]]
        funnel = pipe.prepare_funnel(prompts[batch], kinds, list(range(len(kinds))), 1, head.device)
        parts.append(funnel.rate(latents[batch].to(head.device)))
    return FilterHeadOutput(*(torch.cat(values) for values in zip(*(part.to_tuple() for part in parts), strict=True)))


def overall(rated: FilterHeadOutput) -> torch.Tensor:
    """Probabilities [N, 3] of the worse of quality and finding being 1, 2 and 3: of one rating for both."""
    above = [rated.quality_probs[:, k:].sum(1) * rated.finding_probs[:, k:].sum(1) for k in (1, 2)]
    return torch.stack([1 - above[0], above[0] - above[1], above[1]], 1)


def finding_reward(rated: FilterHeadOutput, limit: float = 6.0) -> torch.Tensor:
    """The log odds that the finding is there, in a picture that is at least usable: fp32 [N].

    P(finding = 3) P(quality >= 2), as the filter head foretells it. Not the expected rating: where that nears 3,
    nothing would be left to tell a clear image from a clearer one. Better than usable does not count, as it goes at
    the cost of variety (see `FilterHead.enough`). It lies within `limit`, so that no image counts without end.
    """
    good = rated.finding_probs[:, 2] * rated.quality_probs[:, 1:].sum(1)
    return torch.logit(good, eps=1e-6).clamp(-limit, limit)


def are_copies(pipe: MinimPipeline, rated: FilterHeadOutput, modalities: list[str]) -> torch.Tensor:
    """Which images are copies of training images, as the filter head's fingerprints know them: bool [N]."""
    thresholds = [Thresholds.of(pipe.filter_head.config, resolve_modality(name).id) for name in modalities]
    return selection.are_copies(pipe.filter_head, rated, thresholds)


def spread(latents: torch.Tensor, group: torch.Tensor, pooled: int = 4) -> torch.Tensor:
    """How unlike the others of its group, int64 [N], each image is: mean cosine distance of pooled latents, fp32 [N].

    Averaged over `pooled` x `pooled`, latents [N, C, h, w] tell where things are, and not which noise a camera has;
    and only their direction counts, or more contrast would pass for more variety. 0 for an image that is alone.
    """
    size = min(pooled, *latents.shape[-2:])
    same = (group[:, None] == group[None]).float().fill_diagonal_(0)  # [N, N]
    with torch.autocast(latents.device.type, enabled=False):  # small differences of numbers near 1
        x = F.normalize(F.avg_pool2d(latents.float(), size).flatten(1), dim=1)  # [N, D]
        return ((1 - x @ x.T) * same).sum(1) / same.sum(1).clamp(min=1)
