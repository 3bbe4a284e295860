"""A modality that only a model knows: every command that is given the model, or told of it, takes its rows."""

import csv
import json
from pathlib import Path

import pytest
import torch
from conftest import write_csv
from PIL import Image

from minim_pipeline import modalities
from minim_pipeline.cli import main
from minim_pipeline.ratings import Rating, RatingStore


SKIN = {"name": "Skin", "words": "photo of skin", "aliases": ["skin lesion"], "grey": False, "flip": True}


@pytest.fixture(autouse=True)
def table():
    """What a test registers is forgotten after it."""
    tables = (modalities.MODALITIES, modalities._BY_KEY)
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before):
        table.clear()
        table.update(entries)


def forget():
    for table in (modalities.MODALITIES, modalities._BY_KEY):
        for key in [key for key, modality in table.items() if modality.id == "skin"]:
            del table[key]


@pytest.fixture(scope="module")
def model(make_pipeline, tmp_path_factory) -> Path:
    """A pipeline with a filter head, to whose `model_index.json` a modality was added."""
    folder = tmp_path_factory.mktemp("model") / "skin-model"
    make_pipeline(filtered=True).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["modalities"] += " skin"
    index["custom_modalities"] = {"skin": SKIN}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for i in range(12):
        Image.effect_noise((64, 64), 30 + 10 * i).convert("RGB").save(folder / f"{i}.png")
        finding = ("nevus", "melanoma")[i % 2]
        split = "train" if i < 8 else "val"
        rows.append(dict(path=f"{i}.png", Text=finding, modality="Skin lesion", finding=finding, split=split))
    return write_csv(folder / "data.csv", rows)


def test_ratings_of_it(model, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "0.png")
    main(["modalities", "--model", str(model)])
    store = RatingStore(tmp_path / "r.sqlite")
    store.add(Rating(rater="ann", path="0.png", rating=3, text="nevus", modality="skin"))
    forget()
    call = [
        "ratings",
        "--store",
        tmp_path / "r.sqlite",
        "--images",
        tmp_path / "images",
        "--output",
        tmp_path / "r.csv",
    ]
    assert main([*map(str, call)]) == 2 and "Unknown modality 'skin'" in capsys.readouterr().err
    assert main([*map(str, call), "--modalities-from", str(model)]) == 0
    assert "Skin 1" in capsys.readouterr().err
    assert next(csv.DictReader(open(tmp_path / "r.csv")))["modality"] == "skin"


class Read(Exception):
    """The rows were read: what comes after them is not for these tests."""


def stop(*args, **options):
    raise Read


def test_to_another_model_of_the_same_process_it_is_a_word_like_others(model, shared_pipeline, capsys):
    main(["modalities", "--model", str(model)])
    for text in ("Skin lesion: none.", "skin: intact"):
        prompts, kinds = shared_pipeline.resolve_prompts(text, "oct", 1)
        assert prompts == [text] and kinds[0].id == "oct", "a part of the sentence, as it is where nobody knows skin"
    with pytest.raises(ValueError, match="this model has not been trained on it; trained: 'oct'"):
        shared_pipeline("nevus", modality="skin")
    assert modalities.resolve_modality("skin lesion").id == "skin"


def test_scores_of_it(model, data, tmp_path, monkeypatch):
    monkeypatch.setattr("minim_pipeline.scoring.load_pipeline", stop)
    with pytest.raises(Read):
        main(["score", "--data", str(data), "--model", str(model), "--output", str(tmp_path / "s.csv")])


@pytest.mark.parametrize("given", ["--pipeline", "--modalities-from"])
def test_an_evaluation_of_it(model, data, tmp_path, monkeypatch, capsys, given):
    monkeypatch.setattr("minim_pipeline.evaluation.extractors.load_extractor", stop)
    call = ["evaluate", "--real", str(data), "--output-dir", str(tmp_path / "out")]
    if given == "--modalities-from":
        call += ["--synthetic", str(data)]
        assert main(call) == 2 and "Unknown modality 'Skin lesion'" in capsys.readouterr().err
    with pytest.raises(Read):
        main([*call, given, str(model)])


def test_classifiers_of_it(model, data, tmp_path):
    import train_classifier

    call = ["--train_data", data, "--output_dir", tmp_path, "--part", "all", "--architectures", "resnet"]
    call += ["--width", 8, "--resolution", 32, "--max_train_steps", 1, "--train_batch_size", 4]
    call = [*map(str, [*call, "--min_train", 1, "--min_val", 1])]
    with pytest.raises(ValueError, match="Unknown modality 'Skin lesion'"):
        train_classifier.main(call)
    torch.set_num_threads(1)
    report = train_classifier.main([*call, "--modalities_from", str(model)])
    assert set(report["val"]["judges"]["modalities"]) == {"skin"}
    assert str(model) not in (tmp_path / "report.json").read_text()


def test_an_autoencoder_trained_on_for_it(model, data, tmp_path):
    from minim_pipeline.training.autoencoder import AutoencoderConfig
    from minim_pipeline.training.config import parse
    from minim_pipeline.training.rows import read_splits

    call = ["--train_data", str(data), "--output_dir", str(tmp_path), "--pretrained_model_name_or_path", str(model)]
    args = parse(AutoencoderConfig, call)
    assert [len(rows) for rows in read_splits(args)] == [8, 4]
