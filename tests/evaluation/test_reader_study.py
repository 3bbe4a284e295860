"""The statistics of studies against values known by hand, and of simulated readers."""

import numpy as np
import pytest

from minim_pipeline.evaluation.agreement import quadratic_kappa
from minim_pipeline.evaluation.reader_study import (
    counts_auroc,
    krippendorff_alpha,
    share,
    study_results,
)
from minim_pipeline.ratings import Rating


def test_alpha_is_that_of_krippendorffs_own_example():
    # Krippendorff (2011), Computing Krippendorff's Alpha-Reliability, C: four observers, twelve units; ordinal: .815.
    observers = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, 0, 0, 0],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, 0, 3],
        [0, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, 0],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, 0],
    ]
    counts = np.array([[column.count(level) for level in range(1, 6)] for column in map(list, zip(*observers))])
    assert krippendorff_alpha(counts) == pytest.approx(0.815, abs=5e-4)
    assert krippendorff_alpha(counts, np.ones((2, 12))) == pytest.approx([0.815] * 2, abs=5e-4)


def test_alpha_of_full_agreement_is_one_and_of_one_answer_unknown():
    assert krippendorff_alpha(np.array([[2, 0, 0], [0, 2, 0], [0, 0, 3]])) == 1
    assert np.isnan(krippendorff_alpha(np.array([[2, 0, 0], [3, 0, 0]])))
    assert np.isnan(krippendorff_alpha(np.array([[1, 0, 0], [0, 1, 0]]))), "no image has two answers"


def test_kappa_by_hand():
    # Distances 0, 1, 4: seen 2 * 1 of 10; by chance (rows 4, 3, 3; columns 4, 3, 3) 2 * (4*3*1 + 4*3*4 + 3*3*1) / 10.
    confusion = np.array([[3, 1, 0], [1, 2, 0], [0, 0, 3]])
    assert quadratic_kappa(confusion) == pytest.approx(1 - 2 / (2 * 69 / 10))
    assert quadratic_kappa(np.eye(3)) == 1 and np.isnan(quadratic_kappa(np.diag([5, 0, 0])))


def test_auroc_of_people_by_hand():
    # Real: 3, 3, 2; synthetic: 1, 2: of six pairs five are won and one is even.
    assert counts_auroc(np.array([1, 1, 0]), np.array([0, 1, 2])) == pytest.approx(5.5 / 6)
    assert counts_auroc(np.array([2, 2, 2]), np.array([1, 1, 1])) == 0.5


def test_a_share_has_wilsons_interval():
    assert share(8, 10) == {"value": 0.8, "interval": [0.4902, 0.9433], "n": 10}
    assert share(10, 10)["interval"] == [0.7225, 1.0] and share(0, 0)["value"] is None


def simulate(n: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Answers of three readers, [3, n], to images of which half are real [n], and their bias and noise."""
    g = np.random.default_rng(seed)
    real = np.arange(n) % 2 == 0
    seen = g.normal(size=n) + 0.8 * real
    told = [seen + bias + noise * g.normal(size=n) for bias, noise in ((0, 0.3), (0.5, 0.6), (-0.4, 1.0))]
    return 1 + np.digitize(told, (-0.3, 0.9)), real


def ratings_of(answers: np.ndarray, real: np.ndarray) -> list[Rating]:
    found = []
    for reader, given in enumerate(answers):
        for i, (answer, is_real) in enumerate(zip(given.tolist(), real)):
            about = {"text": "cyst", "modality": "oct" if i % 4 < 2 else "cxr", "time": "2026"}
            kind = "real" if is_real else "generated"
            found.append(Rating(f"reader {reader}", f"{i}.png", answer, **about, kind=kind, question="realism"))
    return found


def test_of_three_simulated_readers_the_true_values_lie_in_their_intervals():
    many, kinds = simulate(200_000)
    levels = np.eye(3)[many - 1]  # [3, n, levels]
    truth = {
        "alpha": krippendorff_alpha(levels.sum(0)),
        "kappa": np.mean([quadratic_kappa(levels[a].T @ levels[b]) for a, b in ((0, 1), (0, 2), (1, 2))]),
        "auroc": np.mean([counts_auroc(one[~kinds].sum(0), one[kinds].sum(0)) for one in levels]),
    }
    results = study_results(ratings_of(*simulate(200, seed=3)))
    assert set(results["modalities"]) == {"oct", "cxr"} and results["modalities"]["oct"]["images"] == 100
    for figures in (results["all"], *results["modalities"].values()):
        for name, value in truth.items():
            low, high = figures[name]["interval"]
            assert low < value < high and high - low < 0.4, name
    hit = 0
    for seed in range(20):  # and nearly as often as promised
        low, high = study_results(ratings_of(*simulate(120, seed=100 + seed)))["all"]["alpha"]["interval"]
        hit += low < truth["alpha"] < high
    assert hit >= 17


def test_the_first_answer_counts_and_repeats_tell_consistency():
    common = {"text": "cyst", "modality": "oct"}
    told = [Rating("ann", f"{i}.png", 1 + i % 3, **common) for i in range(6)]
    told += [Rating("bob", f"{i}.png", 1 + i % 3, **common) for i in range(6)]
    told += [Rating("ann", "0.png", 1, turn=1, **common), Rating("ann", "1.png", 3, turn=1, **common)]
    told += [Rating("bob", "7.png", 0, **common)]
    results = study_results(told)
    every = results["all"]
    assert every["kappa"]["value"] == every["alpha"]["value"] == 1 and every["kappa"]["n"] == 6
    assert every["consistency"] == share(1, 2) and every["raters"]["bob"]["consistency"]["value"] is None
    assert every["auroc"]["value"] is None, "no real images"
    assert results["cannot_judge"] == 1 and every["images"] == 6


def test_a_study_without_answers_has_no_figures():
    assert study_results([])["all"]["alpha"]["value"] is None
