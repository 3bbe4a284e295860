"""The filter's report is what its three scripts wrote, and its pooled figures those of all slots."""

import json

import gather_filter
import numpy as np
import pytest

from minim_pipeline.files import write_report


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_report(path, content)
    return str(path)


def comparison(folder, seed, wrong, chosen, model="/home/ann/model"):
    """An output folder of evaluate_filter.py; of `wrong` a row for each slot, a column for each candidate."""
    arguments = {"seed": seed, "model": model, "pairs": 4, "output_dir": str(folder)}
    write(folder / "report.json", {"arguments": arguments, "n": len(wrong), "people": {"kappa": 0.8}})
    np.savez(folder / "candidates.npz", wrong=np.array(wrong).flatten(), **chosen)
    return str(folder)


@pytest.fixture
def call(tmp_path):
    arguments = {"seed": 0, "train_data": "/home/ann/data.csv"}
    made = {
        "training": write(tmp_path / "a.json", {"arguments": arguments, "steps": 3}),
        "calibration": write(tmp_path / "b.json", {"arguments": {"part": "C"}, "stages": [[14.0, 0.5]]}),
        "output": write(tmp_path / "docs" / "report.json", {gather_filter.SETTLED: [{"seed": 0, "note": "kept"}]}),
    }
    # Four slots of two candidates: three wrong first ones, of which the choice leaves one.
    first = comparison(tmp_path / "first", 1, [[True, False], [True, False]], {"chosen": [1, 1]})
    second = comparison(tmp_path / "second", 2, [[True, True], [False, True]], {"chosen": [0, 0]})
    return [part for name, path in made.items() for part in (f"--{name}", path)], first, second


def test_the_report_has_all_parts_and_no_path_of_the_machine(call, tmp_path):
    arguments, first, second = call
    gather_filter.main([*arguments, "--comparisons", first, second])
    text = (tmp_path / "docs" / "report.json").read_text()
    report = json.loads(text)
    assert "/home" not in text
    assert report["training"]["steps"] == 3 and report["calibration"]["arguments"] == {"part": "C"}
    assert [c["seed"] for c in report["comparisons"]] == [1, 2]
    assert report["comparisons"][0]["arguments"] == {"pairs": 4} and report["people"] == {"kappa": 0.8}
    assert report[gather_filter.SETTLED] == [{"seed": 0, "note": "kept"}]
    pooled = report["fresh_comparisons_pooled"]
    assert (pooled["n"], pooled["wrong_without"], pooled["wrong"]) == (4, 0.75, 0.25)
    assert pooled["removed"] == pytest.approx(2 / 3, abs=1e-4), "two of three"
    assert pooled["against_mean_candidate"] == pytest.approx(1 - 0.25 / 0.625)


def test_comparisons_that_do_not_go_together_are_told(call, tmp_path):
    arguments, first, _ = call
    before = (tmp_path / "docs" / "report.json").read_text()
    chosen = {"chosen": [0]}
    settled = comparison(tmp_path / "settled", 0, [[True, False]], chosen)
    other = comparison(tmp_path / "other", 3, [[True, False]], chosen, model="/home/ann/better")
    old = comparison(tmp_path / "old", 4, [[True, False]], {})
    for folder, told in (
        (first, r"seeds of their own, not \[1, 1\]"),
        (settled, r"not \[1, 0\]; rules were settled on \[0\]"),
        (other, "model is '/home/ann/model' and '/home/ann/better'"),
        (old, "old was written before evaluate_filter.py kept its choices"),
        (str(tmp_path / "nowhere"), "There is no .*nowhere/report.json, no .*candidates.npz"),
    ):
        with pytest.raises(ValueError, match=told):
            gather_filter.main([*arguments, "--comparisons", first, folder])
    with pytest.raises(ValueError, match="--comparisons has to be two folders, got"):
        gather_filter.main([*arguments, "--comparisons", first])
    assert (tmp_path / "docs" / "report.json").read_text() == before, "nothing is lost"
