"""Precision, recall, density and coverage: who lies in whose neighbourhood, of whole sets and of many parts of them.

Distances are exact, so that an image is at 0 from its copy, and reckoned for some rows at a time.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .metrics import need, rows_beside


MOST_PAIRS = 2**23  # of images that lie near each other, which are kept in memory: 128 MiB


def precision_recall_density_coverage(real: Tensor, synthetic: Tensor, k: int = 5) -> dict[str, float]:
    """Who lies in whose neighbourhood; a neighbourhood reaches to an image's k-th neighbour of its own set.

    Precision and recall are of 1904.06991, density and coverage of 2002.09797 (which takes k = 5).

    Args:
        real: [N, D], N > k.
        synthetic: [M, D], M > k.

    Returns:
        `precision`: share of synthetic images within the neighbourhood of any real one, 0 to 1;
        `recall`: share of real images within the neighbourhood of any synthetic one, 0 to 1;
        `density`: in how many real neighbourhoods a synthetic image lies on average, over k; 0 to N / k, near 1 where
            the sets are alike;
        `coverage`: share of real images whose neighbourhood holds a synthetic one, 0 to 1.
    """
    need("Precision, recall, density and coverage", min(len(real), len(synthetic)), k + 1)
    real, synthetic = real.double(), synthetic.double()

    def radius(x: Tensor) -> Tensor:  # the nearest is the image itself
        return torch.cat([part.kthvalue(k + 1).values for part in distances(x, x)])

    real_radius, synthetic_radius = radius(real), radius(synthetic)  # [N], [M]
    holding = torch.zeros(len(synthetic), dtype=torch.int64, device=real.device)  # real neighbourhoods, of each
    covered, reached = [], []
    for between, reach in zip(distances(real, synthetic), rows_beside(real_radius, len(synthetic)), strict=True):
        in_real = between <= reach[:, None]  # [n, M]
        holding += in_real.sum(0)
        covered.append(in_real.any(1))
        reached.append((between <= synthetic_radius).any(1))
    return _figures(holding, torch.cat(covered), torch.cat(reached), k)


def neighbourhoods_of_parts(
    real: Tensor, synthetic: Tensor, parts: Sequence[Sequence[Tensor]], k: int = 5
) -> list[dict[str, float]]:
    """`precision_recall_density_coverage` of many parts of both sets, about half of each, without all distances anew.

    The k nearest in such a part are among the few nearest of all, so these are found once. Where a part's are not, or
    where too many images lie near each other, its distances are reckoned.

    Args:
        parts: of each, numbers of real and of synthetic images.
    """
    need("Precision, recall, density and coverage", min(len(x) for part in parts for x in part), k + 1)
    real, synthetic = real.double(), synthetic.double()
    # Of an image's 40 nearest, fewer than 5 lie in a half once in 10 million times.
    nearest = [_nearest(x, min(len(x), 8 * k + 1)) for x in (real, synthetic)]
    near = _pairs(real, synthetic, *(distance[:, -1] for distance, _ in nearest))
    found = []
    for part in parts:
        masks = [torch.zeros(len(x), dtype=torch.bool) for x in (real, synthetic)]
        for mask, numbers in zip(masks, part, strict=True):
            mask[numbers] = True
        radii = [_radius(*of_set, mask, k) for of_set, mask in zip(nearest, masks, strict=True)]
        if near is None or any(radius[mask].isnan().any() for radius, mask in zip(radii, masks, strict=True)):
            found.append(precision_recall_density_coverage(real[part[0]], synthetic[part[1]], k))
            continue
        i, j, distance = near
        there = masks[0][i] & masks[1][j]
        in_real, in_synthetic = there & (distance <= radii[0][i]), there & (distance <= radii[1][j])
        holding = j[in_real].bincount(minlength=len(synthetic))[masks[1]]
        covered, reached = (
            i[inside].bincount(minlength=len(real))[masks[0]] > 0 for inside in (in_real, in_synthetic)
        )
        found.append(_figures(holding, covered, reached, k))
    return found


def distances(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Of all of x [N, D] from all of y [M, D], some rows at a time: [n, M]."""
    exact = "donot_use_mm_for_euclid_dist"
    return (torch.cdist(part, y, compute_mode=exact) for part in rows_beside(x, len(y)))


def _figures(holding: Tensor, covered: Tensor, reached: Tensor, k: int) -> dict[str, float]:
    """From how many real neighbourhoods hold each synthetic image, and which real ones are covered and reached."""
    return {
        "precision": (holding > 0).double().mean().item(),
        "recall": reached.double().mean().item(),
        "density": holding.double().mean().item() / k,
        "coverage": covered.double().mean().item(),
    }


def _nearest(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Distances and numbers of the `count` nearest of each, itself among them, the nearest first: [N, count]."""
    found = [part.topk(count, dim=1, largest=False) for part in distances(x, x)]
    return torch.cat([values for values, _ in found]), torch.cat([numbers for _, numbers in found])


def _pairs(
    real: Tensor, synthetic: Tensor, reach: Tensor, other_reach: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Numbers and distances of a real and a synthetic image within the reach of either; None if they are too many."""
    found: tuple[list, list, list] = [], [], []
    count, start = 0, 0
    for between, own in zip(distances(real, synthetic), rows_beside(reach, len(synthetic)), strict=True):
        near = between <= torch.maximum(own[:, None], other_reach)
        i, j = near.nonzero().unbind(1)
        for part, values in zip(found, ((i + start).int(), j.int(), between[near]), strict=True):
            part.append(values)
        count, start = count + len(i), start + len(between)
        if count > MOST_PAIRS:
            return None
    i, j, distance = map(torch.cat, found)
    return i, j, distance


def _radius(distance: Tensor, numbers: Tensor, mask: Tensor, k: int) -> Tensor:
    """Of each image, the distance to its k-th neighbour in a part; NaN where that is not among those found: [N]."""
    place = mask[numbers].cumsum(1)  # itself is the first
    radius = distance.gather(1, (place == k + 1).byte().argmax(1, keepdim=True))[:, 0]
    return radius.masked_fill(place[:, -1] <= k, torch.nan)
