"""What a fine-tune takes along from its base: the filter head, the license, and the base's own images to replay."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import train_text_to_image
from conftest import ROOT, run_script, write_csv
from PIL import Image
from safetensors.torch import load_file

from minim_pipeline import EMBEDDED_CHECKPOINT, MinimPipeline
from minim_pipeline.cli import main
from minim_pipeline.data.table import Columns
from minim_pipeline.licenses import license_of
from minim_pipeline.publishing.card import license_note, read_card, write_card
from minim_pipeline.publishing.upload import staged
from minim_pipeline.training.preference.config import PreferenceConfig
from minim_pipeline.training.preference.sampling import Replay
from minim_pipeline.training.text_to_image import TextToImageConfig


CARD = (
    "---\nlicense: other\nlicense_name: house\nlibrary_name: diffusers\npipeline_tag: text-to-image\ntags: [x]\n---\n"
)


@pytest.fixture(scope="module")
def base(make_pipeline, tmp_path_factory) -> Path:
    """A pipeline with a filter head that knows two images, and a card with a license."""
    folder = tmp_path_factory.mktemp("base") / "house-model"
    pipe = make_pipeline(filtered=True, num_candidates=2)
    head = pipe.filter_head
    head.set_fingerprints(head.code, torch.zeros(2, head.config.code_size // 8))
    pipe.save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    return folder


@pytest.fixture(scope="module")
def drawn(base, tmp_path_factory) -> Path:
    """Images that `minim generate` wrote, which has no column `split`."""
    folder = tmp_path_factory.mktemp("drawn") / "out"
    prompt = ["--modality", "OCT", "--prompt", "edema", "--num-images", "6", "--num-inference-steps", "2", "--quiet"]
    assert main(["generate", "--model", str(base), "--output-dir", str(folder), "--device", "cpu", *prompt]) == 0
    return folder / "data.csv"


def rows_of(folder: Path, modality: str) -> Path:
    for i in range(4):
        Image.effect_noise((64, 64), 40 + 20 * i).convert("RGB").save(folder / f"{i}.png")
    return write_csv(folder / "data.csv", [{"path": f"{i}.png", "Text": "a", "modality": modality} for i in range(4)])


def train(base, data, output, *more) -> MinimPipeline:
    sizes = "--resolution 64 --train_batch_size 4 --lr_warmup_steps 1 --caption_variants 2 --latent_variants 2"
    sizes += " --validation_samples 1 --max_train_steps 2 --num_inference_steps 2"
    call = ["--pretrained_model_name_or_path", base, "--train_data", data, "--output_dir", output, *sizes.split()]
    run_script(train_text_to_image, *call, *more)
    return MinimPipeline.from_pretrained(output / "pipeline")


def test_a_fine_tune_keeps_the_filter_and_inherits_the_license(base, drawn, tmp_path, capsys):
    (tmp_path / "new").mkdir()
    data = rows_of(tmp_path / "new", "CXR")
    with pytest.warns(UserWarning, match="has no column 'split'"):
        pipe = train(base, data, tmp_path / "first", "--replay", drawn)
    assert "The filter head of the base is kept, and its thresholds. It finds copies of" in capsys.readouterr().out
    before, after = (
        load_file(folder / "filter_head/diffusion_pytorch_model.safetensors")
        for folder in (base, tmp_path / "first" / "pipeline")
    )
    assert all(torch.equal(before[name], after[name]) for name in before) and pipe.config.num_candidates == 2
    pipe.set_progress_bar_config(disable=True)
    assert pipe("edema", modality="oct").scores[0] is not None

    # In the second generation too, whose base has no card; and where it was saved anew in between.
    assert not (tmp_path / "first" / "pipeline" / "README.md").exists()
    pipe.save_pretrained(tmp_path / "saved")
    with pytest.warns(UserWarning, match="has no column 'split'"):
        second = train(tmp_path / "saved", data, tmp_path / "second", "--lora_rank", 2)
    assert second.config.weights_license == {"license": "other", "license_name": "house", "of": "house-model"}
    assert second.filter_head is not None
    (tmp_path / "README.md").write_text(str(write_card(second, "tiny", False)))
    card = read_card(tmp_path / "README.md")
    assert (card.data.license, card.data.license_name) == ("other", "house")
    assert "made from those of house-model, whose license holds for them too: **house**" in card.text


@pytest.mark.parametrize(
    ("modality", "more", "why"),
    [
        ("BreastUS", [], "it does not know breast_us: add_modality.py teaches it"),
        ("OCT", ["--resolution", 32], "it has learned from 64 px, not 32"),
    ],
)
def test_a_filter_that_does_not_fit_any_more_is_left_out_and_told(base, tmp_path, capsys, modality, more, why):
    with pytest.warns(UserWarning, match="has no column 'split'"):
        pipe = train(base, rows_of(tmp_path, modality), tmp_path / "out", "--max_train_steps", 1, *more)
    assert f"The filter head of the base is left out: {why}" in capsys.readouterr().out
    assert pipe.filter_head is None and pipe.config.num_candidates == 1


def test_images_that_generate_wrote_are_replayed_by_preference_training_too(base, drawn, tmp_path, monkeypatch):
    seen = []

    def encode(run, vae, data, rows, *more):
        seen.extend(rows)
        return SimpleNamespace(hold=lambda device: None)

    monkeypatch.setattr("minim_pipeline.training.preference.sampling.Latents.encode", encode)
    config = PreferenceConfig(
        pretrained_model_name_or_path=str(base), prompts="p.csv", replay=str(drawn), output_dir=str(tmp_path)
    )
    Replay(config, SimpleNamespace(device="cpu"), MinimPipeline.from_pretrained(base))
    assert len(seen) == 6, "all of them: nothing is validated on"


def test_where_train_data_lies_says_nothing_of_the_replay(base):
    elsewhere = {"modality": "CXR", "image_root": "images", "fit": "crop", "caption_column": "report"}
    config = TextToImageConfig(
        pretrained_model_name_or_path=str(base), train_data="new.csv", replay="old.csv", output_dir="x", **elsewhere
    )
    data = config.replay_data
    assert data.train_data == "old.csv" and data.reading == config.reading_elsewhere() and data.reading.fit == "crop"
    assert data.csv_options == {"modality": None, "image_root": None, "columns": Columns()} != config.csv_options


def test_the_embedded_weights_take_their_license_along():
    inherited = license_of(EMBEDDED_CHECKPOINT)
    own = read_card(ROOT / "pipeline_card.md").data
    assert (inherited["license"], inherited["license_name"]) == (own.license, own.license_name)
    assert inherited["license_name"] == "non-commercial-research"
    read_card(EMBEDDED_CHECKPOINT / "README.md")
    assert "minim-256" in license_note(inherited)


def test_the_license_goes_along_whoever_loads_and_saves(base, tmp_path):
    from diffusers import DiffusionPipeline

    DiffusionPipeline.from_pretrained(base).save_pretrained(tmp_path / "once")
    MinimPipeline.from_pretrained(tmp_path / "once").save_pretrained(tmp_path / "twice")
    assert license_of(tmp_path / "twice") == license_of(base) and license_of(base)["of"] == "house-model"


def test_a_card_that_says_otherwise_than_the_base_is_told(base, tmp_path, monkeypatch):
    shutil.copytree(base, tmp_path / "model")
    (tmp_path / "model" / "README.md").unlink()
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    index["weights_license"] = license_of(base)
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "card.md").write_text(CARD.replace("license: other\nlicense_name: house", "license: mit"))
    monkeypatch.setattr(sys.modules["minim_pipeline.publishing.upload"], "stage", lambda *args: None)
    monkeypatch.setattr(sys.modules["minim_pipeline.publishing.upload"], "check_folder", lambda folder: None)
    pipe = MinimPipeline.from_pretrained(tmp_path / "model")
    with (
        pytest.warns(UserWarning, match="says license 'mit', but the weights .* house-model, which are under 'house'"),
        staged(pipe, "me/tiny", card=tmp_path / "card.md"),
    ):
        pass
