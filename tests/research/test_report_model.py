"""The report of a model's figures, end to end on a tiny one, and its parts."""

import csv
import json

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from minim_pipeline.data.image_loading import load_images, trim_letterbox
from minim_pipeline.files import read_report


torch.set_num_threads(1)


def gradient(height: int = 64, width: int = 64) -> np.ndarray:
    """Something like anatomy: no line of it is flat."""
    y, x = np.mgrid[:height, :width]
    return np.stack([60 + 80 * np.sin(x / 7) + 80 * np.cos(y / 5)] * 3, 2).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("axis", [0, 1])
def test_bars_are_cut_and_the_rest_is_square(axis):
    image = np.full((64, 64, 3), 200, np.uint8)
    content = gradient(48, 64) if axis == 0 else gradient(64, 48)
    image[(slice(8, 56), slice(None)) if axis == 0 else (slice(None), slice(8, 56))] = content
    trimmed = trim_letterbox(image)
    assert trimmed.shape == (64, 64, 3) and trimmed.dtype == np.uint8
    assert trim_letterbox(trimmed) is trimmed
    assert (trimmed[0] != trimmed[0, 0]).any() and (trimmed[:, 0] != trimmed[0, 0]).any()


@pytest.mark.parametrize("kind", ["plain", "black", "one side"])
def test_images_without_bars_are_left_alone(kind):
    image = gradient()
    if kind == "black":
        image[:10] = image[-10:] = 0
    if kind == "one side":
        image[:10] = 200
    assert trim_letterbox(image) is image


def test_images_are_read_in_order_trimmed_and_resized(tmp_path):
    boxed = gradient()
    boxed[:10] = boxed[-10:] = 200
    for name, image in (("a.png", boxed), ("b.png", gradient(32, 32))):
        Image.fromarray(image).save(tmp_path / name)
    rows = [{"path": name, "modality": "ChestCT"} for name in ("a.png", "b.png", "a.png")]
    images = load_images(rows, tmp_path / "data.csv", 64)
    assert images.shape == (3, 3, 64, 64) and images.dtype == torch.uint8
    assert torch.equal(images[0], images[2])
    assert torch.equal(
        load_images(rows[:1], tmp_path / "data.csv", 64, trim=False)[0], torch.tensor(boxed).movedim(2, 0)
    )
    assert not torch.equal(images[0], torch.tensor(boxed).movedim(2, 0))
    oct = load_images([{"path": "a.png", "modality": "OCT"}], tmp_path / "data.csv", 64)[0]
    assert torch.equal(oct, torch.tensor(boxed).movedim(2, 0)), "a bright vitreous is no letterbox"


def test_specks_and_letterboxes_are_counted():
    from report_model import checks, specks

    clean = torch.from_numpy(gradient(32, 32)).permute(2, 0, 1)[None]
    flawed = clean.clone()
    flawed[0, :, 10, 10] = 255 - flawed[0, :, 10, 10]
    flawed[0, :, 20, 25] = 255
    assert specks(clean) < specks(flawed) <= specks(clean) + 2 / 1024
    coloured = clean.clone()
    coloured[0, 0, 5, 5] += 1
    assert checks(clean, clean, "oct")["equal_channels"] is True
    assert checks(coloured, clean, "oct")["equal_channels"] is False
    assert checks(coloured, clean, "fundus")["equal_channels"] is None
    boxed = clean.clone()
    boxed[:, :, :5] = boxed[:, :, -5:] = 180
    assert checks(torch.cat([clean, boxed]), clean, "oct")["letterboxes"] == 0.5


def test_sheet_takes_the_findings_in_turn(tmp_path):
    from report_model import save_sheet

    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(-1, 3, 4, 4) * 10
    save_sheet(images, ["a", "a", "a", "b", "b", "b"], tmp_path / "s.png", rows=2, columns=2)
    sheet = np.asarray(Image.open(tmp_path / "s.png"))
    assert sheet[::4, ::4].tolist() == [[0, 30], [10, 40]]


def test_report_end_to_end(make_pipeline, tmp_path):
    import report_model

    from minim_pipeline.evaluation.classifier import ARCHITECTURES
    from minim_pipeline.evaluation.judges import Judges

    # Of fundus photographs there are no real images: they are left out.
    findings = {"oct": ["normal", "diabetic macular edema"], "cxr": ["normal"], "fundus": ["glaucoma"]}
    make_pipeline(findings=findings).save_pretrained(tmp_path / "model")
    classes = [("oct", "normal"), ("oct", "diabetic macular edema"), ("cxr", "normal"), ("cxr", "COVID-19")]
    classes.append(("fundus", "glaucoma"))
    models = {name: make(len(classes), 16) for name, make in ARCHITECTURES.items()}
    Judges(models, classes, 32).save_pretrained(tmp_path / "judges")
    rows = [["path", "Text", "modality", "finding", "split", "source"]]
    for i in range(12):
        image = np.roll(gradient(), 5 * i, 1)
        Image.fromarray(image).save(tmp_path / f"{i}.png")
        modality, finding = classes[i % 3]
        rows.append([f"{i}.png", finding, modality, finding, "train" if i < 6 else "val", "a"])
    with open(tmp_path / "data.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)

    output = tmp_path / "out" / "report.json"
    arguments = ["--images_per_finding", "3", "--batch_size", "4", "--num_inference_steps", "2", "--seed", "5"]
    folders = {"model": "model", "judges": "judges", "data": "data.csv", "sheets": "sheets", "save_images": "images"}
    for name, value in folders.items():
        arguments += [f"--{name}", str(tmp_path / value)]
    arguments += ["--output", str(output)]
    report = report_model.main(arguments)

    assert set(report["generated"]["new"]["modalities"]) == set(report["checks"]) == {"oct", "cxr"}
    assert read_report(output) == json.loads(json.dumps(report))
    assert str(tmp_path) not in output.read_text()
    assert report["generated"]["train"]["n"] == report["generated"]["new"]["n"] == 9
    assert report["generated"]["train"]["modalities"]["oct"]["findings"]["normal"]["n"] == 3
    assert report["checks"]["oct"]["equal_channels"] is True and report["checks"]["oct"]["n"] == 12
    assert report["memorisation"]["latents"]["n"] == report["memorisation"]["pixels"]["n"] == 18
    assert report["judges_on_val"]["n"] == 6 and {"psnr", "energy_oct"} <= set(report["autoencoder"])
    assert sorted(p.name for p in (tmp_path / "sheets").iterdir()) == ["cxr.png", "oct.png", "overview.png"]

    # What was generated is there to be used again, and is not taken for something else.
    again = report_model.main([*arguments, "--skip_autoencoder", "--skip_memorisation"])
    for phrasing in ("train", "new"):
        assert again["generated"][phrasing]["modalities"] == report["generated"][phrasing]["modalities"]
    (tmp_path / "other.csv").write_text("path,Text,modality,finding,split\n0.png,x,BrainMRI,glioma,val\n")
    with pytest.raises(ValueError, match="other.csv has no val images of what .* has learned: cxr, fundus, oct"):
        report_model.main([*arguments, "--data", str(tmp_path / "other.csv")])
    with pytest.raises(ValueError, match="other settings"):
        report_model.main([*arguments, "--guidance_scale", "4"])
    make_pipeline(findings=findings, guidance_rescale=0.4).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="other settings"):  # another model at the same place
        report_model.main([*arguments, "--guidance_rescale", "0.5"])


def test_images_are_the_same_in_any_batch(shared_pipeline):
    import report_model

    from minim_pipeline.evaluation.sampling import plan

    settings = {"num_inference_steps": 2}
    captions = {"oct": {"normal": {"train": ["fine", "all well"]}}}
    planned = plan([("oct", "normal"), ("oct", "unlearned")], {"oct": ["normal"]}, captions, "train", 3, 0)
    assert [(p["prompt"], p["seed"]) for p in planned] == [("fine", 0), ("all well", 1), ("fine", 2)]
    with pytest.raises(ValueError, match="no 'test' phrasings of 'normal' of 'oct'"):
        plan([("oct", "normal")], {"oct": ["normal"]}, captions, "test", 3, 0)
    together = report_model.generate(shared_pipeline, planned, 3, settings)
    apart = report_model.generate(shared_pipeline, planned, 2, settings)
    assert (together.int() - apart.int()).abs().max() <= 1


def test_benchmark_of_sampling_runs(pipeline_dir, capsys):
    import importlib.util

    path = ROOT / "bench" / "bench_sampling.py"
    spec = importlib.util.spec_from_file_location("bench_sampling", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    arguments = ["--model", str(pipeline_dir), "--batch_size", "2", "--num_inference_steps", "1", "--repeats", "1"]
    result = module.main([*arguments, "--no_compile"])
    assert result["eager_images_per_second"] > 0
    assert json.loads(capsys.readouterr().out) == result
    with pytest.raises(ValueError, match="has no filter head"):
        module.main([*arguments, "--filter"])
