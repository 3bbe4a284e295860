"""Direct discriminative optimization, in miniature: real images and its own, and resuming."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import train_ddo
from conftest import run_script, write_csv
from PIL import Image
from safetensors.torch import load_file

from minim_pipeline import MinimPipeline
from minim_pipeline.training.ddo import trainer
from minim_pipeline.training.ddo.config import DdoConfig


def write_data(folder: Path, modality: str = "OCT") -> Path:
    rows = []
    for i in range(10):
        generator = torch.Generator().manual_seed(i)
        wave = (torch.arange(64) / 2 + i).sin()[None].expand(64, 64)
        grey = ((wave + 0.2 * torch.randn(64, 64, generator=generator)) * 60 + 128).clamp(0, 255).byte()
        Image.fromarray(grey.numpy()).save(folder / f"{i}.png")
        split = "train" if i < 8 else "val"
        rows.append(dict(path=f"{i}.png", Text="Edema, left eye.", modality=modality, finding="edema", split=split))
    return write_csv(folder / "data.csv", rows)


@pytest.fixture(scope="module")
def base(make_pipeline, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_pipeline(filtered=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def arguments(base, tmp_path_factory) -> list:
    return [
        *("--pretrained_model_name_or_path", base, "--train_data", write_data(tmp_path_factory.mktemp("data"))),
        *("--resolution", 64, "--train_batch_size", 8, "--own_images", 12, "--lr_warmup_steps", 1),
        *("--latent_variants", 2, "--caption_variants", 2, "--validation_samples", 1, "--num_inference_steps", 2),
        *("--max_train_steps", 40, "--rounds", 2, "--checkpointing_steps", 10, "--validation_steps", 20),
        *("--learning_rate", 3e-3, "--ema_decay", 0.8, "--checkpoints_total_limit", 9),
    ]


FIGURES: list[dict] = []  # of the steps of `whole`


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory) -> Path:
    output, step = tmp_path_factory.mktemp("whole"), trainer.DdoTrainer.step
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trainer.DdoTrainer, "step", lambda self: FIGURES.append(step(self)) or FIGURES[-1])
        run_script(train_ddo, *arguments, "--output_dir", output)
    return output


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def test_only_the_unet_changes(whole, base):
    before, after = MinimPipeline.from_pretrained(base), MinimPipeline.from_pretrained(whole / "pipeline")
    for name in ("vae", "text_encoder", "filter_head"):
        old, new = (getattr(pipe, name).state_dict() for pipe in (before, after))
        assert all(torch.equal(old[key], new[key]) for key in old), name
    old, new = weights(base), weights(whole / "pipeline")
    assert not any(torch.equal(old[key], new[key]) for key in old if key.startswith("conv_"))
    image = after("Edema.", modality="oct", seeds=[0], output_type="pt").images
    assert image.shape == (1, 3, 64, 64) and image.isfinite().all()


def test_real_images_become_more_likely_than_its_own(whole):
    assert [figure["round"] for figure in FIGURES] == [0] * 20 + [1] * 20
    start = 5 * math.log(2)  # of a model that is its reference: 1 + alpha times log 2
    for first in (0, 20):
        assert FIGURES[first]["loss"].item() == pytest.approx(start, rel=1e-3)
        assert FIGURES[first]["told_apart"] == 0
        learned = FIGURES[first + 10 : first + 20]
        assert sum(figure["loss"] for figure in learned) / 10 < 0.9 * start
        assert sum(figure["told_apart"] for figure in learned) / 10 > 0.8


def test_resumes_in_its_round_as_if_unbroken(whole, arguments, tmp_path):
    shutil.copytree(whole, tmp_path / "cut")
    for name in ("pipeline", "best", "checkpoint-40"):
        shutil.rmtree(tmp_path / "cut" / name)
    (tmp_path / "cut" / "finished.json").unlink(missing_ok=True)
    run_script(train_ddo, *arguments, "--output_dir", tmp_path / "cut")
    again, once = weights(tmp_path / "cut" / "pipeline"), weights(whole / "pipeline")
    assert all(torch.equal(again[key], once[key]) for key in once)


def test_the_last_weights_are_kept_whatever_their_loss(whole):
    log = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log if record["kind"] == "val"] == [20, 40]
    best, last = weights(whole / "best"), weights(whole / "pipeline")
    assert all(torch.equal(best[key], last[key]) for key in last)


def test_what_does_not_belong_to_it_is_refused(base, arguments, tmp_path):
    given = {"output_dir": "x", "train_data": "x", "pretrained_model_name_or_path": str(base)}
    for wrong in ({"lora_rank": 4}, {"train_text_encoder": True}, {"replay": "x"}, {"unet": "x"}):
        with pytest.raises(ValueError, match=f"--{next(iter(wrong))}"):
            DdoConfig(**given, **wrong)
    with pytest.raises(ValueError, match="breast_mri, which .* cannot draw, but oct"):
        more = ("--train_data", write_data(tmp_path, "BreastMRI"), "--output_dir", tmp_path / "out")
        run_script(train_ddo, *arguments, *more)
