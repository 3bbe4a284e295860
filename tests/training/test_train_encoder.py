"""The image-text encoder: trained in miniature, loaded again, and its losses on cases with a known answer."""

import csv
import json
import math
import shutil

import pytest
import torch
import train_encoder
from PIL import Image
from safetensors.torch import load_file

from minim_pipeline.evaluation.encoder import ImageTextEncoder
from minim_pipeline.evaluation.extractors import load_extractor
from minim_pipeline.files import read_report
from minim_pipeline.training.config import parse
from minim_pipeline.training.image_text_encoder import ImageTextEncoderConfig, copy_loss, text_loss


torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Stripes that lie or stand: two findings, of two modalities, some to train on and some to look at."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for i in range(24):
        finding, modality = ("normal", "diabetic macular edema")[i % 2], ("OCT", "Fundus")[i // 2 % 2]
        wave = (torch.arange(48) / (1.5 + i % 5)).sin()[None].expand(48, 48)
        grey = ((wave if i % 2 else wave.T) * 90 + 128).byte()
        Image.fromarray(grey.numpy()).convert("RGB").save(folder / f"{i}.png")
        split = "train" if i < 16 else "val"
        rows.append(
            dict(path=f"{i}.png", Text=finding, modality=modality, finding=finding, split=split, part="AB"[i % 8 == 7])
        )
    with open(folder / "data.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder / "data.csv"


def test_a_run_that_diverges_writes_nothing(data, tmp_path):
    sizes = [
        "--width",
        "8",
        "--text_width",
        "16",
        "--projection",
        "12",
        "--resolution",
        "32",
        "--learning_rate",
        "1e30",
    ]
    run = ["--max_train_steps", "6", "--train_batch_size", "8", "--caption_variants", "2"]
    with pytest.raises(ValueError, match="the training has diverged"):
        train_encoder.main(["--train_data", str(data), "--output_dir", str(tmp_path / "out"), *sizes, *run])
    assert not list((tmp_path / "out").glob("*.safetensors")) and not list((tmp_path / "out").glob("checkpoint-*"))


def test_trained_encoder_loads_and_tells_what_it_is(data, tmp_path):
    sizes = ["--width", "8", "--text_width", "16", "--projection", "12", "--resolution", "32", "--threads", "1"]
    run = ["--max_train_steps", "12", "--train_batch_size", "8", "--caption_variants", "2", "--ema_decay", "0.5"]
    report = train_encoder.main(["--train_data", str(data), "--output_dir", str(tmp_path), *sizes, *run])
    assert report["trained_on"] == {"part": "A", "n": 14}, "rows of part B are left to the judges"
    assert read_report(tmp_path / "report.json") == json.loads(json.dumps(report))
    assert str(tmp_path) not in (tmp_path / "report.json").read_text()
    assert set(report["val"]["copies_found"]) == {"shifted_by_4_px", "brighter_by_12_percent", "mirrored"}
    assert report["val"]["pool"] == 14 + 8

    encoder = ImageTextEncoder.from_pretrained(tmp_path)
    images = torch.randint(0, 256, (3, 3, 48, 48), dtype=torch.uint8)
    features, embeddings = encoder.encode_images(images, batch_size=2)
    texts = encoder.encode_texts(["normal", "diabetic macular edema"], ["OCT", "fundus"])
    assert features.shape == (3, 64) and embeddings.shape == (3, 12) and texts.shape == (2, 12)
    for vectors in (features, embeddings, texts):
        assert torch.allclose(vectors.norm(dim=1), torch.ones(len(vectors)), atol=1e-5)
    as_floats = encoder.encode_images(images.float() / 255)[0]
    assert torch.allclose(as_floats, features, atol=1e-5)

    extractor = load_extractor(tmp_path)
    assert torch.allclose(extractor.extract(images), features, atol=1e-6) and extractor.name == tmp_path.name

    encoder.model.half().save_pretrained(tmp_path)
    halved = ImageTextEncoder.from_pretrained(tmp_path)
    assert halved.model.dtype == torch.float32
    assert torch.allclose(halved.encode_images(images)[0], features, atol=1e-2)


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(data, tmp_path):
    call = [
        "--train_data",
        str(data),
        "--width",
        "8",
        "--text_width",
        "16",
        "--projection",
        "12",
        "--resolution",
        "32",
    ]
    call += ["--max_train_steps", "6", "--train_batch_size", "8", "--caption_variants", "2", "--threads", "1"]
    train_encoder.main([*call, "--output_dir", str(tmp_path / "whole")])
    resumed = [*call, "--output_dir", str(tmp_path / "resumed"), "--checkpointing_steps", "3"]
    train_encoder.main(resumed)
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-6")
    for name in ("finished.json", "model.safetensors"):
        (tmp_path / "resumed" / name).unlink()
    report = train_encoder.main(resumed)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert train_encoder.main(resumed) == report, "there is nothing left to do"


def test_losses_are_least_where_pairs_meet():
    eye = torch.eye(4)
    labels = torch.arange(4)
    met = text_loss(eye, eye, torch.tensor(50.0), labels)
    crossed = text_loss(eye, eye.roll(1, 0), torch.tensor(50.0), labels)
    assert met < 1e-3 < crossed
    # Two images of one finding share their texts: the least that can be reached is the entropy of the target.
    same = torch.eye(2).repeat_interleave(2, 0)
    shared = text_loss(same, same, torch.tensor(50.0), torch.tensor([0, 0, 1, 1]))
    assert shared.item() == pytest.approx(math.log(2), abs=1e-3)
    assert copy_loss(eye, eye, 0.05) < 1e-3 < copy_loss(eye, eye.roll(1, 0), 0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_train_steps", "0"], "--max_train_steps has to be at least 1, got 0"),
        (["--train_batch_size", "1"], "at least 2, to tell images apart, got 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        parse(ImageTextEncoderConfig, ["--train_data", "none.csv", "--output_dir", "none", *arguments])


def test_a_part_without_rows_is_told(data, tmp_path):
    with pytest.raises(ValueError, match="holds 0 train rows of part 'Z'"):
        train_encoder.main(["--train_data", str(data), "--output_dir", str(tmp_path / "out"), "--part", "Z"])
    assert not (tmp_path / "out").exists()
