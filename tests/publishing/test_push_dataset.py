"""A generated set to the Hub: with a card of what is in it, and nothing that may be real or tells of a machine."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hub_server import Hub, environment
from PIL import Image
from pyarrow import parquet

from minim_pipeline.cli import main
from minim_pipeline.provenance import read_provenance


# `minim` once for each (token, arguments), in a process that talks to the Hub of the test.
DRIVER = """
import json, os, sys
from minim_pipeline.cli import main
codes = []
for os.environ["HF_TOKEN"], arguments in json.loads(sys.argv[1]):
    codes.append(main(arguments))
print(json.dumps(codes))
"""
FORMATS = {"flat": [], "png": ["--shard-size", 3], **{name: ["--format", name] for name in ("parquet", "webdataset")}}
FORMATS["dicom"] = ["--format", "dicom"]


@pytest.fixture(scope="module")
def sets(make_pipeline, tmp_path_factory) -> Path:
    """The same six images in each format, in shards of three."""
    root = tmp_path_factory.mktemp("sets")
    make_pipeline(filtered=True).save_pretrained(root / "model")
    rows = [["edema", "OCT", 4, "dme"], ["drusen, left", "fundus", 2, ""]]
    with open(root / "prompts.csv", "w", newline="") as file:
        csv.writer(file).writerows([["Text", "modality", "num_images", "finding"], *rows])
    for name, options in FORMATS.items():
        given = ["--model", root / "model", "--device", "cpu", "--prompts-file", root / "prompts.csv", "--quiet"]
        given += ["--output-dir", root / name, *options, *["--shard-size", 3] * (name != "flat")]
        assert main(["generate", *map(str, given)]) == 0
    return root


def push(folder, *options) -> int:
    return main(["push-dataset", "--data", str(folder), "--repo-id", "org/set", "--license", "cc-by-4.0", *options])


def said_of(readme: str) -> tuple[dict, list[list[str]]]:
    """A card's front matter, and the rows of its tables."""
    _, front, text = readme.split("---\n", 2)
    return yaml.safe_load(front), [line.strip("| ").split(" | ") for line in text.splitlines() if line[:1] == "|"]


@pytest.mark.parametrize("name", FORMATS)
def test_a_card_says_what_is_in_the_set_whatever_its_format(sets, capsys, name):
    assert push(sets / name, "--dry-run") == 0
    listed, _, card = capsys.readouterr().out.partition("---\n")
    files = {line.split()[1] for line in listed.splitlines()}
    assert {"README.md", "samples.png", "run.json"} < files
    assert not [file for file in files if "plan" in file or "grid" in file]
    front, table = said_of("---\n" + card)
    assert front["license"] == "cc-by-4.0" and front["size_categories"] == ["n<1K"]
    assert front["tags"] == ["medical", "synthetic", "minim", "fundus", "oct"]
    told, images = dict(row for row in table if len(row) == 2), {tuple(row[:3]) for row in table if len(row) == 4}
    assert images >= {("fundus", "-", "2"), ("oct", "dme", "4")}
    run = json.loads((sets / name / "run.json").read_text())
    assert told["model"] == "model" and told["revision"] == run["revision"] and told["steps"] == "3"
    assert "filter_threshold" in run and told["num_candidates"] == str(run["num_candidates"])
    assert "The model's filter accepted " in card and " of 6 images" in card


def test_a_set_comes_to_the_hub_in_one_commit_and_replaces_an_earlier_one(sets, tmp_path):
    hub = Hub(writers={"good": {"org"}, "poor": {"me"}})
    given = ["push-dataset", "--repo-id", "org/set", "--license", "cc-by-4.0", "--data"]
    cases = [("good", [*given, str(sets / name)]) for name in ("webdataset", "parquet")]
    cases.append(("poor", [*given, str(sets / "flat")]))
    command = [sys.executable, "-c", DRIVER, json.dumps(cases)]
    try:
        done = subprocess.run(command, env=environment(hub, tmp_path, None), capture_output=True, text=True)
        codes, commits = json.loads(done.stdout), list(hub.repositories["datasets/org/set"].commits.values())
        files = hub.files("datasets/org/set")
    finally:
        hub.close()
    told = done.stderr.splitlines()
    assert codes == [0, 0, 2] and [line.startswith("dataset: http") for line in told] == [True, True, False]
    _, first, second = commits
    assert second == files
    shards = [f"data/train-{i:05d}-of-00002" for i in range(2)]
    assert {f"{shard}.tar" for shard in shards} < first.keys()
    expected = {".gitattributes", "README.md", "run.json", "samples.png", *(f"{shard}.parquet" for shard in shards)}
    assert files.keys() == expected
    assert files[f"{shards[0]}.parquet"] == (sets / "parquet" / f"{shards[0]}.parquet").read_bytes()
    (tmp_path / "samples.png").write_bytes(files["samples.png"])
    assert read_provenance(tmp_path / "samples.png")["synthetic"] is True
    assert Image.open(io.BytesIO(files["samples.png"])).size == (256, 64)  # one caption of each modality


def test_what_must_not_be_uploaded_is_named(sets, tmp_path, capsys):
    def refused(name, change) -> str:
        shutil.copytree(sets / name, tmp_path / name, dirs_exist_ok=True)
        change(tmp_path / name)
        assert push(tmp_path / name, "--dry-run") == 2
        shutil.rmtree(tmp_path / name)
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        return told

    def real_image(folder):
        Image.new("L", (64, 64)).save(next(folder.rglob("0001.png")))

    def rewrite(folder):
        file = next(folder.rglob("train-00000*.parquet"))
        table = parquet.read_table(file)
        image = io.BytesIO()
        Image.new("L", (8, 8)).save(image, "PNG")
        rows = table.to_pylist()
        rows[1]["image"]["bytes"], rows[2]["finding"] = image.getvalue(), "/home/ann/scans/1.png"
        parquet.write_table(table.from_pylist(rows, table.schema), file)

    for name in ("flat", "png"):
        assert "0001.png does not say that it is synthetic" in refused(name, real_image)
    told = refused("parquet", rewrite)
    assert "does not say that it is synthetic" in told and "names '/home/ann/scans/1.png'" in told and "2 prob" in told
    assert "notes.txt has no place" in refused("parquet", lambda folder: (folder / "notes.txt").write_text("x"))
    gone = refused("webdataset", lambda folder: os.remove(next(folder.rglob("*00001-of*.tar"))))
    assert "holds 1 of 2 shards" in gone
    assert "holds no run.json" in refused("flat", lambda folder: os.remove(folder / "run.json"))
    assert main(["push-dataset", "--data", "x", "--repo-id", "org/set", "--license", "other"]) == 2
    assert "--license other needs --license-name" in capsys.readouterr().err
