"""Intervals by drawing anew what was measured (Efron and Tibshirani, An Introduction to the Bootstrap, 1993).

Of distances between sets of images, where one drawn twice would be its own neighbour: `metrics.bootstrap_interval`.
"""

from collections.abc import Hashable, Sequence

import numpy as np


def drawn_within(
    groups: Sequence[Hashable] | np.ndarray, draws: int, generator: np.random.Generator
) -> list[np.ndarray]:
    """For each group, in the order of its first item, indices of its items, as many drawn anew: int [draws, n]."""
    places: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        places.setdefault(group, []).append(i)
    return [np.array(some)[generator.integers(0, len(some), (draws, len(some)))] for some in places.values()]


def interval(figures: np.ndarray) -> list[float]:
    """The middle 95 % of the figures of all draws [draws]."""
    return [round(float(q), 4) for q in np.quantile(figures, [0.025, 0.975])]
