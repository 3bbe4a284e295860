"""The curve of guidance and candidates: every pair once, whatever their order, from the same captions and seeds."""

import csv

import pytest
import torch
from conftest import FINDINGS, write_csv
from PIL import Image

from minim_pipeline.cli import main
from minim_pipeline.evaluation.classifier import make_resnet
from minim_pipeline.evaluation.judges import Judges
from minim_pipeline.evaluation.page import render
from minim_pipeline.files import read_report


pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
torch.set_num_threads(1)


def write_set(folder, count: int, seed: int):
    """OCT images of noise, of 64 px, the findings in turn."""
    folder.mkdir()
    g = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        image = torch.randint(0, 256, (64, 64), generator=g, dtype=torch.uint8)
        Image.fromarray(image.numpy()).save(folder / f"{i}.png")
        finding = FINDINGS["oct"][i % 2]
        rows.append({"path": f"{i}.png", "Text": finding, "modality": "OCT", "finding": finding})
    return write_csv(folder / "data.csv", rows)


@pytest.fixture(scope="module")
def run(make_pipeline, tmp_path_factory):
    """Runs `minim evaluate` of a tiny pipeline with a filter: `run(*options)` gives the folder, report and page."""
    folder = tmp_path_factory.mktemp("curve")
    make_pipeline(filtered=True).save_pretrained(folder / "model")
    torch.manual_seed(0)
    classes = [("oct", finding) for finding in FINDINGS["oct"]]
    Judges({"resnet": make_resnet(2, 16)}, classes, 32).save_pretrained(folder / "judges")
    real, train = write_set(folder / "real", 8, 0), write_set(folder / "train", 9, 1)
    made: list = []

    def evaluate(*options: str):
        output = folder / f"out-{len(made)}"
        made.append(output)
        arguments = ["--real", str(real), "--train", str(train), "--pipeline", str(folder / "model")]
        arguments += ["--judges", str(folder / "judges"), "--resolution", "64", "--num-inference-steps", "2"]
        arguments += ["--device", "cpu", "--batch-size", "8", "--no-real-images", "--output-dir", str(output)]
        assert main(["evaluate", *arguments, *options]) == 0
        return output, read_report(output / "report.json"), (output / "report.html").read_text()

    return evaluate


@pytest.fixture(scope="module")
def curve(run):
    return run("--curve-guidance", "2", "1", "--curve-candidates", "2", "1", "--extractor", "judges")


def test_every_pair_is_a_point_of_the_report(curve):
    _, report, _ = curve
    points = report["curve"]["points"]
    assert [(p["candidates"], p["guidance"]) for p in points] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    for point in points:
        assert 0 <= point["read"]["value"] <= 1 and point["read"]["n"] == 8
        assert 0 <= point["accepted"]["value"] <= 1 and point["accepted"]["n"] == 8
        assert point["extractors"].keys() == {"minim-encoder", "judge resnet"}
        found = point["extractors"]["minim-encoder"]
        assert found["frechet_over_floor"]["value"] > 0 and found["frechet_over_floor"]["modalities"].keys() == {"oct"}
        assert 0 <= found["recall"]["value"] <= 1
    assert report["curve"]["real"]["value"] == report["judges"]["real"]["balanced_accuracy"]


def test_the_points_have_the_same_captions_and_seeds(curve):
    folders = sorted((curve[0] / "curve").iterdir())
    assert [folder.name for folder in folders] == [f"guidance-{g}-candidates-{c}" for g in (1, 2) for c in (1, 2)]
    asked = set()
    for folder in folders:
        with open(folder / "data.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        asked.add(tuple((row["Text"], row["seed"]) for row in rows))
        assert {row["guidance"] for row in rows} == {f"{float(folder.name.split('-')[1])}"}
        assert {row["candidates"] for row in rows} == {folder.name[-1]}
    assert len(asked) == 1


def test_the_plot_and_its_figures_are_on_the_page(curve):
    page = curve[2]
    section = page[page.index('<section id="curve">') :]
    section = section[: section.index("</section>")]
    assert section.count("<svg") == 2, "one an extractor"
    for words in ("1 candidate<", "2 candidates<", "real images<", "Fréchet distance over its floor", "Accepted"):
        assert words in section


def test_the_order_of_the_options_does_not_matter(run, curve):
    # Fewer points, in another order, and one of them twice.
    _, report, _ = run("--curve-candidates", "1", "--curve-guidance", "1", "2", "1", "--extractor", "judges")
    assert report["curve"]["points"] == [p for p in curve[1]["curve"]["points"] if p["candidates"] == 1]


def test_without_judges_there_is_a_reason_and_no_plot(curve):
    report = curve[1]
    reason = "no classifiers of the finding were given (--judges)"
    points = [point | {"read": {"left_out": reason}} for point in report["curve"]["points"]]
    page = render(report | {"curve": {"real": {"left_out": reason}, "points": points}}, {}, {})
    section = page[page.index('<section id="curve">') :]
    section = section[: section.index("</section>")]
    assert reason in section and "<svg" not in section and "Over floor" in section


def test_what_the_filter_accepts_is_in_the_report_and_on_the_page(curve):
    folder, report, page = curve
    with open(folder / "synthetic" / "data.csv", newline="") as file:
        accepted = [row["accepted"] == "true" for row in csv.DictReader(file)]
    found = report["acceptance"]["modalities"]["oct"]
    assert found["n"] == 8 and found["value"] == report["acceptance"]["value"] == sum(accepted) / 8
    assert {name: share["n"] for name, share in found["findings"].items()} == dict.fromkeys(FINDINGS["oct"], 4)
    section = page[page.index('<section id="acceptance">') :]
    assert "Lowest of a finding" in section and FINDINGS["oct"][0] in section


def test_candidates_need_a_filter(pipeline_dir, tmp_path, capsys):
    real = write_set(tmp_path / "real", 2, 0)
    arguments = ["--real", str(real), "--pipeline", str(pipeline_dir), "--num-inference-steps", "1", "--device", "cpu"]
    options = [*arguments, "--output-dir", str(tmp_path / "out"), "--curve-guidance", "1"]
    assert main(["evaluate", *options, "--curve-candidates", "2"]) == 2
    assert "--curve-candidates 2" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main(["evaluate", *options]) == 0
    report = read_report(tmp_path / "out" / "report.json")
    assert "left_out" in report["acceptance"] and 'id="acceptance"' not in (tmp_path / "out/report.html").read_text()
    (point,) = report["curve"]["points"]
    assert point["accepted"] == {"left_out": "no filter chose among the images"}
    assert "--judges" in point["read"]["left_out"]
