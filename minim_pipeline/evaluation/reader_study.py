"""What a study of several readers says: agreement, consistency, and whether they tell real from synthetic images.

Answers are 1, 2 or 3. Intervals are of 95 %: those of agreement and AUROC draw images anew, for these readers
(bootstrap, percentiles; Efron and Tibshirani, 1993); a share has Wilson's (1927).
"""

import itertools
import math
from collections.abc import Iterable

import numpy as np

from ..ratings import CANNOT_JUDGE, Rating
from .agreement import LEVELS, quadratic_kappa
from .metrics import interval_of


DRAWS = 1000
FEWEST = 5  # images; draws of fewer say nothing
SEED = 0
NOTHING = {"value": None, "interval": None, "n": 0}
Array = np.ndarray


def krippendorff_alpha(counts: Array, draws: Array | None = None) -> Array:
    """Krippendorff's alpha for ordinal answers: 1 is full agreement, 0 what chance would give.

    Krippendorff, Content Analysis (2019), chapter 12; answers may be missing.

    Args:
        counts: [images, levels], how many readers gave each answer; images with one answer do not count.
        draws: [..., images], how often each image counts; once, if left out.

    Returns:
        [...]; NaN where no image has two answers, or all answers are the same.
    """
    counts = np.asarray(counts, float)
    answers = counts.sum(1)
    pairs = counts[:, :, None] * counts[:, None, :] - counts[:, :, None] * np.eye(counts.shape[1])
    pairs = np.where(answers > 1, 1 / np.maximum(answers - 1, 1), 0)[:, None, None] * pairs
    coincidences = _weighted(np.ones(len(counts)) if draws is None else draws, pairs)
    n = coincidences.sum(-1)  # [..., levels]
    upto = n.cumsum(-1) - n / 2
    distance = (upto[..., :, None] - upto[..., None, :]) ** 2
    seen, expected = (
        (coincidences * distance).sum((-1, -2)),
        (n[..., :, None] * n[..., None, :] * distance).sum((-1, -2)),
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(expected > 0, 1 - (n.sum(-1) - 1) * seen / expected, np.nan)


def _weighted(draws: Array, tables: Array) -> Array:
    """The sum of each image's table [images, levels, levels], as often as each is drawn [..., images]."""
    return (draws @ tables.reshape(len(tables), -1)).reshape(*draws.shape[:-1], *tables.shape[1:])


def counts_auroc(synthetic: Array, real: Array) -> Array:
    """Share of pairs in which the real image got the higher answer, ties as halves.

    Args:
        synthetic, real: [..., levels], how many images of each kind got each answer.

    Returns:
        [...], 0 to 1; 0.5 where people cannot tell, NaN where images of a kind are missing.
    """
    higher = np.tril(np.ones((real.shape[-1],) * 2), -1) + np.eye(real.shape[-1]) / 2
    won = np.einsum("...j,jk,...k->...", real, higher, synthetic)
    with np.errstate(invalid="ignore", divide="ignore"):
        return won / (real.sum(-1) * synthetic.sum(-1))


def share(part: int, whole: int) -> dict:
    """A share as `value`, with Wilson's 95 % `interval`, and `n`; None where there is nothing."""
    if not whole:
        return NOTHING
    p, z = part / whole, 1.959964
    middle, half = p + z * z / (2 * whole), z * math.sqrt(p * (1 - p) / whole + (z / whole) ** 2 / 4)
    ends = [(middle - half) / (1 + z * z / whole), (middle + half) / (1 + z * z / whole)]
    return {"value": round(p, 4), "interval": [round(min(max(end, 0), 1), 4) for end in ends], "n": whole}


def _figure(drawn: Array, n: int) -> dict:
    """Of what came out for all n images once and then for draws of them: the `value`, and the `interval`."""
    value, drawn = float(drawn[0]), drawn[1:][np.isfinite(drawn[1:])]
    if not math.isfinite(value) or n < FEWEST:
        return NOTHING | {"n": n}
    return {"value": round(value, 4), "interval": interval_of(drawn), "n": n}


def _nan_mean(values: Array, weights: Array) -> Array:
    """Over the first axis, without what has no value; NaN where nothing has."""
    weights = np.where(np.isfinite(values), weights, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (np.nan_to_num(values) * weights).sum(0) / weights.sum(0)


def _draws(real: Array) -> Array:
    """How often each image counts [1 + DRAWS, images]: each once, and then drawn anew, real and generated apart."""
    generator, draws = np.random.default_rng(SEED), np.ones((1 + DRAWS, len(real)))
    for kind in (real, ~real):
        if kind.any():
            draws[1:, kind] = generator.multinomial(kind.sum(), np.full(kind.sum(), 1 / kind.sum()), DRAWS)
    return draws


def _results(ratings: list[Rating]) -> dict:
    """`study_results` of some modality's, or all, ratings."""
    readers = list(dict.fromkeys(rating.rater for rating in ratings))
    images = list(dict.fromkeys((rating.kind, rating.path) for rating in ratings))
    index, place = ({one: i for i, one in enumerate(found)} for found in (readers, images))
    given = np.zeros((len(readers), len(images), LEVELS))  # 1 where a reader gave this answer
    for rating in ratings:
        if rating.turn == 0:
            given[index[rating.rater], place[rating.kind, rating.path], rating.rating - 1] = 1
    real = np.array([kind == "real" for kind, _ in images], bool)
    draws = _draws(real)

    pairs, kappas = [], []
    for a, b in itertools.combinations(range(len(readers)), 2):
        common = given[a].any(1) & given[b].any(1)
        if common.any():
            told = given[a][common][:, :, None] * given[b][common][:, None, :]
            kappas.append(quadratic_kappa(_weighted(draws[:, common], told)))
            figure = _figure(kappas[-1], int(common.sum()))
            pairs.append({"raters": [readers[a], readers[b]], **figure})
    counts, sizes = given.sum(0), np.array([[float(pair["n"])] for pair in pairs])
    shared = int((counts.sum(1) > 1).sum())
    aurocs = [counts_auroc(draws[:, ~real] @ one[~real], draws[:, real] @ one[real]) for one in given]
    again = {name: _same_again([r for r in ratings if r.rater == name]) for name in readers}
    return {
        "images": len(images),
        "ratings": len(ratings),
        "kappa": _figure(_nan_mean(np.stack(kappas), sizes), shared) if pairs else NOTHING,
        "alpha": _figure(krippendorff_alpha(counts, draws), shared) if shared else NOTHING,
        "auroc": _figure(_nan_mean(np.stack(aurocs), np.ones((len(aurocs), 1))), len(images)) if aurocs else NOTHING,
        "consistency": share(*map(sum, zip(*again.values(), strict=True))) if again else NOTHING,
        "pairs": pairs,
        "raters": {
            name: {
                "ratings": sum(rating.rater == name for rating in ratings),
                "consistency": share(*again[name]),
                "auroc": _figure(aurocs[i], int(given[i].sum())),
            }
            for i, name in enumerate(readers)
        },
    }


def _same_again(ratings: list[Rating]) -> tuple[int, int]:
    """Of one reader: how many images shown again got the same answer again, and how many came again."""
    first = {(r.kind, r.path): r.rating for r in ratings if r.turn == 0}
    again = [(r.rating, first[r.kind, r.path]) for r in ratings if r.turn and (r.kind, r.path) in first]
    return sum(a == b for a, b in again), len(again)


def study_results(answers: Iterable[Rating]) -> dict:
    """The figures of a study of one question, over `all` and by `modalities`.

    Each has `images`, `ratings`; and, as `value`, `interval` and `n` (None where there is too little to say):
    `kappa`, the mean of all pairs of readers, weighted by their common images; `alpha`, Krippendorff's; `auroc`, the
    mean of readers, of telling real images (3) from generated ones (1); `consistency`, the share of images shown again
    that got the same answer; and by reader or pair `pairs` and `raters`. The first answer to an image counts for all
    but consistency, and "cannot judge" for none; `cannot_judge` says how often that was given.
    """
    answers = list(answers)
    ratings = [answer for answer in answers if answer.rating != CANNOT_JUDGE]
    modalities = list(dict.fromkeys(rating.modality for rating in ratings))
    return {
        "all": _results(ratings),
        "modalities": {name: _results([r for r in ratings if r.modality == name]) for name in modalities},
        "cannot_judge": len(answers) - len(ratings),
    }
