"""`minim evaluate`, end to end with the real encoder, on generated images of docs/sheets; some play real ones."""

import csv
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageEnhance, ImageOps

from minim_pipeline import EMBEDDED_ENCODER
from minim_pipeline.cli import main
from minim_pipeline.data.image_loading import load_images
from minim_pipeline.data.mapped_images import map_images
from minim_pipeline.data.sources import read_dataset
from minim_pipeline.evaluation.extractors import load_extractor
from minim_pipeline.evaluation.pictures import collect
from minim_pipeline.evaluation.realism import RealismSettings, realism
from minim_pipeline.evaluation.report import ImageSet
from minim_pipeline.evaluation.report import evaluate as measure
from minim_pipeline.evaluation.two_sample import held_out_scores
from minim_pipeline.files import read_report
from minim_pipeline.mapped import Rows, select


pytest.importorskip("torchmetrics")
pytest.importorskip("matplotlib")
torch.set_num_threads(1)

SHEETS = ROOT / "docs" / "sheets"
NAMES = {"oct": "OCT", "cxr": "CXR"}
FINDINGS = {"oct": ("normal", "diabetic macular edema"), "cxr": ("normal", "COVID-19")}


def cut(modality: str, number: int) -> Image.Image:
    with Image.open(SHEETS / f"{modality}.png") as sheet:
        x, y = number % 8 * 256, number // 8 * 256
        return sheet.convert("RGB").crop((x, y, x + 256, y + 256))


def shifted(image: Image.Image) -> Image.Image:
    return ImageOps.expand(image, (4, 4, 0, 0), fill=0).crop((0, 0, 256, 256))


# What was done to training image i of every modality to plant it among the synthetic ones.
DISGUISES = (shifted, lambda image: ImageEnhance.Brightness(image).enhance(1.12), ImageOps.mirror)


def write(folder: Path, images: dict[str, list[Image.Image]], columns=("finding", "source")) -> Path:
    folder.mkdir(parents=True)
    rows = []
    for modality, mine in images.items():
        for i, image in enumerate(mine):
            finding = FINDINGS[modality][i % 2]
            row = {"path": f"{modality}-{i}.png", "Text": f"{finding}, case {i % 6}", "modality": NAMES[modality]}
            rows.append(row | {name: finding if name == "finding" else "sheet" for name in columns})
            image.save(folder / row["path"])
    with open(folder / "data.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder / "data.csv"


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """CSV files of train (14 images a modality), real (13) and synthetic (10 and 3 copies of training images)."""
    folder = tmp_path_factory.mktemp("sets")
    train, real, synthetic = {}, {}, {}
    for modality in NAMES:
        images = [cut(modality, i) for i in range(40)]
        train[modality], real[modality] = images[:14], images[14:27]
        synthetic[modality] = images[27:37] + [change(images[i]) for i, change in enumerate(DISGUISES)]
    files = {"train": train, "real": real, "synthetic": synthetic}
    return {name: write(folder / name, images) for name, images in files.items()}


def evaluate(sets: dict, folder: Path, *options: str) -> dict:
    arguments = [part for name in sets for part in (f"--{name}", str(sets[name]))]
    assert main(["evaluate", *arguments, "--output-dir", str(folder), *options]) == 0
    return read_report(folder / "report.json")


@pytest.fixture(scope="module")
def report(sets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return evaluate(sets, folder, "--sheet-images", "4"), (folder / "report.html").read_text()


def test_planted_copies_are_named(report):
    for modality in NAMES:
        found = report[0]["modalities"][modality]["memorisation"]["encoder"]
        named = {pair["synthetic"]: pair["train"] for pair in found["copied"]}
        for i in range(len(DISGUISES)):
            assert named.get(f"{modality}-{10 + i}.png") == f"{modality}-{i}.png"
        assert found["copies"] <= 5, "what is no copy is not called one"
    assert report[0]["memorisation"]["encoder"]["n"] == 26
    pixels = report[0]["modalities"]["cxr"]["memorisation"]["pixels"]
    assert pixels["nearest"][0]["distance"] < pixels["limit"]


def test_figures_are_there_with_their_n_and_whose_they_are(report):
    figures, _ = report
    assert figures["extractors"][0]["name"] == "minim-encoder" and len(figures["extractors"][0]["digest"]) == 16
    assert figures["sets"]["train"] == {"file": "data.csv", "split": None, "n": 28}
    oct = figures["modalities"]["oct"]
    near = oct["fidelity"]["minim-encoder"]
    assert near["frechet_distance"]["n"] == near["frechet_floor"]["n"] == 13
    assert near["frechet_distance"]["interval"][0] <= near["frechet_distance"]["value"]
    assert 0 <= near["recall"]["value"] <= 1 and near["coverage"]["n"] == 13
    assert oct["diversity"]["ms_ssim"]["prompts"] == 6 and 0 < oct["diversity"]["ms_ssim"]["value"] < 1
    assert oct["retrieval"]["image_image"]["pool"] == 13 and oct["retrieval"]["image_image"]["chance"] > 0.9
    # Six captions are fewer than the ten that are looked at; there are no judges: left out, and told.
    assert "6 given, at least 11 needed" in oct["retrieval"]["image_text"]["left_out"]
    assert "--judges" in oct["diversity"]["inception_score"]["left_out"]
    assert "--judges" in figures["judges"]["left_out"]


def test_realism_is_a_figure_beside_its_floor(report):
    oct = report[0]["modalities"]["oct"]
    tests = oct["realism"]["two_sample"]["minim-encoder"]
    assert tests["raw"]["n"] == tests["raw_floor"]["n"] == 13 and 0 <= tests["raw"]["value"] <= 1
    assert "give --pipeline or --autoencoder" in tests["decoded"]["left_out"]
    assert 0.5 < oct["realism"]["sharpness"]["value"] < 2
    near = oct["fidelity"]["minim-encoder"]
    times = near["frechet_distance"]["value"] / near["frechet_floor"]["value"]
    assert near["frechet_over_floor"]["value"] == pytest.approx(times, rel=1e-3)
    assert near["frechet_over_floor"]["n"] == 13
    assert "Realism: whether synthetic images can be told from real ones" in report[1]
    assert "curve" not in report[0]


def test_page_stands_alone(report):
    figures, page = report
    assert "oct-12.png" in page and f"{figures['modalities']['cxr']['memorisation']['encoder']['limit']:.3g}" in page
    assert page.count("data:image/webp") == 2 * 4 + 2 * 2 * 6
    without_names = re.sub(r'xmlns[:a-z]*="[^"]*"', "", page)
    assert "http://" not in without_names and "https://" not in without_names


def test_images_on_disk_are_measured_as_those_in_memory(sets, make_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr("minim_pipeline.data.mapped_images.IMAGES_AT_ONCE", 3)
    extractor = load_extractor(EMBEDDED_ENCODER)
    settings = RealismSettings([extractor], make_pipeline().vae.eval())

    def brighter(real: Rows, generated: Rows) -> Callable:
        """Is asked as a network is that learns from the images."""
        sign = 1 if generated[:].float().mean() > real[:].float().mean() else -1
        return lambda items: torch.cat([sign * x.float().mean((1, 2, 3)) for x in items.split(5)])

    def measured(load: Callable) -> tuple:
        known = {}
        for name, file in sets.items():
            rows = [row for row in read_dataset(file) if row["modality"] == "OCT"][:9]
            known[name] = ImageSet(rows, load(name, rows, file, 64))
        order = known["real"], known["synthetic"], known["train"]
        report, copies, _, features = measure(*order, extractor.encoder, [extractor])
        groups = list(range(9)), list(range(9))
        scores = held_out_scores(
            *(select(known[name].images, slice(9)) for name in ("real", "synthetic")), groups, brighter
        )
        shown = str(collect(*order[1:], copies, None, 3))
        return report, realism(known, "oct", features, settings), shown, torch.cat(scores).tolist()

    on_disk = measured(lambda name, *of: map_images(tmp_path / name, *of))
    assert on_disk == measured(lambda _, *of: load_images(*of))


def test_no_path_of_this_machine_is_told(report, sets):
    root = str(sets["real"].parent.parent)
    assert root not in json.dumps(report[0]) and root not in report[1]


def test_sets_that_differ_in_size_colour_and_labels(sets, tmp_path):
    """Both sides are brought to one size, which is said; what needs labels or training images is left out."""
    images = {"oct": [cut("oct", i).resize((300, 200)) for i in range(6)]}
    images["oct"][0] = ImageOps.colorize(images["oct"][0].convert("L"), "black", "orange")
    synthetic = write(tmp_path / "odd", images, columns=())
    synthetic.write_text(synthetic.read_text().replace("normal, case 0", "normal macula " + "without any cyst " * 20))
    report = evaluate({"real": sets["real"], "synthetic": synthetic}, tmp_path / "report", "--no-real-images")
    (told,) = (line for line in report["conversions"] if "captions" in line)
    assert told.startswith(
        "1 of 6 synthetic captions: longer than the encoder reads, such as '<oct> normal macula with"
    )
    assert "6 of 6 synthetic images: resized from 300 x 200 to 256 x 256 px" in report["conversions"]
    assert "1 of 6 synthetic images: OCT is grey: colour taken away" in report["conversions"]
    assert report["modalities_left_out"] == {"cxr": "no synthetic images"}
    oct = report["modalities"]["oct"]
    near = oct["fidelity"]["minim-encoder"]
    assert near["frechet_distance"]["n"] == 6 and near["frechet_distance"]["interval"]
    assert "value" in near["recall"] and "interval" not in near["recall"], "half of six are too few for an interval"
    assert "not every synthetic image has a value in the column 'finding'" in report["labels"]["left_out"]
    assert oct["retrieval"]["image_image"]["left_out"] == report["labels"]["left_out"]
    assert oct["fidelity"]["minim-encoder"]["kernel_floor"]["left_out"] == "it needs other real images: give --train"
    assert report["memorisation"]["left_out"] == "no training images were given"


def test_real_and_synthetic_images_have_ranges_of_their_own(tmp_path):
    """Films of 12 bits beside generated ones of 16: scaled together, the films would be black."""
    files = {}
    for name, gain in (("real", 16), ("synthetic", 256)):
        (tmp_path / name).mkdir()
        for i in range(2):
            grey = np.asarray(cut("oct", i).convert("L")).astype(np.uint16)
            Image.fromarray(grey * gain).save(tmp_path / name / f"{i}.png")
        lines = [f"{i}.png,case {i},OCT" for i in range(2)]
        files[name] = tmp_path / name / "data.csv"
        files[name].write_text("\n".join(["path,Text,modality", *lines]) + "\n")
    told = evaluate(files, tmp_path / "report")["conversions"]
    assert "2 of 2 real images: 12 bits a pixel scaled to 8" in told
    assert "2 of 2 synthetic images: 16 bits a pixel scaled to 8" in told


def test_too_few_images_leave_metrics_out(sets, tmp_path):
    synthetic = write(tmp_path / "few", {"oct": [cut("oct", 30)]})
    report = evaluate({**sets, "synthetic": synthetic}, tmp_path / "report", "--no-real-images")
    oct = report["modalities"]["oct"]
    assert "1 given, at least 2 needed" in oct["fidelity"]["minim-encoder"]["frechet_distance"]["left_out"]
    assert "1 given, at least 6 needed" in oct["fidelity"]["minim-encoder"]["recall"]["left_out"]
    assert oct["retrieval"]["image_image"]["n"] == 1 and oct["memorisation"]["encoder"]["n"] == 1
    page = (tmp_path / "report" / "report.html").read_text()
    assert "at least 2 needed" in page and page.count("data:image/webp") == 2, "no real image is shown"


def test_pipeline_draws_what_is_measured_and_goes_on(sets, pipeline_dir, tmp_path, monkeypatch):
    """From the captions of the real images; the folder's labels are those that the real images have now."""
    folder = sets["real"].parent
    lines = sets["real"].read_text().splitlines()
    few = folder / "few.csv"
    few.write_text("\n".join(lines[:5]) + "\n")
    options = ["--pipeline", str(pipeline_dir), "--num-inference-steps", "1", "--device", "cpu"]
    downstream = ["--downstream", "--train", str(sets["train"]), "--low-data-share", "0.5"]
    report = evaluate({"real": few}, tmp_path / "out", *options, *downstream)
    tests = report["modalities"]["oct"]["realism"]["two_sample"]["minim-encoder"]
    assert "4 and 4 given" in tests["decoded"]["left_out"], "the model's own autoencoder is there"
    assert report["sets"]["synthetic"]["n"] == 4 and report["sets"]["synthetic"]["settings"]["steps"] == "1"
    assert report["downstream"] == {"left_out": "no finding has 20 train and 9 val images"}
    low = (tmp_path / "out" / "low_data.csv").read_text().splitlines()
    assert len(low) == 1 + 4 * 4 and str(tmp_path) not in low[1], "half of four findings' seven images, relative paths"

    monkeypatch.setattr("minim_pipeline.generate.draw.draw", None)  # nothing is drawn again
    few.write_text("\n".join(lines[:4]).replace("diabetic macular edema,sheet", "something else,sheet") + "\n")
    report = evaluate({"real": few}, tmp_path / "out", *options)
    assert report["sets"]["synthetic"]["n"] == 3
    assert report["modalities"]["oct"]["retrieval"]["image_image"].get("left_out") is not None
    other = [*downstream[:-1], "0.2"]
    assert main(["evaluate", "--real", str(few), "--output-dir", str(tmp_path / "out"), *options, *other]) == 2


@pytest.mark.parametrize("off", [False, True])
def test_the_filter_chooses_what_is_measured_unless_it_is_left_out(off, sets, make_pipeline, tmp_path):
    make_pipeline(filtered=True).save_pretrained(tmp_path / "model")
    few = sets["real"].parent / "two.csv"
    few.write_text("\n".join(sets["real"].read_text().splitlines()[:3]) + "\n")
    options = ["--pipeline", str(tmp_path / "model"), "--num-inference-steps", "1", "--device", "cpu"]
    report = evaluate({"real": few}, tmp_path / "out", *options, *["--no-filter"] * off)
    columns = (tmp_path / "out" / "synthetic" / "data.csv").read_text().splitlines()[0].split(",")
    assert ("accepted" in columns) is not off
    assert report["sets"]["synthetic"]["settings"].get("filter") == ("off" if off else None)


def test_images_on_both_sides_are_refused(sets, tmp_path, capsys):
    """By the files themselves, whatever CSV names them: every copy would look new beside them."""
    folder = sets["train"].parent
    (folder / "other.csv").write_text("path,Text,modality\noct-3.png,normal,OCT\n")
    arguments = [
        "--real",
        str(folder / "other.csv"),
        "--train",
        str(sets["train"]),
        "--synthetic",
        str(sets["synthetic"]),
    ]
    assert main(["evaluate", *arguments, "--output-dir", str(tmp_path / "out")]) == 2
    assert "1 images are in --real and in --train, such as oct-3.png" in capsys.readouterr().err


def test_sixteen_bits_are_scaled(tmp_path):
    Image.fromarray(np.array([[0, 3000], [20000, 65535]], dtype=np.uint16)).save(tmp_path / "deep.png")
    changes = Counter()
    image = load_images([{"path": "deep.png", "modality": "CXR"}], tmp_path / "data.csv", 2, changes=changes)
    assert image[0, 0].tolist() == [[0, 12], [78, 255]] and changes["16 bits a pixel scaled to 8"] == 1


BAD = [
    (["--real", "{real}", "--output-dir", "out"], "give either --synthetic"),
    (["--real", "{real}", "--synthetic", "{real}", "--pipeline", "x", "--output-dir", "out"], "give either"),
    (
        ["--real", "{real}", "--train", "{real}", "--synthetic", "{real}", "--output-dir", "out"],
        "in --real and in --train",
    ),
    (["--real", "{real}", "--synthetic", "none.csv", "--output-dir", "out"], "none.csv"),
    (["--real", "{real}", "--synthetic", "{real}", "--no-filter", "--output-dir", "out"], "belongs to --pipeline"),
    (["--real", "{real}", "--synthetic", "{real}", "--resolution", "0", "--output-dir", "out"], "at least 1, got 0"),
    (
        ["--real", "{real}", "--synthetic", "{real}", "--downstream", "--output-dir", "out"],
        "--downstream needs --train",
    ),
    (
        ["--real", "{real}", "--synthetic", "{real}", "--curve-guidance", "1", "--output-dir", "out"],
        "--curve-guidance needs --pipeline",
    ),
    (
        ["--real", "{real}", "--pipeline", "x", "--curve-candidates", "2", "--output-dir", "out"],
        "--curve-candidates needs --curve-guidance",
    ),
    (
        ["--real", "{real}", "--synthetic", "{real}", "--c2st-steps", "-1", "--output-dir", "out"],
        "--c2st-steps has to be at least 0, got -1",
    ),
    (["--real", "{real}", "--synthetic", "{real}", "--encoder", "none", "--output-dir", "out"], "'none' is neither"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_arguments_write_nothing(arguments, message, sets, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    filled = [argument.format(real=sets["real"]) for argument in arguments]
    assert main(["evaluate", *filled]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_sets_of_another_machine_are_read(tmp_path, monkeypatch):
    """Foreign paths and no modality, as MINIM's CSV files have them; the synthetic images name their own."""
    for name in ("real", "train"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), len(name)).save(tmp_path / "images" / name / "0.png")
        (tmp_path / f"{name}.csv").write_text(f"path,Text\n/data2404/{name}/0.png,Drusen, dry\n")
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    (tmp_path / "synthetic.csv").write_text("path,Text,modality\n0.png,effusion,CXR\n")
    read = []

    def stop(real_rows, real, train_rows, train):
        read.extend([*real_rows, *train_rows])
        raise ValueError("far enough")

    monkeypatch.setattr("minim_pipeline.evaluation.command.check_overlap", stop)
    files = [part for name in ("real", "train", "synthetic") for part in (f"--{name}", str(tmp_path / f"{name}.csv"))]
    command = ["evaluate", *files, "--output-dir", str(tmp_path / "out")]
    assert main([*command, "--modality", "Fundus"]) == 2 and not read
    with pytest.warns(UserWarning, match="captions with commas and without quotes"):
        assert main([*command, "--modality", "Fundus", "--image-root", str(tmp_path / "images")]) == 2
    expected = [
        {"path": f"images/{name}/0.png", "Text": "Drusen, dry", "modality": "Fundus"} for name in ("real", "train")
    ]
    assert read == expected
