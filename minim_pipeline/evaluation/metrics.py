"""Figures of fidelity, diversity and faithfulness to the prompt: pure functions, features in, numbers out.

Features are what any encoder gives of the images, float [N, D]; who extracts them is the caller's matter, and a figure
means nothing without the extractor's name and n beside it. Arithmetic is float64 on the CPU or wherever the features
lie. Fewer items than a metric needs: ValueError that says how many were given and how many are needed.
Distances to the nearest training image are in `memorisation.py`, neighbourhoods in `neighbourhoods.py`.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..mapped import Rows
from .images import to_unit


LARGEST = 2**18  # entries of a matrix of all items of one set and some of another: 2 MiB
MOST_SHUFFLED = 2**22  # numbers that are put into random order for some of them to be taken
Key = TypeVar("Key", bound=Hashable)


def frechet_distance(real: Tensor, synthetic: Tensor) -> float:
    """Fréchet distance of the Gaussians fitted to two sets of features (FID where Inception gives them, 1706.08500).

    |m - m'|^2 + Tr(S + S' - 2 (S S')^(1/2)): the distance as it is always quoted, which has the square in it. The last
    trace is the sum of the singular values of A B^T, with A, B the centred features over sqrt(n - 1): no square root
    of a singular matrix is taken, so fewer images than dimensions do no harm to the arithmetic. They do to the figure:
    it falls with n, so compare only at equal n and beside `frechet_floor`.

    Args:
        real: [N, D], N >= 2.
        synthetic: [M, D], M >= 2.

    Returns:
        0 for identical sets, no upper bound; in squared units of the features.
    """
    need("Fréchet distance", min(len(real), len(synthetic)), 2)
    real, synthetic = real.double(), synthetic.double()
    apart = (real.mean(0) - synthetic.mean(0)).square().sum()

    def root(x):  # A with A^T A = S, by QR at most D rows: [min(N, D), D]
        return torch.linalg.qr((x - x.mean(0)) / math.sqrt(len(x) - 1), mode="r").R

    a, b = root(real), root(synthetic)
    common = torch.linalg.svdvals(a @ b.T).sum()
    return max((apart + a.square().sum() + b.square().sum() - 2 * common).item(), 0.0)


def frechet_floor(real: Tensor, count: int, other: Tensor | None = None, draws: int = 10, seed: int = 0) -> float:
    """Fréchet distance of real images against real images, `count` of each: what a perfect generator would reach.

    Args:
        real: [N, D].
        count: images on each side, at least 2: as many as the synthetic set has.
        other: [M, D], real images of another part of the data to lay against `real`; None splits `real` at random
            into two sets that share no image.
        draws: the mean over that many random choices is given.

    Raises:
        ValueError: `real` has fewer than `count` images (than twice as many, without `other`), or `other` has.
    """
    need("Fréchet floor, images on each side", count, 2)
    need("Fréchet floor, real images", len(real), count if other is not None else 2 * count)
    if other is not None:
        need("Fréchet floor, other real images", len(other), count)
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for _ in range(draws):
        some, rest = real[torch.randperm(len(real), generator=generator)].tensor_split([count])
        others = rest if other is None else other[torch.randperm(len(other), generator=generator)]
        total += frechet_distance(some, others[:count])
    return total / draws


def kernel_distance(real: Tensor, synthetic: Tensor) -> float:
    """KID: squared maximum mean discrepancy under the kernel (x . y / D + 1)^3, the unbiased estimate (1801.01401).

    Over all images at once, which the paper's mean over subsets estimates; its expectation does not depend on n.

    Args:
        real: [N, D], N >= 2.
        synthetic: [M, D], M >= 2; N and M may differ.

    Returns:
        0 on average where both sets come from one distribution, so it may fall below 0.
    """
    need("Kernel distance", min(len(real), len(synthetic)), 2)
    return kernel_distances_of_parts(real, synthetic, [(slice(None), slice(None))])[0]


def kernel_distances_of_parts(real: Tensor, synthetic: Tensor, parts: Sequence[Sequence]) -> list[float]:
    """`kernel_distance` of parts of both sets, for all of which the kernel is reckoned once.

    Args:
        parts: of each, numbers of real and of synthetic images.
    """
    real, synthetic = real.double(), synthetic.double()
    chosen = [torch.zeros(len(parts), len(x), dtype=x.dtype, device=x.device) for x in (real, synthetic)]  # [P, N]
    for i, part in enumerate(parts):
        chosen[0][i, part[0]], chosen[1][i, part[1]] = 1, 1
    n, m = (mask.sum(1) for mask in chosen)
    need("Kernel distance", int(torch.minimum(n, m).min()), 2)

    def kernel(products: Tensor) -> Tensor:
        return (products / real.shape[1]).add_(1).pow_(3)

    def total(x: Tensor, y: Tensor, of_x: Tensor, of_y: Tensor) -> Tensor:  # over all pairs of each part: [P]
        rows = zip(rows_beside(x, len(y)), rows_beside(of_x.T, len(y)), strict=True)
        sums = [(own * (kernel(some @ y.T) @ of_y.T)).sum(0) for some, own in rows]
        return torch.stack(sums).sum(0)

    def mean_of_pairs(x: Tensor, of_x: Tensor, count: Tensor) -> Tensor:  # an image and itself are no pair
        return (total(x, x, of_x, of_x) - of_x @ kernel(x.square().sum(1))) / (count * (count - 1))

    own = mean_of_pairs(real, chosen[0], n) + mean_of_pairs(synthetic, chosen[1], m)
    return (own - 2 * total(real, synthetic, *chosen) / (n * m)).tolist()


def inception_score(probabilities: Tensor) -> float:
    """exp of the mean KL divergence of p(y | x) from p(y), in nats (1606.03498), over all images, not over splits.

    Args:
        probabilities: [N, C], N >= 2, a classifier's, each row summing to 1. Inception's or any other's: say which.

    Returns:
        1 (every image gets the same answer) to C (each is certain, all classes equally often). It cannot exceed N.
    """
    need("Inception score", len(probabilities), 2)
    p = probabilities.double()
    divergence = torch.special.entr(p.mean(0)).sum() - torch.special.entr(p).sum(1).mean()  # H(y) - H(y | x)
    return divergence.exp().item()


def auroc(negative: Tensor, positive: Tensor) -> float:
    """Share of pairs in which a positive item has the higher score, ties as halves (area under the ROC curve).

    Args:
        negative, positive: scores [N] and [M], N, M >= 1.

    Returns:
        0 to 1; 0.5 where the scores tell nothing.
    """
    need("AUROC, items of each kind", min(len(negative), len(positive)), 1)
    _, place, count = torch.cat([negative, positive]).unique(return_inverse=True, return_counts=True)
    rank = count.cumsum(0) - (count - 1) / 2  # from 1 on; equal scores share the mean of theirs
    least = len(positive) * (len(positive) + 1) / 2
    above = rank.double()[place[len(negative) :]].sum().item() - least
    return above / (len(negative) * len(positive))


def gradient_magnitude(images: Rows) -> Tensor:
    """Mean length of the gradient of each image's grey values, which falls where it is blurred: float32 [N].

    Args:
        images: [N, C, H, W], uint8 or float in [0, 1]; H, W >= 2.
    """
    found = []
    for part in images.split(64):
        x = to_unit(part).mean(1)
        across, down = x[:, :-1, 1:] - x[:, :-1, :-1], x[:, 1:, :-1] - x[:, :-1, :-1]
        found.append(torch.hypot(across, down).mean((1, 2)))
    return torch.cat(found)


def multiscale_ssim(a: Tensor, b: Tensor) -> Tensor:
    """MS-SSIM of pairs of images at five scales (Wang et al., 2003; torchmetrics'), 1 for equal ones: float32 [N].

    Args:
        a, b: [N, C, H, W], uint8 or float in [0, 1]; at least 176 px a side, which the coarsest scale's window needs.

    Raises:
        ModuleNotFoundError: torchmetrics is not installed (the extra `evaluate`).
    """
    need("MS-SSIM, px of the shorter side", min(a.shape[-2:]), 176)
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as ms_ssim

    return ms_ssim(to_unit(a), to_unit(b), data_range=1.0, reduction="none")


def ms_ssim_of_pairs(
    images: Rows,
    prompts: Sequence[str],
    pairs: int = 100,
    generator: torch.Generator | None = None,
    batch_size: int = 16,
    channels: int = 3,
) -> Tensor:
    """MS-SSIM of pairs of images that share a prompt, low where they differ (1610.09585): float32 [pairs or fewer].

    Args:
        images: [N, C, H, W], uint8 or float in [0, 1], as `multiscale_ssim` takes them.
        prompts: of each image; at least one of them has to have two images.
        pairs: how many pairs are drawn, without repetition; all where there are no more.
        generator: of torch, on the CPU, draws them.
        channels: the first so many are looked at: of three equal ones, one gives the same in a third of the time.
    """
    alike = list(places(prompts).values())
    need("MS-SSIM, images of one prompt", max(map(len, alike), default=0), 2)
    ends = np.cumsum([len(index) * (len(index) - 1) // 2 for index in alike])
    found = []
    for number in _some_of(int(ends[-1]), pairs, generator):
        own = int(np.searchsorted(ends, number, side="right"))
        before = int(ends[own - 1]) if own else 0
        found.append([alike[own][i] for i in pair_of(number - before, len(alike[own]))])
    parts = torch.tensor(found).split(batch_size)  # [n, 2] each
    return torch.cat([multiscale_ssim(*(images[part[:, i]][:, :channels] for i in (0, 1))) for part in parts])


def pair_of(number: int, count: int) -> tuple[int, int]:
    """The pair (i, j), i < j, of that number among those of `count` things, in the order of `torch.combinations`."""
    below = (2 * count - 1) ** 2 - 8 * number
    root = math.isqrt(below - 1) + 1 if below else 0  # rounded up
    i = (2 * count - 1 - root) // 2
    return i, number - i * (2 * count - i - 1) // 2 + i + 1


def _some_of(total: int, count: int, generator: torch.Generator | None) -> list[int]:
    """`count` different numbers below `total`, or all where there are no more, in random order."""
    if total <= MOST_SHUFFLED:
        return torch.randperm(total, generator=generator)[:count].tolist()
    chosen: dict[int, None] = {}
    while len(chosen) < min(count, total):
        chosen |= dict.fromkeys(torch.randint(total, (count,), generator=generator).tolist())
    return list(chosen)[:count]


def retrieval(
    name: str, queries: Tensor, pool: Tensor, query_labels: Sequence[str], pool_labels: Sequence[str], top: int = 10
) -> dict:
    """Whether the `top` items of the pool with the largest cosine to a query hold one with the query's label.

    Args:
        name: what an error calls it.
        queries: [N, D]; pool: [M, D], M > top.
        query_labels, pool_labels: of each; queries whose label the pool lacks are not asked.

    Returns:
        `rate`: share of the queries with a match among their top, 0 to 1 (the hit rate, or recall at `top`); `chance`:
        the same for a pool in random order; `precision`: share of the top that match, for labels that many share;
        `precision_chance`; `pool`: its size; `n`: queries asked; `top`; `hits`: bool [n], to draw an interval from.

    Raises:
        ValueError: no query's label is in the pool, or the pool is no larger than `top`.
    """
    need(f"{name}, pool", len(pool), top + 1)
    held = set(pool_labels)
    asked = [index for index, label in enumerate(query_labels) if label in held]
    need(f"{name}, queries whose label is in the pool", len(asked), 1)

    numbers = {label: number for number, label in enumerate(held)}
    wanted = torch.tensor([numbers[query_labels[index]] for index in asked])  # [n]
    offered = torch.tensor([numbers[label] for label in pool_labels])  # [M]
    unit = F.normalize(pool.double(), dim=1)
    nearest = [  # [n, top]
        (F.normalize(part.double(), dim=1) @ unit.T).topk(top, dim=1).indices.cpu()
        for part in rows_beside(queries[asked], len(pool))
    ]
    matches = offered[torch.cat(nearest)] == wanted[:, None]  # [n, top]
    hits = matches.any(1)

    size, counts = len(pool), offered.bincount()[wanted].tolist()  # items of the pool that match each query
    missed = [math.comb(size - count, top) / math.comb(size, top) for count in counts]
    return {
        "rate": hits.double().mean().item(),
        "chance": 1 - sum(missed) / len(missed),
        "precision": matches.double().mean().item(),
        "precision_chance": sum(counts) / len(counts) / size,
        "pool": size,
        "n": len(asked),
        "top": top,
        "hits": hits,
    }


# IIR: does a synthetic image find, among its nearest real ones, one of its label (a caption, or a finding)?
image_image_retrieval = partial(retrieval, "Image-image retrieval")


def image_text_retrieval(images: Tensor, texts: Tensor, captions: Sequence[str], top: int = 10) -> dict:
    """ITR: does an image find, among the nearest distinct captions, the one that it was made from?

    Args:
        images: embeddings [N, P] in the space that images and texts share.
        texts: [N, P], of the caption of each image.
        captions: the N sentences (with the modality, where one sentence stands under several); equal ones are one
            item of the pool, of which more than `top` are needed.

    Returns:
        As `retrieval`.
    """
    distinct = {caption: index for index, caption in enumerate(captions)}
    return retrieval("Image-text retrieval", images, texts[list(distinct.values())], captions, list(distinct), top)


def bootstrap_interval(
    function: Callable[..., Any],
    *arrays: Tensor,
    paired: bool = False,
    draws: int = 200,
    bounds: tuple[float, float] | dict[str, tuple[float, float]] = (-math.inf, math.inf),
    seed: int = 0,
    of_parts: Callable[..., list] | None = None,
) -> Any:
    """Where a figure would lie for other images of the same kind and number: its 95 % interval.

    Each draw takes a random half of every array without repetition; the spread of a mean over such halves is that of
    the mean over all (McCarthy, 1969), and it is laid about the figure of all items. The usual bootstrap draws items
    twice, and an image drawn twice is its own neighbour: its interval hardly ever holds the expected Fréchet distance.

    Args:
        function: of as many arrays, a number or a dict of numbers.
        arrays: tensors [N, ...], each at least twice as many items as `function` needs.
        paired: the arrays belong together row by row and are drawn together; otherwise each by itself.
        bounds: least and largest value that the figure can take; for a dict of figures one pair, or a dict of pairs.
        of_parts: gives what `function` gives of many parts, from the arrays and a list of numbers of items of each;
            for figures that are quicker to have together.

    Returns:
        (low, high), or a dict of them where `function` gives a dict.
    """
    need("Interval, items of each array", min(len(array) for array in arrays), 2)
    generator = torch.Generator().manual_seed(seed)
    whole: Any = function(*arrays)
    drawn = []
    for _ in range(draws):
        half = [torch.randperm(len(array), generator=generator)[: len(array) // 2].clone() for array in arrays]
        drawn.append([half[0]] * len(arrays) if paired else half)
    if of_parts is None:
        halves = [function(*(array[index] for array, index in zip(arrays, half, strict=True))) for half in drawn]
    else:
        halves = of_parts(*arrays, drawn)

    def interval(value, values, bounds):
        values = torch.tensor(values, dtype=torch.float64)
        tails = (values - values.mean()).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
        return tuple((value + tails).clamp(*bounds).tolist())

    if not isinstance(whole, dict):
        return interval(whole, halves, bounds)
    each = bounds if isinstance(bounds, dict) else dict.fromkeys(whole, bounds)
    return {key: interval(whole[key], [half[key] for half in halves], each[key]) for key in whole}


def places(keys: Iterable[Key]) -> dict[Key, list[int]]:
    """Of each key, in the order of its first place, all places where it stands."""
    found: dict[Key, list[int]] = {}
    for i, key in enumerate(keys):
        found.setdefault(key, []).append(i)
    return found


def drawn_within(groups: Iterable[Hashable], draws: int, generator: np.random.Generator) -> list[np.ndarray]:
    """For each group, in the order of its first item, indices of its items, as many drawn anew: int [draws, n]."""
    index = places(groups).values()
    return [np.array(own)[generator.integers(0, len(own), (draws, len(own)))] for own in index]


def interval_of(figures: np.ndarray) -> list[float]:
    """The middle 95 % of the figures of all draws [draws]."""
    return [round(float(q), 4) for q in np.quantile(figures, [0.025, 0.975])]


def rows_beside(x: Tensor, count: int) -> tuple[Tensor, ...]:
    """`x` in parts, each of so many rows that a matrix of them and of `count` others has `LARGEST` entries at most."""
    return x.split(max(1, LARGEST // count))


def need(what: str, given: int, least: int) -> None:
    """Raises ValueError where fewer things are given than `what` needs."""
    if given < least:
        raise ValueError(f"{what}: {given} given, at least {least} needed")
