"""How far people agree in their ratings from 1 to 3, and a filter with them."""

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np


LEVELS = 3


def quadratic_kappa(confusion: np.ndarray) -> np.ndarray:
    """Cohen's kappa with quadratic weights (Cohen, 1968) of counts [..., levels, levels]; NaN where it has none."""
    level = np.arange(confusion.shape[-1])
    distance = (level[:, None] - level) ** 2
    total, by_chance = confusion.sum((-1, -2)), confusion.sum(-1)[..., :, None] * confusion.sum(-2)[..., None, :]
    expected = (by_chance * distance).sum((-1, -2))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(expected > 0, 1 - total * (confusion * distance).sum((-1, -2)) / expected, np.nan)


def weighted_kappa(a: Sequence[int], b: Sequence[int]) -> float | None:
    """Cohen's kappa with quadratic weights (Cohen, 1968): 1 is full agreement, 0 what chance would give.

    Args:
        a, b: ratings from 1 to 3 of the same images.

    Returns:
        `None` where there are fewer than two images, or all ratings are one and the same.
    """
    if len(a) != len(b):
        raise ValueError(f"Ratings of the same images are needed, got {len(a)} and {len(b)}.")
    if len(a) < 2:
        return None
    confusion = np.zeros((LEVELS, LEVELS))
    np.add.at(confusion, (np.array(a, int) - 1, np.array(b, int) - 1), 1)
    kappa = float(quadratic_kappa(confusion))
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
