"""MINIM's own checkpoint, a U-Net trained from Stable Diffusion: drawn with, and trained on from."""

import csv
import json

import pytest
import torch

from minim_pipeline import MinimPipeline
from minim_pipeline.cli import main
from minim_pipeline.provenance import read_provenance


@pytest.fixture(scope="module")
def minim(make_pipeline, tmp_path_factory):
    """A folder with Stable Diffusion in miniature, `sd`, and another U-Net of its shape, `checkpoint/unet`."""
    folder = tmp_path_factory.mktemp("minim")
    pipe = make_pipeline("sd1")
    pipe.save_pretrained(folder / "sd")
    torch.manual_seed(5)
    for parameter in pipe.unet.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    pipe.unet.save_pretrained(folder / "checkpoint" / "unet")
    return folder


def generate(minim, out, *options):
    common = ("--model", minim / "sd", "--modality", "OCT", "--prompt", "macular edema", "--num-images", 1)
    more = ("--num-inference-steps", 2, "--seed", 3, "--device", "cpu", "--quiet", "--output-dir", out)
    return main(["generate", *map(str, (*common, *more, *options))])


@pytest.mark.parametrize("where", ["checkpoint/unet", "checkpoint"])
def test_draws_with_a_unet_of_its_own_and_the_bare_caption(minim, tmp_path, where, monkeypatch):
    read = []
    encode = MinimPipeline.encode_texts
    monkeypatch.setattr(
        MinimPipeline, "encode_texts", lambda self, texts, *a, **k: read.append(texts) or encode(self, texts, *a, **k)
    )
    assert generate(minim, tmp_path / "plain") == 0
    assert generate(minim, tmp_path / "own", "--unet", minim / where) == 0
    assert read == [["optical coherence tomography of the retina, macular edema"], [""], ["macular edema"], [""]]
    made = read_provenance(tmp_path / "own/0000.png")
    assert made["unet"].startswith("unet sha256-") and made["prompt"] == "macular edema"
    assert "unet" not in read_provenance(tmp_path / "plain/0000.png")
    (row,) = csv.DictReader(open(tmp_path / "own/data.csv"))
    assert row["unet"] == made["unet"]
    assert (tmp_path / "own/0000.png").read_bytes() != (tmp_path / "plain/0000.png").read_bytes()


def test_a_pipeline_keeps_that_it_reads_bare_captions(minim, tmp_path):
    from minim_pipeline.loading import load_with_unet

    pipe = load_with_unet(str(minim / "sd"), minim / "checkpoint", bare=True)
    assert pipe.resolve_prompts("OCT: edema", "oct", 1)[0] == ["OCT: edema"], "as it stands, if the modality is given"
    assert pipe.resolve_prompts("OCT: edema", None, 1)[0] == ["edema"]
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["bare_prompts"] is True
    assert MinimPipeline.from_pretrained(tmp_path).config.bare_prompts
    assert "bare_prompts" not in json.loads((minim / "sd" / "model_index.json").read_text())


def test_a_unet_alone_says_how_it_is_used(minim, tmp_path, capsys):
    for folder in ("checkpoint", "checkpoint/unet"):
        assert generate(minim, tmp_path / "out", "--model", minim / folder) == 2
        said = capsys.readouterr().err
        assert f"minim generate --model BASE --unet {minim / folder} (the prompt is then the bare caption" in said


def test_a_unet_that_does_not_fit_is_refused(minim, make_pipeline, tmp_path, capsys):
    make_pipeline().unet.save_pretrained(tmp_path / "unet")
    assert generate(minim, tmp_path / "out", "--unet", tmp_path / "unet") == 2
    assert "denoises latents of channels 8" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_trains_on_from_it(minim):
    from diffusers import UNet2DConditionModel

    from minim_pipeline.training.pipeline import ModelOptions, build_pipeline

    base = {"pretrained_model_name_or_path": str(minim / "sd")}
    options = ModelOptions(**base, unet=str(minim / "checkpoint" / "unet"))
    pipe = build_pipeline(options, 64, ["oct"], {"oct": []}).pipe
    own = UNet2DConditionModel.from_pretrained(minim / "checkpoint" / "unet").state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in pipe.unet.state_dict().items())
    assert not pipe.config.bare_prompts and "<oct>" in pipe.tokenizer.get_vocab()
    for wrong in ({"unet": "nowhere", **base}, {"unet": str(minim / "checkpoint"), "preset": "tiny"}):
        with pytest.raises(ValueError, match="--unet has to be the folder of a U-Net|Give either|--preset needs"):
            ModelOptions(**wrong)
