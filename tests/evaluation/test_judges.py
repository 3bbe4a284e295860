"""Classifiers that read generated images: training, saving, and the figures made of their answers."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image


torch.set_num_threads(1)

from minim_pipeline.evaluation.judges import (  # noqa: E402
    accuracy_interval,
    accuracy_report,
    balanced_accuracy,
    families_of,
    finds_asked,
    format_report,
    load_judges,
)


CLASSES = [
    ("oct", "normal"),
    ("oct", "no diabetic macular edema"),
    ("oct", "edema"),
    ("cxr", "normal"),
    ("cxr", "ill"),
]


@pytest.fixture(scope="module")
def data_csv(tmp_path_factory):
    """Bright CXR and dark OCT of two findings each (stripes along or across), and one finding that is too rare."""
    folder = tmp_path_factory.mktemp("judged")
    rng = np.random.default_rng(0)
    rows = []
    for modality, level in (("OCT", 60), ("CXR", 180)):
        for finding, axis in (("normal", 0), ("ill", 1)):
            for split, count in (("train", 12), ("val", 4)):
                for i in range(count):
                    wave = 50 * np.sin(np.arange(64) * rng.uniform(0.5, 0.7))
                    image = np.broadcast_to(np.expand_dims(wave, axis), (64, 64)) + level + rng.normal(0, 3, (64, 64))
                    name = f"{modality}-{finding}-{split}-{i}.png"
                    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / name)
                    part = "AB"[i % 2]
                    rows.append([name, finding, modality, finding, split, part if split == "train" else "", "a"])
    rows.append([rows[0][0], "rare", "OCT", "rare", "train", "B", "a"])
    with open(folder / "data.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["path", "Text", "modality", "finding", "split", "part", "source"], *rows])
    return folder / "data.csv"


@pytest.fixture(scope="module")
def trained(data_csv, tmp_path_factory):
    import train_classifier

    folder = tmp_path_factory.mktemp("judges")
    numbers = "--width 16 --resolution 32 --max_train_steps 3 --train_batch_size 8 --min_train 5 --min_val 2"
    arguments = ["--train_data", str(data_csv), "--output_dir", str(folder), *numbers.split()]
    return folder, train_classifier.main(arguments)


def test_training_leaves_out_rare_findings_and_other_parts(trained):
    folder, report = trained
    assert load_judges(folder).classes == [("cxr", "ill"), ("cxr", "normal"), ("oct", "ill"), ("oct", "normal")]
    assert report["trained_on"] == {"part": "B", "n": 24}
    assert set(report["val"]) == {"resnet", "convnextv2", "judges"}
    assert report["val"]["judges"]["n"] == 16


def test_reloaded_judges_say_the_same(trained):
    folder, _ = trained
    images = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8)
    judges = load_judges(folder)
    probabilities = judges.judge(images)
    assert probabilities.shape == (5, 4)
    assert torch.allclose(probabilities.sum(1), torch.ones(5), atol=1e-5)
    assert torch.equal(probabilities, load_judges(folder).judge(images))
    assert torch.allclose(probabilities, judges.judge(images.float() / 255, batch_size=2), atol=1e-5)
    each = judges.judge_each(images)
    assert torch.allclose(probabilities, (each["resnet"] + each["convnextv2"]) / 2)


def test_more_architectures_join_those_that_are_there(trained, data_csv):
    import train_classifier

    folder, _ = trained
    before = load_judges(folder)
    numbers = "--width 16 --resolution 32 --max_train_steps 1 --train_batch_size 8 --min_train 5 --min_val 2"
    train_classifier.main(
        ["--train_data", str(data_csv), "--output_dir", str(folder), *numbers.split(), "--architectures", "resnet"]
    )
    after = load_judges(folder)
    images = torch.rand(3, 3, 32, 32)
    assert set(after.models) == {"resnet", "convnextv2"}
    assert torch.equal(before.judge_each(images)["convnextv2"], after.judge_each(images)["convnextv2"])
    assert not torch.equal(before.judge_each(images)["resnet"], after.judge_each(images)["resnet"])


def test_augmentation_keeps_grey_images_grey_and_range():
    from minim_pipeline.evaluation.classifier import augment

    x = torch.rand(6, 1, 40, 40).expand(-1, 3, -1, -1)
    grey = torch.tensor([True] * 3 + [False] * 3)
    y = augment(x, 32, torch.ones(6, dtype=torch.bool), grey, torch.Generator().manual_seed(0))
    assert y.shape == (6, 3, 32, 32) and y.min() >= 0 and y.max() <= 1
    assert torch.equal(y[:3, 0], y[:3, 1]) and torch.equal(y[:3, 0], y[:3, 2])


def test_findings_are_read_within_the_modality_and_merged():
    probabilities = torch.tensor([[0.2, 0.1, 0.25, 0.45, 0.0], [0.1, 0.3, 0.2, 0.0, 0.4]])
    findings = ["edema", "normal"]
    assert finds_asked(probabilities, CLASSES, "oct", findings).tolist() == [True, False]
    # "normal" and "no edema" together outweigh edema in the first, and are one in the second.
    assert finds_asked(probabilities, CLASSES, "oct", findings, merge=True).tolist() == [False, True]
    # Of several modalities each is read within its own; what no judge knows is never found.
    assert finds_asked(probabilities, CLASSES, ["oct", CLASSES[-1][0]], ["edema", CLASSES[-1][1]]).tolist() == [
        True,
        True,
    ]
    assert finds_asked(probabilities, CLASSES, ["oct", "cxr"], ["cyst", "normal"]).tolist() == [False, False]
    assert len(finds_asked(probabilities[:0], CLASSES, [], [])) == 0


def test_the_families_of_the_data_are_merged():
    rows = [
        {"modality": "OCT", "finding": finding, "family": family}
        for finding, family in (("edema", "fluid"), ("cyst", "fluid"), ("normal", "healthy"), ("other", ""))
    ]
    families = families_of(rows)
    assert families == {("oct", "edema"): "fluid", ("oct", "cyst"): "fluid", ("oct", "normal"): "normal"}
    assert families_of([{"modality": "OCT", "finding": "edema"}]) == {}
    classes = [("oct", "edema"), ("oct", "cyst"), ("oct", "normal"), ("cxr", "normal")]
    probabilities = torch.tensor([[0.3, 0.1, 0.35, 0.25]])
    assert not finds_asked(probabilities, classes, "oct", ["edema"], families=families)[0]
    assert finds_asked(probabilities, classes, "oct", ["edema"], merge=True, families=families)[0]
    # Of a finding that is no class of its own the family can be read.
    classes, probabilities = [classes[0], classes[2]], torch.tensor([[0.6, 0.4]])
    assert not finds_asked(probabilities, classes, "oct", ["cyst"], families=families)[0]
    assert finds_asked(probabilities, classes, "oct", ["cyst"], merge=True, families=families)[0]

    report = accuracy_report(probabilities, classes, ["oct"], ["cyst"], families=families)
    figures = report["modalities"]["oct"]
    assert figures["findings"] == {"cyst": {"accuracy": 0, "n": 1}}
    assert figures["families"] == {"fluid": {"accuracy": 1, "n": 1}} and figures["balanced_accuracy_merged"] == 1
    assert "by family: fluid 1.00 (1)" in format_report("judges", report)


def test_report_agrees_with_counting_by_hand():
    def sure(*columns):
        return torch.nn.functional.one_hot(torch.tensor(columns), 5).float()

    probabilities = sure(0, 0, 0, 2, 3, 3, 4, 0)
    modalities = ["oct"] * 4 + ["cxr"] * 4
    findings = ["normal", "normal", "edema", "edema", "normal", "ill", "ill", "ill"]
    report = accuracy_report(probabilities, CLASSES, modalities, findings)
    oct, cxr = report["modalities"]["oct"], report["modalities"]["cxr"]
    assert oct["balanced_accuracy"] == 0.75 and oct["findings"]["edema"] == {"accuracy": 0.5, "n": 2}
    # The last is taken for an OCT; within CXR nothing speaks for "ill" then.
    assert cxr["balanced_accuracy"] == pytest.approx((1 + 1 / 3) / 2, abs=1e-4)
    assert cxr["modality_accuracy"] == 0.75 and report["modality_accuracy"] == 7 / 8
    assert report["balanced_accuracy"] == pytest.approx((0.75 + 2 / 3) / 2, abs=1e-4)


def test_interval_holds_the_accuracy_and_narrows_with_n():
    findings = ["a"] * 40 + ["b"] * 10
    right = np.array([True] * 30 + [False] * 10 + [True] * 5 + [False] * 5)
    low, high = accuracy_interval(right, findings)
    assert low < balanced_accuracy(right, findings) == 0.625 < high
    many = accuracy_interval(np.tile(right, 20), findings * 20)
    assert many[1] - many[0] < (high - low) / 3


def test_within_source_looks_only_at_findings_of_that_source():
    probabilities = torch.zeros(12, 5)
    probabilities[:, 1] = 0.6  # a finding that this source does not have
    probabilities[:6, 0], probabilities[6:, 2] = 0.4, 0.4
    findings = ["normal"] * 6 + ["edema"] * 6
    report = accuracy_report(probabilities, CLASSES, ["oct"] * 12, findings, ["tvhl"] * 12)["modalities"]["oct"]
    assert report["balanced_accuracy"] == 0
    assert report["within_source"] == {"tvhl": {"balanced_accuracy": 1.0, "chance": 0.5, "n": 12}}


def test_each_origin_is_drawn_equally_often(monkeypatch):
    """One real image among 50 synthetic ones of its class is half of what the classifier sees of that class."""
    from minim_pipeline.evaluation import classifier

    seen = []

    def note(x, *rest):
        seen.append(x[:, 0, 0, 0])
        return x

    monkeypatch.setattr(classifier, "augment", note)
    images = torch.zeros(102, 3, 32, 32, dtype=torch.uint8)
    images[0], images[51] = 255, 255
    labels, origin = torch.arange(102) // 51, torch.ones(102, dtype=torch.long)
    origin[0] = origin[51] = 0
    recipe = classifier.Recipe(max_train_steps=10, train_batch_size=64, resolution=32, mix=0.0)
    flags = torch.zeros(102, dtype=torch.bool)
    model = classifier.make_resnet(2, 8)
    classifier.train_classifier(model, images, labels, flags, flags, recipe, origin=origin)
    assert 0.4 < torch.cat(seen).mean().item() < 0.6
