"""Rewards of drawn images: plain functions from latents, or from people's ratings, to a number for each image.

A reward counts within its group, the images of one prompt: a hard prompt's best image is worth as much as an easy
one's (GRPO, arXiv 2402.03300; for diffusion DanceGRPO, arXiv 2505.07818).
"""

import torch
import torch.nn.functional as F

from minim_pipeline import MinimPipeline, resolve_modality
from minim_pipeline.minim_filter import FilterHeadOutput
from minim_pipeline.minim_filter.fingerprints import distances
from minim_pipeline.minim_filter.funnel import combine


@torch.no_grad()
def rate(
    pipe: MinimPipeline, latents: torch.Tensor, prompts: list[str], modalities: list[str], batch_size: int = 512
) -> FilterHeadOutput:
    """What the pipeline's filter head says of finished latents [N, C, h, w] for their prompts. Nothing is decoded."""
    head, parts = pipe.filter_head, []
    for start in range(0, len(prompts), batch_size):
        mine = slice(start, start + batch_size)
        kinds = [resolve_modality(name) for name in modalities[mine]]
        funnel = pipe.prepare_funnel(prompts[mine], kinds, list(range(len(kinds))), 1, head.device)
        parts.append(funnel.rate(latents[mine].to(head.device)))
    return FilterHeadOutput(*(torch.cat(values) for values in zip(*(part.to_tuple() for part in parts), strict=True)))


def filter_reward(
    pipe: MinimPipeline,
    latents: torch.Tensor,
    prompts: list[str],
    modalities: list[str],
    enough: tuple[float, float] | None = None,
    batch_size: int = 512,
) -> torch.Tensor:
    """The filter head's rating of finished latents [N, C, h, w], 1 to 3: fp32 [N].

    Args:
        enough: quality and finding count up to here; by default as the head's config has it. What is good enough is
            not made better at the cost of variety.

    Copies of training images, as the head's fingerprints know them, get the worst rating.
    """
    head = pipe.filter_head
    quality_enough, finding_enough = enough or head.config.enough
    rated = rate(pipe, latents, prompts, modalities, batch_size)
    reward = combine(rated.quality.clamp(max=quality_enough), rated.finding.clamp(max=finding_enough))
    calibration = head.config.calibration or {}
    near = [calibration.get(resolve_modality(name).id, {}).get("copy", -1) for name in modalities]
    copies = distances(rated.code, head.fingerprints) <= torch.tensor(near, device=reward.device)
    return torch.where(copies, 1.0, reward)


def spread(latents: torch.Tensor, group: torch.Tensor, pooled: int = 4) -> torch.Tensor:
    """How far each image lies from the others of its group: mean distance of latents averaged over squares, fp32 [N].

    Averaged over `pooled` x `pooled`, latents tell where things are, and not which noise a camera has.

    Args:
        latents: [N, C, h, w].
        group: int64 [N]; 0 for an image that is alone.
    """
    size = min(pooled, *latents.shape[-2:])
    x = F.avg_pool2d(latents.float(), size).flatten(1)  # [N, D]
    result = torch.zeros(len(x), device=x.device)
    for number in group.unique():
        mine = (group == number).nonzero()[:, 0]
        if len(mine) > 1:
            result[mine] = torch.cdist(x[mine], x[mine]).sum(1) / (len(mine) - 1)
    return result


def centred(values: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """Values [N] less the mean of their group."""
    _, index = group.unique(return_inverse=True)
    total = torch.zeros(int(index.max()) + 1, device=values.device).index_add(0, index, values)
    return values - (total / torch.bincount(index))[index]


def standardise(values: torch.Tensor) -> torch.Tensor:
    """Values [N] over their standard deviation; zeros where they do not differ.

    Over that of all groups, not of each: where all images of a prompt are alike, there is little to learn.
    """
    return values / values.std().clamp(min=1e-6) if len(values) > 1 else torch.zeros_like(values)


def optimality(advantage: torch.Tensor, bound: float) -> torch.Tensor:
    """The probability, in [0, 1], that an image counts as a good one: 0.5 at an advantage of 0, clipped at `bound`."""
    return 0.5 + 0.5 * (advantage / bound).clamp(-1, 1)


def rating_reward(ratings: list[float], raters: list[str]) -> torch.Tensor:
    """People's ratings [N] without what each rater gives more or less than all of them do on average: fp32 [N]."""
    values = torch.tensor(ratings, dtype=torch.float32)
    average = values.mean()
    for name in set(raters):
        mine = torch.tensor([rater == name for rater in raters])
        values[mine] += average - values[mine].mean()
    return values
