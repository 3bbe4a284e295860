"""CSV files without a column `split`: what is held out, that it is told, and that a patient is on one side."""

import warnings

import pytest
from conftest import write_csv

from minim_pipeline.data.splits import assign_splits, read_split, read_splits


def make(path, rows):
    return write_csv(path, [{"path": f"{i}.png", "Text": "a", **row} for i, row in enumerate(rows)])


def read(path, *splits):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        train, val = read_splits(path, *splits, check_images=False)
    return [row["path"] for row in train], [row["path"] for row in val], [str(w.message) for w in told]


def test_a_tenth_of_each_modality_is_held_out_and_told(tmp_path):
    path = make(tmp_path / "data.csv", [{"modality": "OCT" if i < 40 else "CXR"} for i in range(60)])
    train, val, told = read(path)
    assert len(val) == 6 and sum(int(name[:-4]) < 40 for name in val) == 4
    assert sorted(train + val) == sorted(f"{i}.png" for i in range(60))
    assert len(told) == 1 and "has no column 'split': 6 of 60 rows are held out" in told[0]
    assert read(path) == (train, val, told) == read(path, None), "the same every time, also of all rows"
    for wanted, names in (("train", train), ("val", val)):
        with pytest.warns(UserWarning, match="6 of 60"):
            assert [row["path"] for row in read_split(path, wanted, check_images=False)] == names


def test_without_validation_all_rows_train_and_nothing_is_told(tmp_path):
    path = make(tmp_path / "data.csv", [{"modality": "OCT"}] * 12)
    train, val, told = read(path, "train", None)
    assert len(train) == 12 and not val and not told


def test_what_belongs_to_one_patient_is_on_one_side(tmp_path):
    rows = [{"modality": "OCT", "patient": f"p{i // 4}"} for i in range(80)]
    path = make(tmp_path / "data.csv", rows)
    train, val, told = read(path)
    patients = {f"{i}.png": row["patient"] for i, row in enumerate(rows)}
    assert len(val) == 8 and not {patients[name] for name in val} & {patients[name] for name in train}
    assert "2 of 20 groups by the column 'patient'" in told[0]


def test_no_modality_is_held_out_as_a_whole():
    # The only CXR is of whoever is held out for OCT, be it p0 or p1;
    rows = [{"path": f"{i}.png", "modality": name, "group": f"p{i % 2}"} for i, name in enumerate(["OCT", "OCT"])]
    rows += [{"path": f"c{i}.png", "modality": "CXR", "group": f"p{i}"} for i in range(2)][:1]
    with pytest.warns(UserWarning):
        found = assign_splits(rows, "data.csv")
    for name in ("OCT", "CXR"):
        assert any(row["split"] == "train" for row in found if row["modality"] == name)


def test_a_column_that_is_there_is_kept_to(tmp_path):
    path = make(tmp_path / "data.csv", [{"modality": "OCT", "split": "train"}, {"modality": "OCT", "split": "test"}])
    with pytest.raises(ValueError, match="no usable rows of split 'val'; splits found: 'test', 'train'"):
        read_splits(path, check_images=False)
    assert [row["split"] for row in read_splits(path, None, None, check_images=False)[0]] == ["train", "test"]


def test_another_split_than_those_two_cannot_be_guessed(tmp_path):
    path = make(tmp_path / "data.csv", [{"modality": "OCT"}] * 4)
    for splits in (("mine", "val"), ("train", "test"), ("mine", None)):
        with pytest.raises(ValueError, match="lacks the column 'split'"):
            read_splits(path, *splits, check_images=False)


@pytest.mark.filterwarnings("ignore:.*has no column 'split'")
def test_the_scripts_do_without_the_column_and_hold_out_the_same_rows(tmp_path):
    import train_classifier
    from PIL import Image

    from minim_pipeline import MODALITIES
    from minim_pipeline.evaluation.comparison import modalities_of
    from minim_pipeline.training.add_modality import AddModalityConfig, read_new
    from minim_pipeline.training.autoencoder import AutoencoderConfig
    from minim_pipeline.training.rows import read_splits

    for i in range(20):
        Image.effect_noise((32, 32), 20 + 4 * i).save(tmp_path / f"{i}.png")
    path = make(tmp_path / "data.csv", [{"modality": "OCT", "finding": "ab"[i % 2]} for i in range(20)])
    _, val, _ = read(path)
    assert len(val) == 2

    config = AutoencoderConfig(train_data=str(path), output_dir=str(tmp_path / "out"))
    assert [row["path"] for row in read_splits(config)[1]] == val
    adding = AddModalityConfig(train_data=str(path), output_dir="none", modality="oct", no_replay=True)
    new, _ = read_new(adding, MODALITIES["oct"])
    assert [row["path"] for row in new if row["split"] == "val"] == val
    assert modalities_of(path) == {"oct"}
    call = ["--train_data", path, "--output_dir", tmp_path / "judges", "--part", "all", "--architectures", "resnet"]
    call += ["--width", 8, "--resolution", 32, "--max_train_steps", 1, "--train_batch_size", 4]
    report = train_classifier.main([*map(str, [*call, "--min_train", 1, "--min_val", 1])])
    assert report["trained_on"]["n"] + report["val"]["judges"]["n"] <= 20 and report["val"]["judges"]["n"]
