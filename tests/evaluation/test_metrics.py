"""Every figure agrees with another way to compute it, and says something sensible at the edges."""

import math

import numpy as np
import pytest
import torch

from minim_pipeline.evaluation import metrics, neighbourhoods
from minim_pipeline.evaluation.metrics import (
    bootstrap_interval,
    frechet_distance,
    frechet_floor,
    image_image_retrieval,
    image_text_retrieval,
    inception_score,
    kernel_distance,
    kernel_distances_of_parts,
    ms_ssim_of_pairs,
    multiscale_ssim,
    pair_of,
    retrieval,
)
from minim_pipeline.evaluation.neighbourhoods import neighbourhoods_of_parts, precision_recall_density_coverage


torch.set_num_threads(1)


def features(count: int, size: int = 8, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed)) * scale + shift


def exact_gaussian(count: int, size: int, seed: int) -> torch.Tensor:
    """Points whose sample mean is 0 and whose sample covariance is the identity, up to rounding."""
    x = features(count, size, seed).double()
    return torch.linalg.qr(x - x.mean(0)).Q * math.sqrt(count - 1)


def picture(size: int = 192, seed: int = 0, channels: int = 1) -> torch.Tensor:
    coarse = torch.rand(1, channels, 12, 12, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)[0]


# Fréchet distance


def test_frechet_distance_of_gaussians_in_closed_form():
    s, t = torch.linspace(0.5, 2, 6), torch.linspace(3, 0.1, 6)
    m = torch.arange(6) / 3
    found = frechet_distance(exact_gaussian(50, 6, 0) * s, exact_gaussian(80, 6, 1) * t + m)
    assert found == pytest.approx(float((m**2).sum() + ((s - t) ** 2).sum()), rel=1e-5)


@pytest.mark.parametrize("count, other, size", [(60, 90, 8), (12, 9, 30), (9, 40, 20), (20, 21, 20)])
def test_frechet_distance_of_any_covariance_by_matrix_roots(count, other, size):
    mixing = features(size, size, 5)
    x, y = features(count, size, 1), features(other, size, 2, 1.5, 0.3) @ mixing

    def root(matrix):
        values, vectors = np.linalg.eigh(matrix)
        return vectors * np.sqrt(values.clip(0)) @ vectors.T

    a, b = x.double().numpy(), y.double().numpy()
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    cross = np.trace(root(root(s) @ t @ root(s)))
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s) + np.trace(t) - 2 * cross
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(y, x) == pytest.approx(expected, rel=1e-5)


def test_frechet_distance_agrees_with_torchmetrics():
    fid = pytest.importorskip("torchmetrics.image.fid")
    network = torch.nn.Identity()
    network.num_features = 8
    metric = fid.FrechetInceptionDistance(feature=network).set_dtype(torch.float64)
    x, y = features(60, seed=1).double(), features(70, seed=2, scale=1.3, shift=0.2).double()
    metric.update(x, real=True)
    metric.update(y, real=False)
    assert frechet_distance(x, y) == pytest.approx(metric.compute().item(), rel=1e-6)


@pytest.mark.parametrize("count, size", [(100, 8), (10, 64)])
def test_identical_sets_have_frechet_distance_zero_in_any_order(count, size):
    x = features(count, size, shift=100.0)
    assert 0 <= frechet_distance(x, x.flip(0)) < 1e-9
    assert frechet_distance(x.half(), x.half()) < 1e-9


def test_floor_falls_with_the_number_of_images_and_lies_below_a_shifted_set():
    real = features(400, 8)
    small, large = frechet_floor(real, 20), frechet_floor(real, 200)
    assert 0 < large < small / 3
    assert frechet_floor(real, 20, seed=0) == small
    assert small < frechet_distance(real[:20], features(20, 8, 1, shift=1.0))


def test_floor_never_lays_an_image_against_itself_and_takes_other_images():
    points = torch.arange(4.0)[:, None] * torch.tensor([[1.0, 10.0]])  # any split of four points leaves a distance
    assert frechet_floor(points, 2, draws=20) > 0.01
    assert frechet_floor(points, 4, other=points) == pytest.approx(0, abs=1e-9)
    assert frechet_floor(points, 4, other=points + 3) == pytest.approx(18)


# Kernel distance


@pytest.mark.parametrize("count, other", [(7, 7), (5, 9)])
def test_kernel_distance_by_loops(count, other):
    x, y = features(count, 4, 1).double().numpy(), features(other, 4, 2, 1.5).double().numpy()

    def mean(a, b, same):
        terms = [(a[i] @ b[j] / 4 + 1) ** 3 for i in range(len(a)) for j in range(len(b)) if not (same and i == j)]
        return sum(terms) / len(terms)

    expected = mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)
    assert kernel_distance(torch.tensor(x), torch.tensor(y)) == pytest.approx(expected)


def test_kernel_distance_agrees_with_torchmetrics_at_equal_n():
    kid = pytest.importorskip("torchmetrics.image.kid")
    x, y = features(50, seed=1).double(), features(50, seed=2, shift=0.3).double()
    assert kernel_distance(x, y) == pytest.approx(kid.poly_mmd(x, y).item())


def test_kernel_distance_is_zero_on_average_whatever_the_number_of_images():
    few = [kernel_distance(features(10, seed=2 * i), features(10, seed=2 * i + 1)) for i in range(300)]
    error = np.std(few) / math.sqrt(len(few))
    assert abs(np.mean(few)) < 4 * error and min(few) < 0
    assert kernel_distance(features(10), features(10, seed=1, shift=2.0)) > 50 * error


# Inception score


def test_inception_score_by_the_sum_of_divergences():
    p = torch.softmax(features(40, 6, scale=2.0), 1).double().numpy()
    marginal = p.mean(0)
    divergences = [sum(q * math.log(q / m) for q, m in zip(row, marginal)) for row in p]
    assert inception_score(torch.tensor(p)) == pytest.approx(math.exp(np.mean(divergences)))


def test_inception_score_runs_from_one_to_the_number_of_classes():
    assert inception_score(torch.eye(5).repeat(4, 1)) == pytest.approx(5)  # holds zeros, whose logarithm is not taken
    assert inception_score(torch.tensor([[0.7, 0.2, 0.1]]).repeat(9, 1)) == pytest.approx(1)


# Precision, recall, density, coverage


def prdc_by_loops(real: np.ndarray, synthetic: np.ndarray, k: int) -> dict[str, float]:
    def distance(a, b):
        return float(np.sqrt(((a - b) ** 2).sum()))

    def radius(index, own):
        return sorted(distance(own[index], x) for i, x in enumerate(own) if i != index)[k - 1]

    real_radius = [radius(i, real) for i in range(len(real))]
    synthetic_radius = [radius(i, synthetic) for i in range(len(synthetic))]
    inside = [[distance(r, s) <= real_radius[i] for s in synthetic] for i, r in enumerate(real)]
    reached = [any(distance(r, s) <= synthetic_radius[j] for j, s in enumerate(synthetic)) for r in real]
    return {
        "precision": np.mean([any(row[j] for row in inside) for j in range(len(synthetic))]),
        "recall": np.mean(reached),
        "density": sum(map(sum, inside)) / (k * len(synthetic)),
        "coverage": np.mean([any(row) for row in inside]),
    }


@pytest.mark.parametrize("k", [1, 5])
def test_neighbourhoods_by_loops(k):
    real, synthetic = features(30, 3, 1).double(), features(22, 3, 2, 0.8, 0.7).double()
    expected = prdc_by_loops(real.numpy(), synthetic.numpy(), k)
    assert 0 < expected["recall"] < 1 and 0 < expected["coverage"] < 1
    assert precision_recall_density_coverage(real, synthetic, k) == pytest.approx(expected)


def test_neighbourhoods_agree_with_prdc():
    prdc = pytest.importorskip("prdc")
    real, synthetic = features(80, 5, 1), features(60, 5, 2, 1.2, 0.5)
    expected = prdc.compute_prdc(real.numpy(), synthetic.numpy(), nearest_k=5)
    assert precision_recall_density_coverage(real, synthetic) == pytest.approx(expected)


@pytest.mark.parametrize("repeats", [1, 10])
def test_identical_sets_have_recall_one(repeats):
    x = features(60, 16).repeat(repeats, 1)
    found = precision_recall_density_coverage(x, x.flip(0))
    assert found["precision"] == found["recall"] == found["coverage"] == 1


def test_one_image_repeated_covers_next_to_nothing():
    real = features(200, 16)
    found = precision_recall_density_coverage(real, real[:1].repeat(200, 1))
    assert found["precision"] == 1  # it is a real image
    assert found["coverage"] <= 0.15 and found["recall"] == 1 / 200
    assert precision_recall_density_coverage(real, features(200, 16, 1))["coverage"] > 0.9


def test_a_set_far_away_scores_nothing():
    found = precision_recall_density_coverage(features(30), features(30, seed=1, shift=100.0))
    assert set(found.values()) == {0.0}


# MS-SSIM


def ms_ssim_by_hand(a: np.ndarray, b: np.ndarray) -> float:
    """Wang's formula on [H, W] in [0, 1]; the coarsest scale's mean runs over mirrored edges too, as torchmetrics'."""
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2

    def blurred(image):
        return (np.lib.stride_tricks.sliding_window_view(image, (11, 11)) * window).sum((2, 3))

    product = 1.0
    for scale, weight in enumerate([0.0448, 0.2856, 0.3001, 0.2363, 0.1333]):
        if scale == 4:
            a, b = np.pad(a, 5, mode="reflect"), np.pad(b, 5, mode="reflect")
        m, n = blurred(a), blurred(b)
        covariance = blurred(a * b) - m * n
        term = (2 * covariance + 0.03**2) / (blurred(a * a) - m * m + blurred(b * b) - n * n + 0.03**2)
        if scale == 4:
            term = term * (2 * m * n + 0.01**2) / (m * m + n * n + 0.01**2)
        product *= max(term.mean(), 0) ** weight
        a, b = (x.reshape(x.shape[0] // 2, 2, x.shape[1] // 2, 2).mean((1, 3)) if scale < 4 else x for x in (a, b))
    return product


def test_ms_ssim_by_hand():
    pytest.importorskip("torchmetrics")
    a = picture()
    b = (a + 0.2 * features(192, 192)).clamp(0, 1)
    found = multiscale_ssim(torch.stack([a, a]), torch.stack([b, picture(seed=1)]))
    assert found[0] == pytest.approx(ms_ssim_by_hand(a[0].double().numpy(), b[0].double().numpy()), abs=1e-4)
    unlike = ms_ssim_by_hand(a[0].double().numpy(), picture(seed=1)[0].double().numpy())
    assert found[1] == pytest.approx(unlike, abs=1e-4)
    assert found[1] < found[0] < 1
    smallest = torch.ones(1, 1, 176, 176)
    assert multiscale_ssim(smallest, smallest).tolist() == pytest.approx([1])


def test_one_image_repeated_has_ms_ssim_one():
    pytest.importorskip("torchmetrics")
    image = (picture(channels=3) * 255).to(torch.uint8)
    values = ms_ssim_of_pairs(image.repeat(4, 1, 1, 1), "aaaa", pairs=3)
    assert values.tolist() == pytest.approx([1] * 3, abs=1e-5)


def test_pairs_are_distinct_and_share_their_prompt():
    pytest.importorskip("torchmetrics")
    images = torch.stack([0.7 * picture(seed=9) + 0.3 * picture(seed=i) for i in range(5)])
    prompts = ["a", "b", "a", "a", "b"]
    each = [
        multiscale_ssim(images[i : i + 1], images[j : j + 1]).item()
        for i in range(5)
        for j in range(i)
        if prompts[i] == prompts[j]
    ]
    assert sorted(ms_ssim_of_pairs(images, prompts).tolist()) == pytest.approx(sorted(each), abs=1e-5)
    few = [ms_ssim_of_pairs(images, prompts, 2, torch.Generator().manual_seed(7)).tolist() for _ in range(2)]
    assert few[0] == few[1] and len(few[0]) == 2 and few[0][0] != few[0][1]
    assert all(min(abs(value - other) for other in each) < 1e-5 for value in few[0])


# Retrieval


def retrieval_by_loops(queries, pool, query_labels, pool_labels, top):
    hits, shares = [], []
    for query, label in zip(queries.numpy(), query_labels):
        cosines = [query @ x / np.linalg.norm(query) / np.linalg.norm(x) for x in pool.numpy()]
        nearest = sorted(range(len(pool)), key=lambda i: -cosines[i])[:top]
        hits.append(any(pool_labels[i] == label for i in nearest))
        shares.append(np.mean([pool_labels[i] == label for i in nearest]))
    return hits, np.mean(shares)


def test_image_retrieval_by_loops_with_chance_of_a_shuffled_pool():
    generator = np.random.default_rng(0)
    labels, real_labels = list("aabbcd"), list("aaabbc" * 3 + "ddddddd")
    synthetic, real = features(6, 5, 1), features(25, 5, 2)
    found = image_image_retrieval(synthetic, real, labels, real_labels, top=4)
    hits, share = retrieval_by_loops(synthetic, real, labels, real_labels, 4)
    assert found["hits"].tolist() == hits
    assert found["rate"] == pytest.approx(np.mean(hits)) and found["precision"] == pytest.approx(share)
    assert (found["pool"], found["n"], found["top"]) == (25, 6, 4)
    shuffled = [[label in generator.permutation(real_labels)[:4] for label in labels] for _ in range(3000)]
    assert found["chance"] == pytest.approx(np.mean(shuffled), abs=0.015)
    assert found["precision_chance"] == pytest.approx(np.mean([real_labels.count(x) / 25 for x in labels]))


def test_hit_rate_agrees_with_torchmetrics():
    functional = pytest.importorskip("torchmetrics.functional.retrieval")
    queries, pool, names = features(30, seed=1), features(30, seed=2), [str(i) for i in range(30)]
    similarity = torch.nn.functional.normalize(queries, dim=1) @ torch.nn.functional.normalize(pool, dim=1).T
    target = torch.eye(30, dtype=torch.bool)
    expected = [functional.retrieval_hit_rate(similarity[i], target[i], top_k=10).item() for i in range(30)]
    assert image_image_retrieval(queries, pool, names, names)["rate"] == pytest.approx(np.mean(expected))


def test_text_retrieval_counts_equal_captions_once():
    captions = [f"caption {i % 20}" for i in range(60)]
    texts = features(20, 12)[torch.arange(60) % 20]
    found = image_text_retrieval(texts + 0.01 * features(60, 12, 1), texts, captions)
    assert (found["rate"], found["pool"], found["n"], found["top"]) == (1, 20, 60, 10)
    assert found["chance"] == pytest.approx(0.5)
    other = image_text_retrieval(features(60, 12, 3), texts, captions)["rate"]
    assert other == pytest.approx(0.5, abs=0.25)


def test_queries_whose_label_the_pool_lacks_are_not_asked():
    pool = features(12)
    found = image_image_retrieval(pool[:3], pool, ["0", "elsewhere", "2"], [str(i) for i in range(12)])
    assert found["n"] == 2 and found["rate"] == 1


# Intervals


def test_interval_of_a_mean_is_the_textbooks():
    x = features(400, 1)[:, 0] * 3 + 1
    low, high = bootstrap_interval(lambda a: a.mean().item(), x, draws=1000)
    width = 1.96 * x.std().item() / math.sqrt(400)
    assert low == pytest.approx(x.mean().item() - width, abs=0.1 * width)
    assert high == pytest.approx(x.mean().item() + width, abs=0.1 * width)


def test_interval_holds_the_distance_that_other_sets_of_the_same_size_have():
    others = [frechet_distance(features(80, 16, 2 * i), features(80, 16, 2 * i + 1, 1.3)) for i in range(20, 100)]
    held = 0
    for i in range(20):
        sets = features(80, 16, 2 * i), features(80, 16, 2 * i + 1, 1.3)
        low, high = bootstrap_interval(frechet_distance, *sets, draws=60)
        held += low <= np.mean(others) <= high
    assert held >= 16


def test_interval_of_several_figures_keeps_to_their_bounds_and_repeats_with_its_seed():
    sets = features(40), features(40, seed=1)
    bounds = {"precision": (0, 1), "recall": (0, 1), "density": (0, math.inf), "coverage": (0, 1)}
    found = bootstrap_interval(precision_recall_density_coverage, *sets, draws=50, bounds=bounds)
    values = precision_recall_density_coverage(*sets)
    for key, (low, high) in found.items():
        assert bounds[key][0] <= low <= values[key] <= high <= bounds[key][1]
    assert bootstrap_interval(precision_recall_density_coverage, *sets, draws=50, bounds=bounds) == found
    assert bootstrap_interval(precision_recall_density_coverage, *sets, draws=50, bounds=bounds, seed=1) != found


def test_paired_arrays_are_drawn_together():
    x = features(50)
    assert bootstrap_interval(lambda a, b: (a - b).abs().max().item(), x, x, paired=True) == (0, 0)
    assert bootstrap_interval(lambda a, b: (a - b).abs().mean().item(), x, x, draws=20)[1] > 0


# Too few


@pytest.mark.parametrize(
    "compute, given, needed",
    [
        (lambda: frechet_distance(features(1), features(9)), 1, 2),
        (lambda: frechet_floor(features(9), 5), 9, 10),
        (lambda: frechet_floor(features(9), 5, other=features(4)), 4, 5),
        (lambda: kernel_distance(features(9), features(0)), 0, 2),
        (lambda: inception_score(torch.ones(1, 3) / 3), 1, 2),
        (lambda: precision_recall_density_coverage(features(9), features(5)), 5, 6),
        (lambda: precision_recall_density_coverage(features(3), features(9), k=3), 3, 4),
        (lambda: ms_ssim_of_pairs(torch.rand(2, 3, 192, 192), ["a", "b"]), 1, 2),
        (lambda: image_image_retrieval(features(9), features(10), "a" * 9, "a" * 10), 10, 11),
        (lambda: image_text_retrieval(features(30), features(30), ["a", "b"] * 15), 2, 11),
        (lambda: retrieval("R", features(9), features(20), "b" * 9, "a" * 20), 0, 1),
        (lambda: bootstrap_interval(lambda a: 0.0, features(1)), 1, 2),
    ],
)
def test_too_few_items_are_told_with_how_many_are_needed(compute, given, needed):
    with pytest.raises(ValueError, match=rf"\b{given} given, at least {needed} needed"):
        compute()


def test_too_small_images_are_told_with_the_size_needed():
    small = torch.rand(2, 1, 175, 300)
    with pytest.raises(ValueError, match="175 given, at least 176 needed"):
        multiscale_ssim(small, small)


# In parts


def test_figures_do_not_depend_on_how_much_is_laid_beside_each_other(monkeypatch):
    """All pairs at once, and a few rows at a time."""
    real, synthetic = features(50, 6, 1), features(43, 6, 2, 1.2, 0.3)
    labels, others = [str(i % 5) for i in range(50)], [str(i % 5) for i in range(43)]

    def figures() -> dict[str, float]:
        found = image_image_retrieval(synthetic, real, others, labels, 3)
        alike = {"kernel": kernel_distance(real, synthetic), "rate": found["rate"], "precision": found["precision"]}
        return alike | precision_recall_density_coverage(real, synthetic)

    whole = figures()
    monkeypatch.setattr(metrics, "LARGEST", 3 * 50)
    assert figures() == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("most_pairs", [2**23, 100])
@pytest.mark.parametrize("repeats", [1, 12])
def test_figures_of_many_halves_are_those_of_each(repeats, most_pairs, monkeypatch):
    """Also where an image is there again and again, and where one set is crowded within the other."""
    monkeypatch.setattr(neighbourhoods, "MOST_PAIRS", most_pairs)
    real, synthetic = features(120, 6, 1).repeat(repeats, 1), features(150, 6, 2, 0.2, 0.1)
    g = torch.Generator().manual_seed(0)
    halves = [[torch.randperm(len(x), generator=g)[: len(x) // 2] for x in (real, synthetic)] for _ in range(6)]
    expected = [precision_recall_density_coverage(real[a], synthetic[b]) for a, b in halves]
    assert neighbourhoods_of_parts(real, synthetic, halves) == expected
    each = [kernel_distance(real[a], synthetic[b]) for a, b in halves]
    assert kernel_distances_of_parts(real, synthetic, halves) == pytest.approx(each)
    few = [[numbers[:20] for numbers in half] for half in halves]  # whose nearest are not among the nearest of all
    expected = [precision_recall_density_coverage(real[a], synthetic[b]) for a, b in few]
    assert neighbourhoods_of_parts(real, synthetic, few) == expected


@pytest.mark.parametrize("count", [2, 3, 4, 5, 7, 12, 40])
def test_pairs_are_numbered_as_torch_has_them(count):
    pairs = torch.combinations(torch.arange(count)).tolist()
    assert [list(pair_of(i, count)) for i in range(len(pairs))] == pairs


def test_the_last_of_very_many_pairs_is_found():
    count = 10**9
    assert pair_of(count * (count - 1) // 2 - 1, count) == (count - 2, count - 1)
    assert pair_of(count - 1, count) == (1, 2)


def test_pairs_of_very_many_images_are_all_different(monkeypatch):
    monkeypatch.setattr(metrics, "MOST_SHUFFLED", 10)
    asked = []
    monkeypatch.setattr(metrics, "multiscale_ssim", lambda a, b: asked.extend(zip(a, b, strict=True)) or torch.ones(1))
    images = torch.arange(30)[:, None]
    ms_ssim_of_pairs(images, ["a"] * 15 + ["b"] * 15, 100, torch.Generator().manual_seed(0))
    pairs = {(int(a), int(b)) for a, b in asked}
    assert len(asked) == len(pairs) == 100 and all(a < b and a // 15 == b // 15 for a, b in pairs)
