"""One folder and its runs: never two at once, names that sort, and accepted images alone if that is asked for."""

import multiprocessing
import os
import signal
import time

import pytest
from PIL import Image

from minim_pipeline.cli import main
from minim_pipeline.data.sources import DatasetWriter, read_dataset
from minim_pipeline.generate import draw as generate_module
from minim_pipeline.generate.shortfall import Shortfall
from minim_pipeline.locking import locked


def run(model, out, *options):
    common = ["--model", model, "--output-dir", out, "--device", "cpu", "--modality", "OCT", "--prompt", "edema"]
    return main(["generate", *map(str, [*common, *options])])


def hold(folder, ready):
    with locked(folder):
        ready.set()
        time.sleep(600)


@pytest.fixture
def holder(tmp_path):
    """A process that has the folder `out`, killed at the end at the latest."""
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=hold, args=(tmp_path / "out", ready), daemon=True)
    process.start()
    assert ready.wait(60)
    yield process
    process.kill()


def test_a_folder_that_another_process_writes_to_is_refused_until_that_is_gone(holder, pipeline_dir, tmp_path, capsys):
    before = sorted((tmp_path / "out").iterdir())
    assert run(pipeline_dir, tmp_path / "out", "--num-images", 1) == 2
    assert f"another run is writing to {tmp_path / 'out'} now" in capsys.readouterr().err
    assert sorted((tmp_path / "out").iterdir()) == before
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert run(pipeline_dir, tmp_path / "out", "--num-images", 1) == 0, "the dead hold nothing"
    assert not (tmp_path / "out" / ".lock").exists()


def test_what_is_locked_in_vain_leaves_no_folder(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path / "a" / "b"):
        raise KeyError
    assert not list(tmp_path.iterdir())
    with locked(tmp_path / "a"):
        (tmp_path / "a" / "x").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["x"]
    with pytest.raises(ValueError, match="x is a file, not a folder"), locked(tmp_path / "a" / "x" / "y"):
        pass


@pytest.mark.slow
def test_of_two_processes_at_once_in_a_new_folder_one_draws_all_that_it_was_asked_for(nursery, pipeline_dir, tmp_path):
    def start(prompt):
        options = ["--model", pipeline_dir, "--output-dir", tmp_path / "out", "--device", "cpu", "--num-images", 6]
        options += ["--batch-size", 1, "--modality", "OCT", "--prompt", prompt]
        return nursery.start("-m", "minim_pipeline.cli", "generate", *options)

    both = {prompt: start(prompt) for prompt in ("normal", "edema")}
    codes = {prompt: process.wait() for prompt, process in both.items()}
    assert sorted(codes.values()) == [0, 2], [process.said() for process in both.values()]
    winner = min(codes, key=codes.get)
    assert [row["Text"] for row in read_dataset(tmp_path / "out/data.csv")] == [winner] * 6


def test_names_sort_in_the_order_of_the_images_and_old_folders_keep_theirs(tmp_path):
    def names(writer, *indices):
        for index in indices:
            writer.add(index, Image.new("L", (8, 8)), {"Text": "a", "modality": "OCT", "seed": index}, {})
        return [row["path"] for row in read_dataset(writer.output_dir / "data.csv")]

    many = names(DatasetWriter(tmp_path / "many", count=10_002), 9, 9_999, 10_001)
    assert many == sorted(many) == ["00009.png", "09999.png", "10001.png"]
    few = tmp_path / "few"
    assert names(DatasetWriter(few, count=10_000), 9_999) == ["9999.png"]
    assert names(DatasetWriter(few, count=20_000), 10_000) == ["9999.png", "10000.png"]
    assert names(DatasetWriter(tmp_path / "many", count=3), 2)[-1] == "00002.png"


@pytest.fixture(scope="module")
def picky(make_pipeline, tmp_path_factory):
    """A model whose filter accepts some images and not others."""
    folder = tmp_path_factory.mktemp("saved") / "picky"
    pipe = make_pipeline(filtered=True, num_candidates=2)
    scores = pipe(["edema"] * 16, modality="oct", seeds=list(range(16))).scores
    middle = sorted(scores)[10]
    pipe.filter_head.register_to_config(calibration={"oct": {"score": middle, "finding": 1.0}})
    pipe.save_pretrained(folder)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_accepted_images_alone(picky, tmp_path, capsys):
    assert run(picky, tmp_path / "all", "--num-images", 8, "--accepted-only") == 0
    said = capsys.readouterr().err
    rows = read_dataset(tmp_path / "all/data.csv")
    drawn = sum(int(row["candidates"]) for row in rows)
    assert {row["accepted"] for row in rows} == {"true"} and len(rows) == 8 < drawn
    assert f"8 accepted images in {tmp_path / 'all'}, of 8 asked for. {drawn} candidates were drawn" in said
    assert not (tmp_path / "all/fell_short.jsonl").exists()

    few = ["--num-images", 8, "--accepted-only", "--max-rounds", 1, "--quiet"]
    assert run(picky, tmp_path / "few", *few) == 3
    said = capsys.readouterr().err
    kept = read_dataset(tmp_path / "few/data.csv")
    short = Shortfall(tmp_path / "few").entries
    assert len(kept) + len(short) == 8 and f"{len(short)} of 8 images fell short in 1 round (" in said
    assert not any((tmp_path / "few" / f"{index:04d}.png").exists() for index in short)
    before = contents(tmp_path / "few")
    assert run(picky, tmp_path / "few", *few) == 3 and contents(tmp_path / "few") == before

    # The bound may be raised, and nothing but what fell short is drawn again.
    assert run(picky, tmp_path / "few", "--num-images", 8, "--accepted-only", "--quiet") == 0
    assert contents(tmp_path / "few") == contents(tmp_path / "all")


def test_what_fell_short_is_not_drawn_again(picky, tmp_path, monkeypatch):
    few = ["--num-images", 8, "--accepted-only", "--max-rounds", 1, "--quiet"]
    assert run(picky, tmp_path, *few) == 3
    monkeypatch.setattr(generate_module, "draw", lambda *args, **options: pytest.fail("drawn again"))
    assert run(picky, tmp_path, *few) == 3


def test_where_nothing_is_accepted_nothing_is_written_but_that(picky, tmp_path, capsys):
    options = ["--accepted-only", "--max-rounds", 2, "--filter-threshold", 3, "--num-images", 2]
    assert run(picky, tmp_path / "out", *options) == 3
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["fell_short.jsonl"]
    assert "0 accepted images" in (said := capsys.readouterr().err) and "2 of 2 images fell short in 2 rounds" in said


def test_accepted_only_needs_a_filter(pipeline_dir, picky, tmp_path, capsys):
    assert run(pipeline_dir, tmp_path / "out", "--accepted-only") == 2
    assert run(picky, tmp_path / "out", "--accepted-only", "--no-filter") == 2
    # One candidate in one round is drawn in a way of its own, and could not be gone on with.
    assert run(picky, tmp_path / "out", "--accepted-only", "--num-candidates", 1, "--max-rounds", 1) == 2
    assert capsys.readouterr().err.count("accepted_only") == 3 and not (tmp_path / "out").exists()
