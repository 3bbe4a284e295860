"""Thresholds from scores of generated images: so that an asked-for share of them is accepted, or is right."""

import math

import torch


def threshold(
    score: torch.Tensor,
    finding: torch.Tensor,
    floor: float,
    acceptance: float,
    right: torch.Tensor | None = None,
    precision: float | None = None,
) -> float:
    """The score from which images are accepted, given that their finding reaches its floor.

    Args:
        score, finding: [N], of generated images.
        acceptance: share of all N to accept; less are accepted if the floor leaves less.
        right: bool [N], whether they show what they should; with `precision`, the share of accepted ones that has to.

    Raises:
        ValueError: no threshold reaches the precision with at least 20 images accepted.
    """
    reached = finding >= floor
    if precision is None or right is None:
        ranked = score.masked_fill(~reached, 1.0).sort(descending=True).values
        return ranked[max(1, round(acceptance * len(score))) - 1].item()
    order = score[reached].argsort(descending=True)
    share = right[reached][order].double().cumsum(0) / torch.arange(1, len(order) + 1)
    enough = ((share >= precision) & (torch.arange(1, len(order) + 1) >= 20)).nonzero()[:, 0]
    if not len(enough):
        best = share[19:].max().item() if len(share) >= 20 else math.nan
        raise ValueError(f"No threshold reaches a precision of {precision} with 20 images; the most is {best:.3f}.")
    return score[reached][order][enough[-1]].item()
