"""What trainers say of a data set before they train on it."""

import csv

import pytest
import torch
from PIL import Image

from minim_pipeline.evaluation.command import check_overlap
from minim_pipeline.training.captions import phrase
from minim_pipeline.training.config import DataOptions, RunOptions
from minim_pipeline.training.rows import mirrored, read_splits, tell_cut, tell_mirrored
from minim_pipeline.training.run import Run


def noise(path, seed):
    pixels = torch.randint(256, (16, 16), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.numpy()).save(path)


def data(folder, rows, header=("path", "Text", "modality", "split")):
    with open(folder / "data.csv", "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return folder / "data.csv"


def test_an_image_that_is_there_twice_is_told_by_its_names(tmp_path, capsys):
    for name, seed in (("a", 0), ("b", 1), ("copy of a", 0), ("c", 2), ("d", 3)):
        noise(tmp_path / f"{name}.png", seed)
    names = {"train": ("a", "b", "copy of a", "b"), "val": ("a", "c", "d")}
    rows = [[f"{name}.png", "Drusen", "OCT", split] for split, mine in names.items() for name in mine]
    read_splits(DataOptions(train_data=str(data(tmp_path, rows))))
    said = capsys.readouterr().err
    assert f"2 of 4 train rows repeat the image of another: {tmp_path}/copy of a.png is {tmp_path}/a.png, " in said
    assert (
        f"1 of 3 val rows show an image that is trained on, so validation looks better than it is: {tmp_path}/a"
        in said
    )

    rows = [row for row in rows if row[0] in ("b.png", "c.png")][1:]
    read_splits(DataOptions(train_data=str(data(tmp_path, rows))))
    assert capsys.readouterr().err == ""


def test_evaluate_knows_a_training_image_under_another_name(tmp_path):
    noise(tmp_path / "a.png", 0)
    noise(tmp_path / "b.png", 0)
    with pytest.raises(ValueError, match="1 images are in --real and in --train, such as b.png"):
        check_overlap([{"path": "b.png"}], tmp_path / "real.csv", [{"path": "a.png"}], tmp_path / "train.csv")


def test_trainers_read_a_csv_of_another_machine(tmp_path):
    for seed, name in enumerate(("x/0.png", "y/0.png")):
        noise(tmp_path / "images" / name, seed)
    rows = [[f"/data2404/{place}/0.png", "Drusen, dry", split] for place, split in (("x", "train"), ("y", "val"))]
    path = data(tmp_path, rows, ("path", "Text", "split"))
    given = DataOptions(train_data=str(path), modality="Fundus", image_root=str(tmp_path / "images"))
    train, val = read_splits(given)
    assert train == [{"path": "images/x/0.png", "Text": "Drusen, dry", "split": "train", "modality": "Fundus"}]
    assert val[0]["path"] == "images/y/0.png"


def test_how_many_images_may_be_mirrored(capsys):
    texts = ("Drusen", "L disc hemorrhage", "Drusen at 10 o'clock", "Drusen")
    rows = [{"Text": text, "modality": name} for text, name in zip(texts, ("OCT", "Fundus", "Fundus", "CXR"))]
    flags = mirrored(rows)
    assert flags == [True, False, False, False] and not any(mirrored(rows, no_mirror=True))
    tell_mirrored("data.csv", rows, flags)
    assert "data.csv: 1 of 4 images may be mirrored; 2 others name a side" in capsys.readouterr().err
    finding = [{"Text": "Mass", "modality": "BreastUS", "finding": "left mass"}]
    assert mirrored(finding) == [False]


def test_captions_that_the_encoder_cuts_are_counted_and_one_is_quoted(shared_pipeline, capsys):
    """The tiny tokenizer has a token a letter, and reads 48."""
    tokenizer = shared_pipeline.tokenizer
    long = "A macula with many drusen of all sizes, and a scar at its end"
    rows = [{"Text": text, "modality": "OCT"} for text in ("Drusen", long, long)]
    phrase(rows, {}, tokenizer, 1, 0)
    said = capsys.readouterr().err
    assert "warning: 2 of 3 captions are longer than the 48 tokens that the text encoder reads" in said
    assert long in said and "end' is not learned" in said
    tell_cut(["<oct> Drusen"], tokenizer)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("prefix", ["OCT: ", "oct: ", "optical coherence tomography: "])
@pytest.mark.parametrize("variants", [1, 4])
def test_minims_prefix_is_learned_as_the_pipeline_reads_it(shared_pipeline, prefix, variants):
    """The token stands for the modality, and `pipe("OCT: drusen")` reads "drusen" behind it."""
    with_prefix, bare = ([{"Text": f"{text}drusen", "modality": "OCT"}] for text in (prefix, ""))
    ids = [phrase(rows, {}, shared_pipeline.tokenizer, variants, 0) for rows in (with_prefix, bare)]
    assert torch.equal(*ids)
    other = phrase([{"Text": "Layers: intact", "modality": "OCT"}], {}, shared_pipeline.tokenizer, 1, 0)
    assert "layers" in shared_pipeline.tokenizer.decode(other[0, 0]).replace(" ", "")


@pytest.mark.parametrize(("no_mirror", "expected"), [(False, [True, False]), (True, [False, False])])
def test_no_mirror_reaches_the_images(shared_pipeline, tmp_path, monkeypatch, capsys, no_mirror, expected):

    from minim_pipeline.training import autoencoder, latents

    for i in range(2):
        noise(tmp_path / f"{i}.png", i)
    rows = [{"path": f"{i}.png", "Text": text, "modality": "OCT"} for i, text in enumerate(("Drusen", "Drusen, OS"))]
    asked = []
    monkeypatch.setattr(latents, "augment", lambda x, may_mirror, *_: asked.append(may_mirror.tolist()) or x)
    options = DataOptions(train_data=str(tmp_path / "data.csv"), no_mirror=no_mirror, resolution=64)
    run = Run(RunOptions(output_dir=str(tmp_path)), "encoding")
    latents.Latents.encode(run, shared_pipeline.vae, options, rows, "train", 2)
    assert asked == [expected]
    assert f"(train): {sum(expected)} of 2 images may be mirrored" in capsys.readouterr().err

    slope = torch.arange(32).expand(1, 3, 32, 32).to(torch.uint8)
    drawn = [
        autoencoder.draw_batch(slope, torch.zeros(1).long(), 32, torch.Generator().manual_seed(i), "cpu", mirror)
        for mirror in (not no_mirror,)
        for i in range(12)
    ]
    assert any(x[0, 0, 0, 0] > x[0, 0, 0, -1] for x in drawn) != no_mirror
