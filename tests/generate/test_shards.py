"""A plan in shards: the same in all formats and by any number of processes, whole whatever happens to them."""

import csv
import json
import multiprocessing
import os
import random
import resource
import signal
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet
from pydicom import dcmread

from minim_pipeline.cli import main
from minim_pipeline.data.dicom import read_dicom
from minim_pipeline.data.image_loading import load_images
from minim_pipeline.data.sources import read_dataset
from minim_pipeline.generate import draw
from minim_pipeline.locking import held
from minim_pipeline.provenance import read_provenance


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.csv"
    rows = [["edema", "OCT", 5, "dme"], ["drusen, left eye", "fundus", 4, ""], ["effusion", "CXR", 3, "effusion"]]
    with open(file, "w", newline="") as handle:
        csv.writer(handle).writerows([["Text", "modality", "num_images", "finding"], *rows])
    return file


@pytest.fixture
def run(pipeline_dir, prompts):
    """`minim generate` of 12 images in shards of 5; later options win over the first ones."""

    def run(out, *options):
        given = ["--model", pipeline_dir, "--device", "cpu", "--prompts-file", prompts, "--shard-size", 5]
        given += ["--batch-size", 2, "--quiet", "--output-dir", out, *options]
        return main(["generate", *map(str, given)])

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def pixels(image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


WANTED = [("edema", "OCT", "dme"), ("drusen, left eye", "Fundus", None), ("effusion", "CXR", "effusion")]
SHARDS = [f"data/train-{i:05d}-of-00003" for i in range(3)]


def test_all_formats_hold_the_same_images_captions_and_provenance(run, tmp_path, monkeypatch):
    import datasets
    import webdataset

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("png", "parquet", "webdataset", "dicom"):
        assert run(tmp_path / name, "--format", name) == 0
    folders = contents(tmp_path / "png")
    assert [name for name in folders if name.startswith(SHARDS[2])] == [
        f"{SHARDS[2]}/0010.png",
        f"{SHARDS[2]}/0011.png",
        f"{SHARDS[2]}/metadata.csv",
    ]
    files = [tmp_path / "png" / SHARDS[i // 5] / f"{i:04d}.png" for i in range(12)]
    images, told = [Image.open(file) for file in files], [read_provenance(file) for file in files]
    assert [image.mode for image in images] == ["L"] * 5 + ["RGB"] * 4 + ["L"] * 3
    assert [made["seed"] for made in told] == list(range(12)) and {made["synthetic"] for made in told} == {True}

    # As they lie, with the libraries that such files are for.
    as_parquet = datasets.load_dataset(str(tmp_path / "parquet"), split="train")
    as_folder = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "png"), split="train").sort("id")
    as_dicom = datasets.load_dataset("csv", data_files=str(tmp_path / "dicom/data/*/*.csv"), split="train").sort("id")
    tars = sorted(map(str, (tmp_path / "webdataset/data").iterdir()))
    as_tars = list(webdataset.WebDataset(tars, shardshuffle=False).decode("pil"))
    for i, image in enumerate(images):
        rows = [as_parquet[i], as_folder[i], as_dicom[i], as_tars[i]["json"]]
        assert {(row["id"], row["caption"], row["modality"], row["finding"], row["seed"]) for row in rows} == {
            (i, *WANTED[(i > 4) + (i > 8)], i)
        }
        assert as_tars[i]["txt"] == told[i]["prompt"] and as_tars[i]["__key__"] == f"{i:04d}"
        dicom = tmp_path / "dicom" / SHARDS[i // 5] / as_dicom[i]["file_name"]
        for other in (as_parquet[i]["image"], as_folder[i]["image"], as_tars[i]["png"], read_dicom(dicom)[0]):
            assert np.array_equal(pixels(other), pixels(image))
        for made in (
            json.loads(as_parquet[i]["provenance"]),
            as_tars[i]["json"]["provenance"],
            read_provenance(dicom),
        ):
            assert made.items() >= {"prompt": told[i]["prompt"], "seed": i, "software": "minim-pipeline"}.items()
            assert made["revision"] == told[i]["revision"]
    # And the very bytes of the PNGs, with what these say of themselves.
    stored = parquet.read_table(tmp_path / "parquet/data")["image"].combine_chunks().field("bytes").to_pylist()
    assert stored == [file.read_bytes() for file in files]
    with tarfile.open(tars[1]) as tar:
        assert tar.extractfile("0005.png").read() == files[5].read_bytes()
    # Our own commands read all of them alike.
    read = {name: read_dataset(tmp_path / name) for name in ("png", "parquet", "webdataset", "dicom")}
    seen = {name: load_images(rows, tmp_path / name, 64) for name, rows in read.items()}
    for name, rows in read.items():
        asked = [(row["Text"], row["modality"], row.get("finding") or None, row["seed"]) for row in rows]
        assert asked == [(*WANTED[(i > 4) + (i > 8)], str(i)) for i in range(12)], name
        assert seen[name].equal(seen["png"]), name


def test_a_small_set_is_one_folder_that_the_library_reads_as_it_lies(
    run, tmp_path, monkeypatch, pipeline_dir, prompts
):
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    given = ["--model", pipeline_dir, "--device", "cpu", "--prompts-file", prompts, "--quiet", "--output-dir"]
    assert main(["generate", *map(str, [*given, tmp_path / "out"])]) == 0
    found = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "out"), split="train")
    assert len(found) == 12 and found[4]["caption"] == "edema" and found[4]["finding"] == "dme"
    assert np.array_equal(pixels(found[4]["image"]), pixels(Image.open(tmp_path / "out/0004.png")))
    # What was begun so goes on so; and in shards somewhere else.
    assert run(tmp_path / "out", "--format", "png", "--shard-size", 5) == 0
    assert not (tmp_path / "out/data").exists()


DICOM = ["--format", "dicom", "--native-dicom"]


def test_parts_make_the_same_as_one_process_and_are_not_drawn_again(run, tmp_path, capsys, monkeypatch):
    assert run(tmp_path / "one", *DICOM) == 0
    assert run(tmp_path / "two", *DICOM, "--shard", "1/2") == 0
    assert contents_of_data(tmp_path / "two") == contents_of_data(tmp_path / "one")[1:2]
    assert run(tmp_path / "two", *DICOM, "--shard", "0/2") == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    kinds = [dcmread(file).SOPClassUID.keyword for file in sorted((tmp_path / "two").rglob("*.dcm"))]
    assert kinds == ["SecondaryCaptureImageStorage"] * 9 + ["ComputedRadiographyImageStorage"] * 3
    monkeypatch.setattr(draw, "draw", lambda *args, **options: pytest.fail("drawn again"))
    capsys.readouterr()
    assert run(tmp_path / "two", *DICOM) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def contents_of_data(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "data").iterdir())


def in_process(run, out, *options, prepare=None) -> multiprocessing.Process:
    """`run` in a process of its own, which leaves with its exit code."""

    def work():
        if prepare:
            prepare()
        os._exit(run(out, *options))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def test_processes_that_are_killed_lose_and_double_nothing(run, tmp_path):
    options = ["--format", "parquet", "--shard-size", 2, "--num-inference-steps", 8]
    assert run(tmp_path / "unbroken", *options) == 0
    dice, killed = random.Random(0), 0
    for _ in range(3):
        both = [in_process(run, tmp_path / "out", *options, "--shard", part) for part in ("0/2", "1/2")]
        while any(map(multiprocessing.Process.is_alive, both)):
            if list(tmp_path.glob("out/data/.*.parquet")):  # one is being written
                time.sleep(dice.uniform(0, 0.1))
                os.kill(both.pop(dice.randrange(len(both))).pid, signal.SIGKILL)
                killed += 1
                break
            time.sleep(0.01)
        for process in both:
            process.join()
    assert killed
    for part in ("0/2", "1/2"):
        assert run(tmp_path / "out", *options, "--shard", part) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")
    ids = parquet.read_table(tmp_path / "out/data")["id"].to_pylist()
    assert ids == list(range(12))


def test_a_shard_that_another_process_is_drawing_is_left_to_it(run, tmp_path, capsys):
    (tmp_path / "out/data").mkdir(parents=True)
    with held(tmp_path / "out" / f"{SHARDS[1]}.lock".replace("/train", "/.train")) as free:
        assert free and run(tmp_path / "out") == 0
    assert contents_of_data(tmp_path / "out") == [Path(name).name for name in (SHARDS[0], SHARDS[2])]
    assert run(tmp_path / "out") == 0 and len(contents_of_data(tmp_path / "out")) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-inference-steps", 2], "steps: 3 there, 2 now"),
        (["--batch-size", 3], "batch_size: 2 there, 3 now"),
        (["--format", "parquet"], "format: 'webdataset' there, 'parquet' now"),
        (["--seed", 1], "another plan: row 0 has seed: 0 there, 1 now"),
        (["--num-images", 2, "--shard-size", 6], "shard_size: 5 there, 6 now"),
    ],
)
def test_a_folder_with_a_run_of_another_plan_or_other_settings_stays_as_it_is(done, run, capsys, options, message):
    before = contents(done)
    assert run(done, "--format", "webdataset", *options) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and contents(done) == before


@pytest.fixture(scope="module")
def done(pipeline_dir, prompts, tmp_path_factory):
    """A run of webdataset that is complete."""
    out = tmp_path_factory.mktemp("done") / "out"
    given = ["--model", pipeline_dir, "--device", "cpu", "--prompts-file", prompts, "--shard-size", 5]
    given += ["--batch-size", 2, "--quiet", "--format", "webdataset", "--output-dir", out]
    assert main(["generate", *map(str, given)]) == 0
    return out


@pytest.mark.parametrize("format", ["png", "parquet", "webdataset"])
def test_a_full_disk_is_told_in_a_line_and_leaves_no_half_of_anything(run, tmp_path, capfd, format):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))  # bytes: the plan fits, five images do not

    wide = ["--width", 512] if format == "png" else []
    process = in_process(run, tmp_path / "out", "--format", format, *wide, prepare=limit)
    process.join()
    assert process.exitcode == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if "has learned" not in line]
    assert len(lines) == 1 and "No room on the disk" in lines[0] and "data/train-00000" in lines[0]
    assert sorted(path.name for path in (tmp_path / "out").rglob("*")) == ["data", "plan.parquet", "run.json"]


@pytest.fixture(scope="module")
def picky(make_pipeline, tmp_path_factory):
    """A model whose filter accepts some images and not others."""
    folder = tmp_path_factory.mktemp("saved") / "picky"
    pipe = make_pipeline(filtered=True, num_candidates=2)
    scores = pipe(["edema"] * 16, modality="oct", seeds=list(range(16))).scores
    pipe.filter_head.register_to_config(calibration={"oct": {"score": sorted(scores)[10], "finding": 1.0}})
    pipe.save_pretrained(folder)
    return folder


def test_what_falls_short_is_listed_and_found_by_more_rounds(picky, tmp_path, capsys):
    def run(out, *options):
        given = ["--model", picky, "--device", "cpu", "--modality", "OCT", "--prompt", "edema", "--num-images", 5]
        given += ["--shard-size", 3, "--format", "parquet", "--accepted-only", "--quiet", "--output-dir", out]
        return main(["generate", *map(str, [*given, *options])])

    assert run(tmp_path / "few", "--max-rounds", 1) == 3
    assert "images fell short (" in capsys.readouterr().err
    listed = [json.loads(line) for file in (tmp_path / "few/fell_short").iterdir() for line in open(file)]
    table = parquet.read_table(tmp_path / "few/data")
    assert table["accepted"].to_pylist() == [True] * len(table) and listed
    assert sorted([*table["id"].to_pylist(), *(entry["index"] for entry in listed)]) == list(range(5))
    before = contents(tmp_path / "few")
    assert run(tmp_path / "few", "--max-rounds", 1) == 3 and contents(tmp_path / "few") == before

    assert run(tmp_path / "few") == 0
    assert parquet.read_table(tmp_path / "few/data")["id"].to_pylist() == list(range(5))
    assert run(tmp_path / "all") == 0
    there, at_once = contents(tmp_path / "few"), contents(tmp_path / "all")
    assert all(there[name] == at_once[name] for name in at_once)
