"""What the comparison of the filter counts."""

import json

import evaluate_filter
import numpy as np
import pytest
import torch
from conftest import write_csv
from evaluate_filter import agreement_with_people, choices
from PIL import Image

from minim_pipeline import FilterHead
from minim_pipeline.evaluation.classifier import make_resnet
from minim_pipeline.evaluation.comparison import right_findings
from minim_pipeline.evaluation.judges import Judges, compare_wrong, removed
from minim_pipeline.training.filter.candidates import Candidates


CLASSES = [("oct", "cyst"), ("oct", "normal"), ("cxr", "normal")]


def test_wrong_is_what_judges_read_as_another_finding_of_the_modality():
    planned = [{"modality": "oct", "finding": "cyst"}] * 3
    said = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.3, 0.5], [0.3, 0.1, 0.6]])
    wrong = ~right_findings(said, CLASSES, planned)
    assert wrong.tolist() == [False, True, False], "another modality does not matter"


def test_removed_counts_what_was_made_wrong_too():
    off = torch.tensor([True] * 40 + [False] * 160)
    on = torch.tensor([True] * 10 + [False] * 180 + [True] * 10)
    assert removed(off, on) == pytest.approx(0.5)
    figures = compare_wrong(off, on)
    low, high = figures["interval"]
    assert figures["wrong"] == 0.1 and low < 0.5 < high and low > 0
    few = torch.tensor([True] * 3 + [False] * 7)
    assert compare_wrong(few, ~few)["interval"] is None and compare_wrong(few & ~few, few)["removed"] is None


def test_every_way_chooses_by_its_own_measure_and_says_what_it_costs():
    head = FilterHead(stages=((5.0, 0.0),), enough=(2.0, 2.9), guidance_weight=0.0)
    # One image, four candidates, two steps and the end; the third is best at the end, the second on the way.
    finding = torch.tensor([[1.0, 1.0, 1.0], [2.9, 2.0, 2.0], [2.0, 2.5, 2.95], [2.0, 2.5, 2.99]])
    guidance = torch.tensor([[0.1, 0.0], [0.2, 0.0], [0.3, 0.0], [0.9, 0.0]])
    empty = torch.empty(0)
    drawn = Candidates(torch.full((4, 3), 3.0), finding, guidance, torch.tensor([4.0, 1.0, 0.0]), empty, empty)
    made = choices(drawn, torch.ones(4, dtype=torch.bool), head, 4)
    chosen = {name: way["index"].item() for name, way in made.items()}
    assert chosen == {
        "off": 0,
        "filter": 1,
        "filter_at_the_end": 2,
        "best_rated": 1,
        "best_rated_at_the_end": 3,
        "cfg_rejection_high": 3,
        "cfg_rejection_low": 0,
    }
    assert made["off"]["samples"] == 3 and made["filter"]["samples"] == 9, "four guided ones, then one without"
    only_last = torch.tensor([True, False, False, False])
    assert choices(drawn, only_last, head, 4)["filter_at_the_end"]["index"].item() == 0, "accepted ones go first"


def test_the_head_is_compared_with_grades_it_has_not_learned_from(make_pipeline, monkeypatch):
    pipe, seen = make_pipeline(filtered=True), []
    grades = [1, 2, 3, 3, 1]
    rows = [{"rating": str(grade), "source": "eyes"} for grade in grades]
    quality = torch.tensor(grades) * 0.9
    monkeypatch.setattr(evaluate_filter, "rate", lambda head, latents: (seen.append(latents), quality)[1])
    report = agreement_with_people(pipe, rows, torch.zeros(5, 3, 64, 64, dtype=torch.uint8))
    assert seen[0].shape[0] == 5 and seen[0].shape[-2:] == (8, 8), "what is rated is latents"
    assert report["n"] == 5 and report["kappa"] == 1.0
    assert report["auroc"]["eyes"] == {"n": 5, "3_against_1_and_2": 1.0, "3_against_2": 1.0}


@pytest.mark.slow
def test_a_model_is_evaluated_from_candidates_to_report(make_pipeline, tmp_path):
    classes = [("oct", "cyst"), ("oct", "normal"), ("cxr", "effusion"), ("cxr", "normal")]
    findings = {"oct": ["cyst", "normal"], "cxr": ["effusion", "normal"]}
    make_pipeline(filtered=True, findings=findings, num_inference_steps=2).save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    Judges({"cnn": make_resnet(4, 8)}, classes, 32).save_pretrained(tmp_path / "judges")
    phrasings = {m: {f: {"train": [f, f"{f} seen"]} for f in some} for m, some in findings.items()}
    (tmp_path / "captions.json").write_text(json.dumps(phrasings))
    rows, generator = [], torch.Generator().manual_seed(0)
    for i in range(24):
        image = (torch.rand(64, 64, 3, generator=generator) * 255).byte().numpy()
        Image.fromarray(image).save(tmp_path / f"{i}.png")
        modality, finding = classes[i % 4]
        rows.append(dict(path=f"{i}.png", Text=finding, modality=modality, finding=finding, split="val"))
    write_csv(tmp_path / "data.csv", rows)
    write_csv(
        tmp_path / "ratings.csv",
        [row | {"rating": 1 + i % 3, "split": "train", "part": "B"} for i, row in enumerate(rows)],
    )
    names = ("model", "judges", "captions.json", "data.csv", "ratings.csv")
    call = [part for name in names for part in (f"--{name.split('.')[0]}", str(tmp_path / name))]
    sizes = "--images_per_finding 4 --candidates 2 --pairs 4 --batch_size 8"
    report = evaluate_filter.main([*call, *sizes.split(), "--output_dir", str(tmp_path / "out")])
    assert report["n"] == 16 and set(report["ways"]["filter"]["modalities"]) == {"oct", "cxr"}
    assert report["ways"]["off"]["cost"] == 1 and report["people"]["n"] == 24
    assert report["rejected"]["noise"]["n"] == 24 and report["candidates_read_as_wrong"]["n"] > 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["arguments"]["seed"] == 0
    with np.load(tmp_path / "out" / "candidates.npz") as stored:
        assert stored["wrong"].shape == (32,) and stored["chosen"].shape == (16,)
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        assert sheet.width == 12 * 128
