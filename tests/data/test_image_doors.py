"""By whichever door an image comes, the same is seen: `minim score`, `pipe.score`, the rating page, training."""

import importlib
import io
import logging

import numpy as np
import pytest
import torch
from conftest import run_script, write_csv
from PIL import Image, ImageOps
from rating_images import read_folder

from minim_pipeline.cli import main
from minim_pipeline.data.image_loading import load_images
from minim_pipeline.data.image_reader import Reading
from minim_pipeline.data.sources import read_dataset
from minim_pipeline.training.config import DataOptions, RunOptions
from minim_pipeline.training.latents import Latents
from minim_pipeline.training.run import Run


SIDE = 64


def xray() -> np.ndarray:
    """A picture of 256 greys, not square, so that something is done to it."""
    y, x = np.mgrid[:SIDE, : SIDE + 32]
    return ((np.sin(x / 9) * np.cos(y / 7) + 1) * 127.5).round().astype(np.uint8)


# The same X-ray as scanners and image programs hand it over.
FORMS = {
    "plain.png": lambda grey: Image.fromarray(grey),
    "deep.png": lambda grey: Image.fromarray(grey.astype(np.uint16) * 257),
    "whole.tif": lambda grey: Image.fromarray(grey.astype(np.int32) * 257),
    "unit.tif": lambda grey: Image.fromarray(grey.astype(np.float32) / 255),
    "alpha.png": lambda grey: Image.fromarray(grey).convert("RGBA"),
    "palette.png": lambda grey: Image.fromarray(grey).convert("P"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("forms")
    for name, form in FORMS.items():
        form(xray()).save(place / name)
    write_csv(place / "data.csv", [{"path": name, "Text": "normal", "modality": "CXR"} for name in FORMS])
    return place


@pytest.fixture(scope="module")
def scorer(make_pipeline):
    return make_pipeline(filtered=True)


def test_all_forms_are_read_alike(folder, capsys):
    csv = folder / "data.csv"
    images = load_images(read_dataset(csv), csv, SIDE)
    assert all(image.equal(images[0]) for image in images)
    told = capsys.readouterr().err
    for words in ("2 of 6 images: 16 bits a pixel scaled to 8", "1 of 6 images: floating-point values from 0 to 1"):
        assert words in told
    assert "6 of 6 images: not square: stretched" in told


def test_score_sees_what_training_sees(folder, scorer, tmp_path, capsys):
    scorer.save_pretrained(tmp_path / "model")
    for options in ([], ["--fit", "pad"]):
        command = ["score", "--data", str(folder / "data.csv"), "--device", "cpu", "--output", str(tmp_path / "s.csv")]
        assert main([*command, *options, "--batch-size", "2", "--model", str(tmp_path / "model")]) == 0
        told = capsys.readouterr().err
        assert told.count("2 of 6 images: 16 bits a pixel scaled to 8") == 1, "once, whatever the batches"
        assert "6 of 6 images: not square: " + ("padded" if options else "stretched") in told
        scores = {row["score"] for row in read_dataset(tmp_path / "s.csv", check_images=False)}
        assert len(scores) == 1
    pictures = [form(xray()) for form in FORMS.values()]
    assert {f"{score:.4f}" for score in scorer.score(pictures, "normal", "cxr", fit="pad").scores} == scores


def test_a_picture_in_memory_is_read_as_a_file(scorer):
    grey = Image.fromarray(xray())
    deep = Image.fromarray(xray().astype(np.uint16) * 257)
    hidden = grey.convert("RGBA")
    hidden.putalpha(Image.new("L", grey.size, 255))
    hidden.paste((255, 255, 255, 0), (0, 0, 20, 20))
    on_black = grey.copy()
    on_black.paste(0, (0, 0, 20, 20))

    def score(image, **options):
        return scorer.score(image, "normal", "cxr", **options).scores[0]

    assert score(deep) == score(grey) != score(Image.new("L", grey.size, 255))
    assert score(hidden) == score(on_black) != score(grey)
    assert score(Image.fromarray(xray().astype(np.float32)), window=(0, 255)) == score(grey)
    with pytest.raises(ValueError, match="cxr images hold values from -1000"):
        score(Image.fromarray(xray().astype(np.int32) - 1000))
    with pytest.raises(ValueError, match="`fit` has to be one of"):
        score(grey, fit="squeeze")


def test_what_is_done_to_pictures_in_memory_is_told(scorer, caplog):
    logging.getLogger("diffusers").propagate = True
    try:
        scorer.score(Image.fromarray(xray().astype(np.uint16) * 257), "normal", "cxr")
    finally:
        logging.getLogger("diffusers").propagate = False
    assert "1 of 1 images: 16 bits a pixel scaled to 8" in caplog.text and "not square: stretched" in caplog.text


def test_the_rating_page_shows_what_training_sees(folder, capsys):
    shown = [image.read(SIDE) for image in read_folder(folder, "real")]
    assert all(picture == shown[0] for picture in shown)
    with Image.open(io.BytesIO(shown[0])) as page:
        page = np.asarray(page.convert("L"))
    trained = load_images(read_dataset(folder / "data.csv"), folder / "data.csv", SIDE, reading=Reading("pad"))
    assert np.array_equal(page, trained[0, 0].numpy())
    told = capsys.readouterr().err
    assert "2 of 6 images: 16 bits a pixel scaled to 8" in told and "6 of 6 images: not square: padded" in told


def test_latents_are_not_those_of_images_that_have_changed(tmp_path, make_pipeline, capsys):
    """As the issue has it: a run killed after encoding, all images inverted in place, the same command."""
    Image.fromarray(xray()[:, :SIDE]).save(tmp_path / "a.png")
    csv = write_csv(tmp_path / "data.csv", [{"path": "a.png", "Text": "normal", "modality": "CXR"}])
    data = DataOptions(train_data=str(csv), resolution=SIDE)
    run = Run(RunOptions(output_dir=str(tmp_path / "run")), "encoding")
    vae, rows = make_pipeline().vae, read_dataset(csv)

    def encode() -> torch.Tensor:
        return Latents.encode(run, vae, data, rows, "train", 1)[:]

    first, file = encode(), tmp_path / "run" / "latents-train-0-of-1.safetensors"
    written = file.stat().st_mtime_ns
    assert encode().equal(first) and file.stat().st_mtime_ns == written, "the same images are not encoded again"
    with Image.open(tmp_path / "a.png") as image:
        ImageOps.invert(image).save(tmp_path / "a.png")
    capsys.readouterr()
    changed = encode()
    assert not changed.equal(first) and "encoded anew" in capsys.readouterr().out
    data.fit = "pad"
    file.touch()
    written = file.stat().st_mtime_ns
    encode()
    assert file.stat().st_mtime_ns != written, "nor are those of another way to read"


def test_a_trainer_refuses_what_nobody_can_know_before_it_begins(tmp_path):
    import train_autoencoder

    Image.fromarray(xray().astype(np.int32) - 1000).save(tmp_path / "a.tif")
    csv = write_csv(tmp_path / "data.csv", [{"path": "a.tif", "Text": "normal", "modality": "CXR", "split": "train"}])
    options = ["--train_data", str(csv), "--output_dir", str(tmp_path / "run"), "--val_split", "none"]
    with pytest.raises(ValueError, match="data.csv: cxr images hold values from -1000 to"):
        run_script(train_autoencoder, *options, *"--preset tiny --resolution 64 --crop 32".split())
    assert not (tmp_path / "run").exists()


SCRIPTS = (
    *("add_modality", "calibrate_filter", "compare_models", "evaluate_filter", "report_model", "self_improve"),
    *("stand_in", "train_autoencoder", "train_classifier", "train_encoder", "train_filter", "train_preference"),
    *("train_text_to_image", "tune_filter"),
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_that_reads_images_can_be_told_how(script, capsys):
    with pytest.raises(SystemExit):
        module = importlib.import_module(script)
        module.main(["--help"])
    text = capsys.readouterr().out
    assert "--fit {stretch,crop,pad}" in text and ("--window LOW HIGH" in text or "--window LOW [HIGH ...]" in text)


@pytest.mark.parametrize("command", ["score", "evaluate"])
def test_every_command_that_reads_images_can_be_told_how(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert "--fit {stretch,crop,pad}" in text and "--window LOW HIGH" in text


def test_the_scale_is_that_of_the_whole_csv_however_it_is_read(tmp_path):
    """A darker val image is scaled as the train images are, also where the CSV has come from another machine."""
    ramp = np.arange(SIDE * SIDE, dtype=np.uint16).reshape(SIDE, SIDE)
    for name, top in (("train", 4080), ("val", 900)):
        Image.fromarray((ramp.astype(float) * top / ramp.max()).astype(np.uint16)).save(tmp_path / f"{name}.png")
    (tmp_path / "csv").mkdir()
    for header, place, options in (
        ("path,Text,split,modality", "../{}.png", {}),
        ("path,Text,split", "../{}.png", {"modality": "CXR"}),
        ("path,Text,split,modality", "/elsewhere/{}.png", {"image_root": str(tmp_path)}),
    ):
        last = ",CXR" * ("modality" in header)
        lines = [f"{place.format(name)},Film,{name}{last}" for name in ("train", "val")]
        csv = tmp_path / "csv" / "data.csv"
        csv.write_text("\n".join([header, *lines]) + "\n")
        rows = read_dataset(csv, "val", **options)
        mean = load_images(rows, csv, SIDE, reading=Reading(**options)).float().mean()
        assert 25 < mean < 31, options  # 900 of 4095; alone it would be scaled by 1023
