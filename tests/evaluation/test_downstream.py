"""Classifiers trained with synthetic images: useful ones help, useless ones do not, and a run goes on where it was."""

import numpy as np
import pytest
import torch
from accelerate import PartialState

from minim_pipeline.evaluation.classifier import Recipe
from minim_pipeline.evaluation.downstream import Design, Score, downstream, drawn_by, take_share, taken_from


torch.set_num_threads(1)

RECIPE = Recipe(max_train_steps=30, train_batch_size=16, learning_rate=3e-3, ema_decay=0.8, resolution=32, mix=0.0)
FINDINGS = ("normal", "diabetic macular edema")


def stripes(rows: list[dict], seed: int) -> torch.Tensor:
    """Stripes that lie for one finding and stand for the other: uint8 [N, 3, 32, 32]."""
    generator, images = torch.Generator().manual_seed(seed), []
    for row in rows:
        phase, period = torch.rand(2, generator=generator).tolist()
        wave = (torch.arange(32) / (1 + period) + 6 * phase).sin().expand(32, 32)
        grey = (wave if row["finding"] == "normal" else wave.T) * 100 + 128
        images.append(grey.to(torch.uint8).expand(3, 32, 32))
    return torch.stack(images)


def make_rows(count: int) -> list[dict]:
    return [{"modality": "OCT", "Text": FINDINGS[i % 2], "finding": FINDINGS[i % 2]} for i in range(count)]


def run(folder, synthetic: torch.Tensor, synthetic_rows: list[dict], **arguments):
    rows, val_rows = make_rows(40), make_rows(20)
    defaults = dict(seeds=(0,), percents=(100, 500), width=8, min_train=5, min_val=5)
    return downstream(
        (rows, stripes(rows, 0)),
        (val_rows, stripes(val_rows, 1)),
        take_share(rows, 0.1),
        {"data_sharing": taken_from(synthetic, synthetic_rows)},
        folder,
        PartialState(cpu=True),
        Design(recipe=RECIPE, **{**defaults, **arguments}),
    )


def test_good_images_score_as_real_ones_and_wrong_ones_do_not(tmp_path):
    rows = make_rows(40)
    good = run(tmp_path / "good", stripes(rows, 2), rows)
    assert good["real"]["accuracy"] >= 0.9 and good["real"]["n_train"] == 40
    assert good["cas_ratio"]["value"] >= 0.9 and good["synthetic"]["modalities"]["oct"]["accuracy"] >= 0.9
    sharing = good["low_data"]["data_sharing"]
    assert sharing["real"]["n_train"] == 4 and good["settings"]["share_of_real_images"] == 0.1
    assert [(p["percent"], p["n_train"]) for p in sharing["points"]] == [(100, 8), (500, 24)]
    assert sharing["gain_at"] == 500 and sharing["gain"] == sharing["points"][1]["gain"]
    low, high = sharing["gain"]["interval"]
    assert low <= sharing["gain"]["value"] <= high

    wrong = run(tmp_path / "wrong", stripes(rows[1:] + rows[:1], 2), rows)
    assert wrong["cas_ratio"]["value"] <= 0.5, "findings are exchanged in what it learns from"
    assert wrong["real"] == good["real"]


def test_a_run_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    rows = make_rows(40)
    first = run(tmp_path, stripes(rows, 2), rows)
    monkeypatch.setattr("minim_pipeline.evaluation.downstream.train_classifier", None)  # nothing is trained again
    assert run(tmp_path, stripes(rows, 2), rows) == first
    with pytest.raises(ValueError, match="made with other settings"):
        run(tmp_path, stripes(rows, 3), rows)


def test_too_few_synthetic_images_are_told(tmp_path):
    rows = make_rows(8)
    report = run(tmp_path, stripes(rows, 2), rows)
    assert "4 synthetic images of oct: " in report["synthetic"]["left_out"]
    assert report["cas_ratio"] == report["synthetic"]
    at = {point["percent"]: point for point in report["low_data"]["data_sharing"]["points"]}
    assert at[100]["n_train"] == 8 and "more are needed for 500 %" in at[500]["left_out"]
    report = run(tmp_path, stripes(rows, 2), rows, min_train=50)
    assert report == {"left_out": "no finding has 50 train and 5 val images"}


def test_share_is_taken_of_every_finding():
    rows = make_rows(60) + [{"modality": "CXR", "Text": "normal", "finding": "normal"}]
    share = take_share(rows, 0.1)
    assert [row["finding"] for row in share].count("normal") == 4 and len(share) == 7
    assert share == take_share(rows, 0.1) != take_share(rows, 0.1, seed=1)


def test_pipeline_draws_each_row_as_often_as_asked(shared_pipeline, tmp_path):
    rows = make_rows(3)
    settings = {"num_inference_steps": 1, "guidance_scale": 1.0}
    draw = drawn_by(shared_pipeline, PartialState(cpu=True), tmp_path, 32, 4, "tiny", **settings)
    images = draw(rows, 2)
    assert images.shape == (6, 3, 32, 32) and images.dtype == torch.uint8
    assert not torch.equal(images[0], images[3]), "another seed"
    again = shared_pipeline(["normal"], modality="oct", seeds=[0], output_type="pt", **settings).images
    again = torch.nn.functional.interpolate(again, size=(32, 32), mode="bicubic", antialias=True).clamp(0, 1)
    assert (again[0] * 255 - images[0]).abs().max() <= 1
    assert torch.equal(draw(rows, 2), images)


def test_comparison_is_paired():
    """Intervals of a difference do not hold the spread that both conditions share."""
    generator = np.random.default_rng(0)
    right = generator.random((2, 400)) < 0.5
    findings = ["a"] * 200 + ["b"] * 200
    one, other = (Score(values, [("oct", finding) for finding in findings], 1) for values in (right, right.copy()))
    assert np.ptp(one.total(200)) > 0.05 and not np.any(one.total(200) - other.total(200))
    assert one.total()[0] == pytest.approx(right.mean())
