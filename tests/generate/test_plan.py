"""A plan: the same images at any time, in a file that others can write, too, and what is wrong with one in a line."""

import csv

import pyarrow as pa
import pytest
from pyarrow import parquet

from minim_pipeline.cli import main
from minim_pipeline.generate.plan import expand, request_file
from minim_pipeline.generate.plan_table import difference, make_plan, read_plan, write_plan


ROWS = [
    ["real/a.png", "edema", "OCT", "2", "100", "dme", "2.5"],
    ["", "no retinopathy", "fundus", "3", "", "", ""],
    ["", "effusion, left", "cxr", "", "", "effusion", ""],
]


@pytest.fixture
def requests(tmp_path):
    with open(tmp_path / "prompts.csv", "w", newline="") as file:
        header = ["path", "Text", "modality", "num_images", "seed", "finding", "score"]
        csv.writer(file).writerows([header, *ROWS])
    return request_file(tmp_path / "prompts.csv", num_images=1, seed=7)


def test_a_plan_has_the_images_of_the_file_and_is_the_same_every_time(requests, tmp_path):
    plan = make_plan(requests)
    items = expand(requests)
    for item, planned in zip(items, plan.items(0, 6), strict=True):
        assert (item.index, item.text, item.modality, item.seed) == (
            planned.index,
            planned.text,
            planned.modality,
            planned.seed,
        )
        assert planned.extra["finding"] == item.extra["finding"]
    assert plan.items(4, 5)[0].seed == 7 + 4 and plan.items(1, 2)[0].seed == 101
    assert plan.carried == ["finding", "source_score", "source_path"], "what is named as a result is another image's"
    for name in ("a", "b"):
        write_plan(make_plan(requests), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    again = read_plan(tmp_path / "a")
    assert difference(again, plan) is None and again.items(0, 6) == plan.items(0, 6)


def test_a_million_rows_are_a_small_file_that_is_planned_at_once(requests, tmp_path):
    from dataclasses import replace

    plan = make_plan([replace(request, count=100_000, seed=3) for request in requests])
    write_plan(plan, tmp_path / "plan.parquet")
    assert len(plan) == 300_000 and (tmp_path / "plan.parquet").stat().st_size < 3_000_000
    assert parquet.ParquetFile(tmp_path / "plan.parquet").metadata.num_row_groups == 37, "a shard is a group"
    assert plan.items(299_999, 300_000)[0].seed == 3 + 99_999


GOOD = {"id": [0, 1], "prompt": ["edema", "normal"], "modality": ["OCT", "cxr"], "seed": [5, 6]}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"seed": None}, "lacks the column 'seed'; found: 'id', 'prompt', 'modality'."),
        ({"id": [3, 3]}, "has 1 ids more than once, such as 3."),
        ({"id": [-1, 3]}, "id has to be at least 0, got -1."),
        ({"id": ["a", "b"]}, "column 'id' has to be of whole numbers, got string."),
        ({"seed": pa.array([0, 2**64 - 1], pa.uint64())}, "has a column of neither strings nor numbers that fit"),
        ({"prompt": ["edema", None]}, "column 'prompt' has 1 empty values."),
        ({"prompt": ["edema", "nan"]}, "'nan' is no caption"),
        ({"modality": ["OCT", "PET"]}, "Unknown modality 'PET'"),
        ({"modality": ["OCT", "BreastUS"]}, "not been trained on it"),
        ({"id": [], "prompt": [], "modality": [], "seed": []}, "has no rows"),
    ],
)
def test_a_bad_plan_is_told_in_a_line_before_the_model_is_loaded(pipeline_dir, tmp_path, capsys, columns, message):
    columns = {name: values for name, values in (GOOD | columns).items() if values is not None}
    kinds = {"id": pa.int64(), "seed": pa.int64()} if columns["id"] == [] else {}
    table = pa.table({name: pa.array(values, kinds.get(name)) for name, values in columns.items()})
    parquet.write_table(table, tmp_path / "plan.parquet")
    options = ["--model", str(pipeline_dir), "--plan", str(tmp_path / "plan.parquet"), "--device", "cpu"]
    assert main(["generate", *options, "--output-dir", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


MANY = ["--prompt", "edema", "--modality", "OCT", "--output-dir", "out", "--num-images", "100000"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plan", "x.parquet", "--prompt", "edema"], "--plan names the images itself: leave --prompt out"),
        (["--plan", "no.parquet", "--output-dir", "out"], "no.parquet"),
        (["--plan", "prompts.csv", "--output-dir", "out"], "is no Parquet file of a plan"),
        (["--plan", "prompts.csv"], "--output-dir is missing"),
        (["--shard", "2/2"], "--shard has to be i/n with i from 0 to n - 1, got '2/2'."),
        (["--shard", "half"], "got 'half'"),
        (["--native-dicom"], "--native-dicom is for --format dicom, got --format png."),
        (["--prompt", "edema", "--modality", "OCT", "--output-dir", "nowhere://x/y"], "nowhere"),
        ([*MANY, "--shard-size", "1"], "--shard-size has to be at least 2 for 100000 images, got 1."),
    ],
)
def test_bad_options(requests, pipeline_dir, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "--model", str(pipeline_dir), "--device", "cpu", *options]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_plan_is_made_apart_and_drawn_by_its_model_only(requests, pipeline_dir, make_pipeline, tmp_path, capsys):
    prompts = ["--prompts-file", str(tmp_path / "prompts.csv"), "--seed", "7"]
    model = ["--model", str(pipeline_dir)]
    assert main(["plan", *model, *prompts, "--output", str(tmp_path / "plan.parquet")]) == 0
    assert "6 images are planned" in capsys.readouterr().err
    assert difference(read_plan(tmp_path / "plan.parquet"), make_plan(requests)) is None

    common = ["--device", "cpu", "--quiet", "--format", "webdataset"]
    planned = ["generate", *model, *common, "--plan", str(tmp_path / "plan.parquet"), "--output-dir"]
    assert main([*planned, str(tmp_path / "a")]) == 0
    assert main(["generate", *model, *common, *prompts, "--output-dir", str(tmp_path / "b")]) == 0
    for name in ("data/train-00000-of-00001.tar", "plan.parquet", "run.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()

    # The plan of a run says with what it was drawn.
    own = ["--plan", str(tmp_path / "a/plan.parquet"), "--output-dir", str(tmp_path / "c")]
    assert main(["generate", *model, *common, *own, "--num-inference-steps", "2"]) == 2
    assert "the plan is one of other settings (steps: 3 there, 2 now)" in capsys.readouterr().err
    make_pipeline(guidance_scale=1.5).save_pretrained(tmp_path / "other")
    assert main([*planned, str(tmp_path / "c"), "--model", str(tmp_path / "other")]) == 2
    assert "model: 'minim-tiny' there, 'other' now" in capsys.readouterr().err and not (tmp_path / "c").exists()
