"""How far people agree in their ratings from 1 to 3, and a filter with them. Needs torchmetrics."""

import itertools
import math
from collections.abc import Mapping, Sequence

import torch


def weighted_kappa(a: Sequence[int], b: Sequence[int]) -> float | None:
    """Cohen's kappa with quadratic weights (Cohen, 1968): 1 is full agreement, 0 what chance would give.

    Args:
        a, b: ratings from 1 to 3 of the same images.

    Returns:
        `None` where there are fewer than two images, or all ratings are one and the same.
    """
    from torchmetrics.functional.classification import multiclass_cohen_kappa

    if len(a) != len(b):
        raise ValueError(f"Ratings of the same images are needed, got {len(a)} and {len(b)}.")
    if len(a) < 2:
        return None
    first, second = (torch.tensor([int(rating) for rating in ratings]) - 1 for ratings in (a, b))
    kappa = multiclass_cohen_kappa(first, second, num_classes=3, weights="quadratic").item()
    return round(kappa, 4) if math.isfinite(kappa) else None


def rater_agreement(rows: Sequence[Mapping]) -> dict:
    """Weighted kappa of every two raters over the images that both have rated; of several ratings the last counts.

    Args:
        rows: with `path`, `rater` and `rating`.

    Returns:
        `pairs`: a list of `raters`, `kappa` and `n` images; `mean`: of all pairs, weighted by n, or `None`.
    """
    given: dict[str, dict[str, int]] = {}
    for row in rows:
        given.setdefault(row["rater"], {})[row["path"]] = int(row["rating"])
    pairs, known = [], []
    for one, other in itertools.combinations(sorted(given), 2):
        common = sorted(given[one].keys() & given[other].keys())
        if common:
            kappa = weighted_kappa([given[one][p] for p in common], [given[other][p] for p in common])
            pairs.append({"raters": [one, other], "kappa": kappa, "n": len(common)})
            if kappa is not None:
                known.append((kappa, len(common)))
    mean = round(sum(k * n for k, n in known) / sum(n for _, n in known), 4) if known else None
    return {"pairs": pairs, "mean": mean}
