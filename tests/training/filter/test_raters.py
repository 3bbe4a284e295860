"""Raters: their biases, how far they agree, and what a CSV of ratings has to be."""

import csv

import pytest
import torch
from PIL import Image

from minim_pipeline import FilterHead
from minim_pipeline.evaluation.agreement import rater_agreement, weighted_kappa
from minim_pipeline.training.filter.raters import Raters, learned_from, raters_report, read_ratings


torch.set_num_threads(1)


def test_kappa_is_that_of_the_textbook():
    a, b = [1, 1, 2, 2, 3, 3, 3, 1], [1, 2, 2, 3, 3, 3, 2, 1]
    # By hand: squared differences 3 of 8; by chance, from the margins, 90 of 64.
    chance = sum((x - y) ** 2 for x in a for y in b) / 64
    assert weighted_kappa(a, b) == pytest.approx(1 - (3 / 8) / chance, abs=1e-4)
    assert weighted_kappa([1, 2, 3], [1, 2, 3]) == 1.0 and weighted_kappa([1, 3], [3, 1]) == -1.0
    assert weighted_kappa([2], [2]) is None and weighted_kappa([2, 2], [2, 2]) is None
    with pytest.raises(ValueError, match="got 2 and 1"):
        weighted_kappa([1, 2], [1])


def test_agreement_is_over_images_that_both_have_rated():
    ratings = {"ann": {"x": 1, "y": 3, "z": 2}, "bob": {"x": 1, "y": 3}, "cy": {"w": 3}}
    rows = [{"path": p, "rater": r, "rating": str(v)} for r, given in ratings.items() for p, v in given.items()]
    assert rater_agreement(rows) == {"pairs": [{"raters": ["ann", "bob"], "kappa": 1.0, "n": 2}], "mean": 1.0}


def learn(raters: Raters, latents, grades, rater) -> FilterHead:
    torch.manual_seed(0)
    head = FilterHead(
        in_channels=1, sample_size=8, vocab_size=4, block_out_channels=(8, 8), layers_per_block=1, text_width=8,
        feature_size=8, norm_num_groups=2, dropout=0.0, code_size=8,
    )  # fmt: skip
    groups = [{"params": head.parameters(), "lr": 0.02}, {"params": raters.parameters(), "lr": 0.05}]
    optimizer, text = torch.optim.Adam(groups), torch.zeros(1, 8)
    for _ in range(150):
        out = head(latents, latents, torch.zeros(len(latents)), text=text, quality_bias=raters(rater))
        likelihood = out.quality_probs.gather(1, grades[:, None] - 1).clamp(min=1e-6).log().mean()
        (raters.penalty(len(grades)) - likelihood).backward()
        optimizer.step()
        optimizer.zero_grad()
    return head.eval()


def test_a_strict_rater_gets_a_bias_and_the_head_speaks_for_the_average():
    g = torch.Generator().manual_seed(0)
    truth = torch.arange(1, 4).repeat(8)
    latents = truth[:, None, None, None] - 2 + 0.05 * torch.randn(24, 1, 8, 8, generator=g)
    # "strict" gives one less, and has rated every image four times.
    x = torch.cat([latents] * 5)
    grades = torch.cat([truth] + [(truth - 1).clamp(min=1)] * 4)
    names = ["fair"] * 24 + ["strict"] * 96
    raters = Raters(names)
    head = learn(raters, x, grades, raters.index(names))
    fair, strict = raters.bias.tolist()
    assert strict < -0.3 and fair == pytest.approx(-strict, abs=1e-5)

    alone = Raters(["one"])
    without = learn(alone, x, grades, torch.zeros(120, dtype=torch.long))
    assert alone.bias.item() == 0, "where all are one rater nothing changes"
    rated = [
        h(latents, latents, torch.zeros(24), text=torch.zeros(1, 8)).quality[truth > 1].mean() for h in (head, without)
    ]
    assert rated[0] > rated[1] + 0.1, "many ratings of a strict rater do not pull it down"

    rows = [
        {"path": str(i % 24), "rater": n, "rating": str(v)} for i, (n, v) in enumerate(zip(names, grades.tolist()))
    ]
    report = raters_report(rows, raters, guesses=torch.cat([truth] * 5).float())
    assert report["raters"]["strict"] == {"bias": round(strict, 4), "n": 96}
    assert report["agreement"]["head"]["fair"] == {"kappa": 1.0, "n": 24}
    assert 0 < report["agreement"]["head"]["strict"]["kappa"] < 1
    assert report["agreement"]["between_raters"]["pairs"][0]["n"] == 24


def write(path, header, *rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def test_every_bad_rating_is_told_with_its_row(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    header = ["path", "Text", "modality", "rating"]
    bad = [["a.png", "x", "OCT", "4"], ["a.png", "x", "Ultrasonic", "2"], ["gone.png", "x", "OCT", "2"]]
    with pytest.raises(ValueError) as told:
        read_ratings(write(tmp_path / "bad.csv", header, ["a.png", "x", "OCT", "3"], *bad))
    for part in ("row 2", "1, 2 or 3, got '4'", "row 3", "Ultrasonic", "row 4", "gone.png"):
        assert part in str(told.value)
    header, row = [*header, "group"], ["a.png", "x", "OCT", "3"]
    with pytest.raises(ValueError, match="row 2.*is in group 'two', and in 'one' above"):
        read_ratings(write(tmp_path / "groups.csv", header, [*row, "one"], [*row, "two"]))


def test_a_csv_of_a_rating_page_needs_neither_part_nor_group(tmp_path):
    for name in "ab":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    header = ["path", "Text", "modality", "rating", "rater"]
    rows = [["a.png", "x", "OCT", "3", "ann"], ["a.png", "x", "OCT", "2", "bob"], ["b.png", "x", "OCT", "1", ""]]
    read = read_ratings(write(tmp_path / "ratings.csv", header, *rows))
    assert [row["rater"] for row in read] == ["ann", "bob", ""]
    assert read[0]["group"] == read[1]["group"] != read[2]["group"], "ratings of one image share a fold"
    assert all(learned_from(row, "A") for row in read), "ratings without parts are taken"
    assert not learned_from({"part": "B", "split": "train"}, "A") and learned_from({"part": "B"}, "all")
    assert not learned_from({"part": "", "split": "val"}, "A"), "what is validated on is not learned from"
