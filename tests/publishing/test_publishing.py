"""What a card must say, and what must not be uploaded."""

import os

import pytest
import torch
from conftest import ROOT
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

from minim_pipeline import EMBEDDED_CHECKPOINT
from minim_pipeline.files import write_report
from minim_pipeline.provenance import save_png
from minim_pipeline.publishing import SPACE_FILES, check_folder
from minim_pipeline.publishing.card import NO_FILTER, Sample, complete, read_card, write_card
from minim_pipeline.publishing.reports import SHOWN, gather_reports, read_sections
from minim_pipeline.publishing.staging import save_half


@pytest.fixture
def folder(tmp_path):
    """A folder in which nothing is amiss."""
    staged = tmp_path / "staged"
    (staged / "unet").mkdir(parents=True)
    (staged / "samples").mkdir()
    (staged / "model_index.json").write_text('{"_class_name": "MinimPipeline"}')
    (staged / "README.md").write_text("See https://example.org/home/ann and [docs](docs/data/x.md), 1/2, and/or.")
    save_file({"w": torch.zeros(2)}, staged / "unet" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    save_png(Image.new("RGB", (8, 8)), staged / "samples" / "oct-0.png", {"prompt": "edema"})
    check_folder(staged)
    return staged


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("unet/diffusion_pytorch_model.bin", b"x", "is a pickle"),
        ("vae/x.ckpt", b"x", "is a pickle"),
        ("optimizer.safetensors", b"x", "is a state of training"),
        ("unet/random_states_0.json", b"{}", "is a state of training"),
        ("log.jsonl", b"{}", "is a state of training"),
        ("notes.txt", b"x", "has no place"),
        ("train/data.csv", b"x", "has no place"),
        (".env", b"HF_TOKEN=x", "has no place"),
        ("unet/config.json", b'{"_name_or_path": "/home/ann/runs/unet"}', "names '/home/ann/runs/unet'"),
        ("README.md", b"made on C:\\Users\\ann\\runs", r"names 'C:\\\\Users\\\\'"),
        ("README.md", b"see file:///mnt/x", "names 'file:///m'"),
        ("report.json", b'{"data": "/mnt/scans/data.csv"}', "names '/mnt/scans/data.csv'"),
        ("evaluation/report.html", b'<img src="x" alt="training image 12.png">', "shows real images"),
        ("unet/x.safetensors", b"x", "is no safetensors file"),
    ],
)
def test_what_must_not_be_uploaded_is_named(folder, name, content, told):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"Nothing was uploaded.*{name} {told}"):
        check_folder(folder)


def test_pictures_and_weights_are_looked_into(folder, tmp_path):
    Image.new("RGB", (8, 8)).save(folder / "samples" / "patient.png")
    save_file({"w": torch.zeros(2)}, folder / "unet" / "x.safetensors", {"from": "/home/ann/runs"})
    os.symlink("/etc/hostname", folder / "report.json")
    with pytest.raises(ValueError) as refused:
        check_folder(folder)
    for told in (
        "3 problems",
        "report.json is a link",
        "patient.png does not say that it is synthetic",
        "x.safetensors names '/home/ann/runs'",
    ):
        assert told in str(refused.value)


def test_a_space_may_hold_code_and_a_model_may_not(folder):
    (folder / "app.py").write_text("print()")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    check_folder(folder, SPACE_FILES)
    with pytest.raises(ValueError, match="app.py has no place"):
        check_folder(folder)


def test_the_card_of_the_embedded_model():
    root = ROOT
    card = read_card(root / "pipeline_card.md")
    report = gather_reports(root / "docs", EMBEDDED_CHECKPOINT)
    samples = [Sample("samples/oct-0.png", "oct", "edema")]
    finished = ModelCard(complete(card, "me/eyes", report, samples, filtered=True), ignore_metadata_errors=False)
    assert finished.data.license == "other" and finished.data.datasets and NO_FILTER not in finished.text
    shown = {(r.dataset_config, r.metric_type): r.metric_value for r in finished.data.eval_results}
    generated = report["generation"]["generated"]["new"]
    assert shown["all", "balanced_accuracy"] == generated["balanced_accuracy"]
    evaluation = next(report[name] for name in SHOWN if name in report)
    for name in generated["modalities"]:
        fidelity = list(evaluation["modalities"][name]["fidelity"].values())[-1]
        assert shown[name, "frechet_distance"] == fidelity["frechet_distance"]["value"]
    assert "org/minim" not in finished.text and "me/eyes" in finished.text
    assert finished.data.to_dict()["widget"] == [{"text": "oct: edema", "output": {"url": "samples/oct-0.png"}}]


def test_a_model_without_a_card_gets_one(shared_pipeline, tmp_path):
    text = complete(write_card(shared_pipeline, "tiny", False), "me/tiny", {}, [], filtered=False)
    (tmp_path / "README.md").write_text(text)
    card = read_card(tmp_path / "README.md")
    assert NO_FILTER in card.text and 'from_pretrained("me/tiny")' in card.text
    assert "Nothing has been measured" in card.text and card.data.eval_results is None
    again = complete(card, "me/tiny", {}, [], filtered=False)
    assert again.count(NO_FILTER) == 1


@pytest.mark.parametrize(
    ("front", "told"),
    [
        ("license: mit", "lacks library_name, pipeline_tag, tags"),
        ("license: other\nlibrary_name: diffusers\npipeline_tag: text-to-image\ntags: [x]", "lacks license_name"),
        ("license: mit\nlibrary_name: timm\npipeline_tag: text-to-image\ntags: [x]", "library_name: timm.*diffusers"),
    ],
)
def test_a_card_that_lacks_fields_is_refused(tmp_path, front, told):
    (tmp_path / "card.md").write_text(f"---\n{front}\n---\n# x\n")
    with pytest.raises(ValueError, match=told):
        read_card(tmp_path / "card.md")


def test_a_report_is_known_by_its_sections(tmp_path):
    for content, section in (({"generated": {}}, "generation"), ({"sets": {}, "modalities": {}}, "evaluation")):
        write_report(tmp_path / "report.json", content)
        assert list(read_sections(tmp_path / "report.json")) == [section]
    write_report(tmp_path / "report.json", {"val": 1})
    with pytest.raises(ValueError, match="is no report of this package: none of its sections"):
        read_sections(tmp_path / "report.json")
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(ValueError, match="report.json is no report: "):
        read_sections(tmp_path / "report.json")


def test_the_half_precision_variant_leaves_whole_numbers_alone(tmp_path):
    save_file({"w": torch.rand(3), "n": torch.tensor([300], dtype=torch.int64)}, tmp_path / "a.safetensors")
    save_half(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    half = load_file(tmp_path / "b.safetensors")
    assert half["w"].dtype == torch.float16 and half["n"].item() == 300
