"""From a plan of prompts to images rated by eye: the same images again, and what the score knows of the ratings."""

import csv

import pytest
import torch
from conftest import FINDINGS
from PIL import Image

from minim_pipeline.cli import main as minim
from minim_pipeline.evaluation.classifier import make_resnet
from minim_pipeline.evaluation.judges import Judges
from minim_pipeline.files import read_report


torch.set_num_threads(1)


@pytest.fixture(scope="module")
def drawn(make_pipeline, tmp_path_factory):
    """A folder with a tiny model, its plan of prompts, and what it drew for it; and judges that know one finding."""
    import plan_prompts

    folder = tmp_path_factory.mktemp("anatomy")
    make_pipeline(filtered=True).save_pretrained(folder / "model")
    Judges({"resnet": make_resnet(2, 16)}, [("oct", FINDINGS["oct"][0]), ("oct", "unlearned")], 32).save_pretrained(
        folder / "judges"
    )
    arguments = ["--model", str(folder / "model"), "--judges", str(folder / "judges"), "--images_per_finding", "6"]
    plan_prompts.main([*arguments, "--output", str(folder / "plan.csv"), "--seed", "7"])
    drawing = ["--num-inference-steps", "1", "--device", "cpu", "--batch-size", "8", "--quiet"]
    prompts = ["--prompts-file", str(folder / "plan.csv"), "--model", str(folder / "model")]
    assert minim(["generate", *prompts, "--output-dir", str(folder / "drawn"), *drawing]) == 0
    return folder


def read(path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_plan_has_equally_many_of_what_model_and_judges_know(drawn):
    plan, images = read(drawn / "plan.csv"), read(drawn / "drawn" / "data.csv")
    assert [row["seed"] for row in plan] == [str(7 + i) for i in range(6)]
    assert {row["finding"] for row in plan} == {row["finding"] for row in images} == {FINDINGS["oct"][0]}
    assert [row["Text"] for row in images] == [row["Text"] for row in plan]


def test_sheets_and_figures_of_ratings(drawn, tmp_path):
    import anatomy

    rows = read(drawn / "drawn" / "data.csv")
    images = ["--images", str(drawn / "drawn" / "data.csv")]
    anatomy.main([*images, "--sheets", str(tmp_path / "sheets"), "--columns", "2", "--rows", "2", "--side", "64"])
    sheets = sorted((tmp_path / "sheets").iterdir())
    assert [sheet.name for sheet in sheets] == ["oct-0.png", "oct-1.png"]
    assert Image.open(sheets[0]).size == (128, 128)

    # Whoever rates the two with the lowest scores 1 agrees with the score wholly.
    order = sorted(range(6), key=lambda i: float(rows[i]["score"]))
    for i, row in enumerate(rows):
        row["rating"] = "1" if i in order[:2] else "3"
    ratings = tmp_path / "ratings.csv"
    with open(ratings, "w", newline="") as file:
        writer = csv.DictWriter(file, ["Text", "modality", "seed", "rating"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    report = anatomy.main([*images, "--ratings", str(ratings), "--output", str(tmp_path / "report.json")])
    assert read_report(tmp_path / "report.json")["n"] == report["n"] == 6
    assert report["ratings"] == {"1": 2, "2": 0, "3": 4} and report["rated_1"]["value"] == pytest.approx(
        1 / 3, abs=1e-4
    )
    ties = float(rows[order[1]]["score"]) == float(rows[order[2]]["score"])
    assert report["auroc_of_score"]["value"] == 1 or ties
    accepted = [row for row in rows if row["accepted"] == "true"]
    assert report["accepted"] == len(accepted)

    ratings.write_text(ratings.read_text().replace(",7,", ",8888,"))
    with pytest.raises(ValueError, match="1 ratings are of images that were not drawn, such as .*8888"):
        anatomy.main([*images, "--ratings", str(ratings), "--output", str(tmp_path / "report.json")])


def test_figures_by_hand():
    import anatomy

    rows = [
        {"rating": rating, "accepted": accepted, "score": score}
        for rating, accepted, score in ((1, "true", 2.0), (3, "true", 2.5), (2, "false", 1.5), (3, "true", 2.9))
    ]
    report = anatomy.figures(rows)
    assert report["rated_1_of_accepted"]["value"] == pytest.approx(1 / 3, abs=1e-4)
    assert report["auroc_of_score"]["value"] == pytest.approx(2 / 3, abs=1e-4)
    low, high = report["rated_1_of_accepted"]["interval"]
    assert 0.05 < low < 1 / 3 < high < 0.8
    assert "auroc_of_score" not in anatomy.figures(rows[1:]), "nothing is wrong"
    scored = [row | {"realism": value} for row, value in zip(rows, ("-1.5", "0.1", "0.2", "-0.3"), strict=True)]
    assert anatomy.figures(scored)["auroc_of_realism"]["value"] == 1, "a part that `minim score` has told"


def test_the_report_of_a_model_takes_what_was_drawn(drawn, tmp_path):
    import report_model

    image = Image.effect_noise((64, 64), 50).convert("RGB")
    image.save(drawn / "real.png")
    finding = FINDINGS["oct"][0]
    (drawn / "real.csv").write_text(
        f"path,Text,modality,finding,split\nreal.png,a,OCT,{finding},val\nreal.png,a,OCT,{finding},train\n"
    )
    folders = ["--model", str(drawn / "model"), "--judges", str(drawn / "judges"), "--data", str(drawn / "real.csv")]
    options = ["--drawn", str(drawn / "drawn" / "data.csv"), "--skip_autoencoder", "--skip_memorisation"]
    report = report_model.main([*folders, *options, "--output", str(tmp_path / "r.json"), "--sheets", str(tmp_path)])
    figures = report["generated"]["drawn"]
    assert figures["n"] == 6 and figures["acceptance"]["modalities"]["oct"]["n"] == 6
    assert (tmp_path / "oct.png").is_file()
