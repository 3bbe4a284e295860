"""The same images as MINIM's CSV and in every other format are the same rows and the same pixels."""

import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import write_csv
from PIL import Image
from test_dicom import write_dicom
from test_image_reader import png

from minim_pipeline.data import looks
from minim_pipeline.data.image_loading import check_values, key_of, load_images
from minim_pipeline.data.looks import file_keys
from minim_pipeline.data.sources import DatasetWriter, read_columns, read_dataset, resolve_paths
from minim_pipeline.data.splits import read_splits
from minim_pipeline.data.table import Columns


pytest.importorskip("datasets")
import datasets
import pyarrow as pa
import pyarrow.parquet as pq


SIDE = 32
WORDS = {"Text": "caption", "path": "file_name"}


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory):
    """What `datasets` and the reader keep goes to a folder of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr(looks, "HF_HOME", str(tmp_path_factory.mktemp("home")))
        yield


def ramp(i: int) -> np.ndarray:
    y, x = np.mgrid[:SIDE, : SIDE + 8]
    return ((np.sin(x / (5 + i)) * np.cos(y / 7) + 1) * 127.5).round().astype(np.uint8)


def encoded(image, kind="PNG") -> bytes:
    data = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(data, kind)
    return data.getvalue()


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> dict[str, bytes]:
    """Six images as they come: of 8 and of 12 bits, 16 bits a channel in colour, JPEG, DICOM."""
    folder = tmp_path_factory.mktemp("mixed")
    write_dicom(folder / "f.dcm", ramp(5).astype(np.uint16) * 16)
    return {
        "a.png": encoded(ramp(0)),
        "b.png": encoded(ramp(1).astype(np.uint16) * 16),
        "c.jpg": encoded(ramp(2), "JPEG"),
        "d.png": png(np.stack([ramp(3).astype(np.uint16) * 16] * 3, -1), 2),
        "e.png": encoded(Image.fromarray(ramp(4)).convert("RGBA")),
        "f.dcm": (folder / "f.dcm").read_bytes(),
    }


def rows_of(names) -> list[dict]:
    return [
        {"path": name, "Text": f"Effusion, case {i}", "modality": "CXR", "finding": "effusion", "seed": str(i)}
        for i, name in enumerate(names)
    ]


def write_files(folder, images) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in images.items():
        (folder / name).write_bytes(data)


def as_fields(rows) -> list[dict]:
    """Rows as other formats have them, `seed` as a number."""
    return [{WORDS.get(key, key): value for key, value in row.items()} | {"seed": int(row["seed"])} for row in rows]


def make_csv(folder, images):
    write_files(folder, images)
    return write_csv(folder / "data.csv", rows_of(images))


def make_imagefolder(folder, images, kind="csv"):
    write_files(folder / "train", images)
    fields = as_fields(rows_of(images))
    if kind == "csv":
        write_csv(folder / "train" / "metadata.csv", fields)
    elif kind == "jsonl":
        (folder / "train" / "metadata.jsonl").write_text("".join(json.dumps(field) + "\n" for field in fields))
    else:
        pq.write_table(pa.Table.from_pylist(fields), folder / "train" / "metadata.parquet")
    return folder


def table_of(images, rows=None) -> pa.Table:
    pictures = [{"bytes": data, "path": name} for name, data in images.items()]
    fields = as_fields(rows or rows_of(images))
    columns = {name: [field[name] for field in fields] for name in fields[0] if name != "file_name"}
    return pa.table({"image": pictures, **columns})


def make_parquet(folder, images):
    """Two shards, the first in two row groups."""
    folder.mkdir()
    table = table_of(images)
    pq.write_table(table[:4], folder / "part-0.parquet", row_group_size=2)
    pq.write_table(table[4:], folder / "part-1.parquet")
    return folder


def make_webdataset(folder, images):
    folder.mkdir()
    fields = as_fields(rows_of(images))
    for shard in range(2):
        with tarfile.open(folder / f"shard-{shard}.tar", "w") as tar:
            for name, field in list(zip(images, fields))[shard * 3 : shard * 3 + 3]:
                del field["file_name"]
                text = field.pop("caption") if shard else None
                files = {name: images[name], f"{name[0]}.json": json.dumps(field).encode()}
                files |= {f"{name[0]}.txt": text.encode()} if text else {}
                for file, data in files.items():
                    member = tarfile.TarInfo(file)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder / "shard-*.tar"


def make_saved(folder, images):
    made = datasets.Dataset(table_of(images)).cast_column("image", datasets.Image())
    made.cast_column("finding", datasets.ClassLabel(names=["normal", "effusion"])).save_to_disk(folder, num_shards=2)
    return folder


def make_hub(folder, images):
    """In the cache of `datasets`, as an earlier run with a network has left it."""
    (folder / "set").mkdir(parents=True)
    pq.write_table(table_of(images), folder / "set" / "train.parquet")
    loaded = datasets.load_dataset("parquet", data_files=str(folder / "set" / "train.parquet"))
    made = loaded["train"].cache_files[0]["filename"].rsplit("/", 1)[0]
    place = datasets.config.HF_DATASETS_CACHE / "org___films" / "default" / "0.0.0" / "0123456789abcdef"
    place.mkdir(parents=True)
    for file in ("dataset_info.json", "parquet-train.arrow"):
        (place / file.replace("parquet", "films")).write_bytes(open(f"{made}/{file}", "rb").read())
    return "org/films"


FORMATS = {
    "csv": make_csv,
    "metadata.csv": make_imagefolder,
    "metadata.jsonl": lambda folder, images: make_imagefolder(folder, images, "jsonl"),
    "metadata.parquet": lambda folder, images: make_imagefolder(folder, images, "parquet"),
    "parquet": make_parquet,
    "webdataset": make_webdataset,
    "saved": make_saved,
    "hub": make_hub,
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory, mixed) -> dict:
    """The same six images in every format, by its name."""
    root = tmp_path_factory.mktemp("sources")
    return {name: make(root / name, mixed) for name, make in FORMATS.items()}


def without_path(rows) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "path"} for row in rows]


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "csv"])
def test_any_format_gives_the_same_rows_and_pixels(sources, name, capsys):
    source, csv = sources[name], sources["csv"]
    rows, expected = read_dataset(source), read_dataset(csv)
    assert without_path(rows) == without_path(expected) and len({row["path"] for row in rows}) == 6
    assert set(read_columns(source)) >= set(expected[0])
    images = load_images(rows, source, SIDE)
    told = capsys.readouterr().err
    assert images.equal(load_images(expected, csv, SIDE))
    assert told.replace(str(source), "") == capsys.readouterr().err.replace(str(csv), "")
    assert "2 of 6 images: 12 bits a pixel scaled to 8" in told, "grey, and of 16 bits a channel in colour"
    assert check_values([(rows, source)]) == check_values([(expected, csv)])
    assert images[4:].equal(load_images(rows[4:], source, SIDE)), "in chunks, too"
    assert key_of(rows, source) == key_of(rows, source) != key_of(rows[1:], source)
    paths = resolve_paths(rows, source) + resolve_paths(expected, csv)
    keys = file_keys(paths)
    assert keys[:6] == keys[6:] and len(set(keys)) == 6, "the same image is known by its content"


def test_dicom_is_read_as_any_image_is(tmp_path):
    plain = {f"{i}.png": encoded(ramp(i)) for i in range(6)}
    scans = {}
    for i in range(6):
        write_dicom(tmp_path / "scan.dcm", ramp(i), bits=8)
        scans[f"{i}.dcm"] = (tmp_path / "scan.dcm").read_bytes()
    csv = make_csv(tmp_path / "plain", plain)
    expected = load_images(read_dataset(csv), csv, SIDE)
    for name, make in (("csv", make_csv), ("tar", make_webdataset), ("parquet", make_parquet)):
        source = make(tmp_path / name, scans)
        rows = read_dataset(source)
        assert without_path(rows) == without_path(read_dataset(csv))
        assert load_images(rows, source, SIDE).equal(expected)


def test_rows_may_lie_in_a_table_elsewhere(sources, tmp_path):
    """As the trainers write them of several sets: the address of an image leads from anywhere to it."""
    for name in ("parquet", "webdataset", "saved"):
        rows = read_dataset(sources[name])
        places = [str(Path(path).resolve()) for path in resolve_paths(rows, sources[name])]
        csv = write_csv(tmp_path / f"{name}.csv", [row | {"path": place} for row, place in zip(rows, places)])
        assert load_images(read_dataset(csv), csv, SIDE).equal(load_images(rows, sources[name], SIDE))


def test_columns_of_other_names(tmp_path, mixed):
    table = table_of(mixed).rename_columns(["scan", "report", "kind", "dx", "seed"])
    table = table.append_column("mask", table["scan"]).append_column("Text", pa.array(["not this"] * 6))
    pq.write_table(table, tmp_path / "a.parquet")
    names = Columns("scan", "report", "kind", "dx")
    rows = read_dataset(tmp_path / "a.parquet", columns=names)
    assert without_path(rows) == without_path(rows_of(mixed)) and rows[1]["path"] == "a.parquet#scan/1"
    with pytest.raises(ValueError, match="a.parquet lacks the columns 'path', 'modality'; found: 'report', 'kind'"):
        read_dataset(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="no column 'words', which --caption_column names; found: .*'report'"):
        read_dataset(tmp_path / "a.parquet", columns=Columns(caption="words"))
    csv = write_csv(tmp_path / "a.csv", [{"file": "a.png", "report": "Effusion", "view": "AP"}])
    read = {"columns": Columns(image="file", caption="report"), "modality": "CXR", "check_images": False}
    assert read_dataset(csv, **read) == [{"path": "a.png", "Text": "Effusion", "view": "AP", "modality": "CXR"}]


@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_binary(), pa.struct({"path": pa.string(), "bytes": pa.binary()})]
)
def test_columns_of_bytes_and_rows_without_an_image(tmp_path, mixed, kind):
    table = table_of(mixed)
    images = [{"path": None, "bytes": data} if pa.types.is_struct(kind) else data for data in mixed.values()]
    images[2] = None
    pq.write_table(table.set_column(0, "scan", pa.array(images, kind)), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"1 bad row:\n  row 3 \(a.parquet#scan/2\): no image .*a.parquet#scan/2$"):
        read_dataset(tmp_path / "a.parquet")
    with pytest.warns(UserWarning):
        rows = read_dataset(tmp_path / "a.parquet", skip_bad_rows=True)
    csv = make_csv(tmp_path / "csv", mixed)
    wanted = [row for row in read_dataset(csv) if row["path"] != "c.jpg"]
    assert load_images(rows, tmp_path / "a.parquet", SIDE).equal(load_images(wanted, csv, SIDE))


def test_folders_of_findings_and_of_splits(tmp_path):
    for split, finding, count in (
        ("train", "pleural_effusion", 3),
        ("train", "normal", 2),
        ("validation", "normal", 1),
    ):
        images = {f"{i}.png": encoded(ramp(i)) for i in range(count)}
        write_files(tmp_path / "set" / split / finding, images)
    train, val = read_splits(tmp_path / "set", modality="CXR")
    assert [row["finding"] for row in train] == ["normal"] * 2 + ["pleural_effusion"] * 3
    assert train[-1]["Text"] == "pleural effusion" and val[0]["path"] == "validation/normal/0.png"
    with pytest.raises(ValueError, match="lacks the column 'modality'.*--modality"):
        read_dataset(tmp_path / "set")


def test_splits_of_files_and_saved_datasets(tmp_path, mixed):
    for split in ("train", "validation"):
        (tmp_path / "files").mkdir(exist_ok=True)
        pq.write_table(table_of(mixed), tmp_path / "files" / f"{split}-00000-of-00001.parquet")
    saved = datasets.DatasetDict({name: datasets.Dataset(table_of(mixed)) for name in ("train", "validation", "test")})
    saved.save_to_disk(tmp_path / "saved")
    for source, columns in (("files", {"train", "val"}), ("saved", {"train", "val", "test"})):
        assert {row["split"] for row in read_dataset(tmp_path / source)} == columns
        train, val = read_splits(tmp_path / source)
        assert len(train) == len(val) == 6
    assert "split" not in read_columns(tmp_path / "files" / "train-00000-of-00001.parquet")


def test_shards_as_on_the_hub_are_what_a_folder_is_read_as(tmp_path, mixed):
    for kind in ("parquet", "tar"):
        (tmp_path / kind / "data").mkdir(parents=True)
        pq.write_table(pa.table({"id": [1, 2]}), tmp_path / kind / "plan.parquet")
    pq.write_table(table_of(mixed), tmp_path / "parquet" / "data" / "train-00000-of-00001.parquet")
    (make_webdataset(tmp_path / "shards", mixed).parent / "shard-0.tar").rename(
        tmp_path / "tar" / "data" / "train-00000-of-00001.tar"
    )
    assert len(read_dataset(tmp_path / "parquet")) == 6 and len(read_dataset(tmp_path / "tar")) == 3


def test_image_folders_are_read_as_datasets_reads_them(tmp_path):
    images = {f"{i}.png": encoded(ramp(i)) for i in range(3)}
    source = make_imagefolder(tmp_path / "set", images)
    loaded = datasets.load_dataset("imagefolder", data_dir=str(source), split="train")
    rows = read_dataset(source)
    assert [row["Text"] for row in rows] == loaded["caption"]
    assert [np.asarray(image).tolist() for image in loaded["image"]] == [ramp(i).tolist() for i in range(3)]


def test_a_list_of_prompts_in_any_format(tmp_path):
    from minim_pipeline.generate.plan import plan_file

    prompts = [
        {"caption": "Macular edema", "modality": "OCT", "num_images": 2},
        {"caption": "Normal", "modality": "OCT"},
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    pq.write_table(pa.Table.from_pylist(prompts), tmp_path / "prompts.parquet")
    for name in ("prompts.jsonl", "prompts.parquet"):
        items = plan_file(tmp_path / name, 1, seed=5)
        assert [(item.text, item.seed) for item in items] == [
            ("Macular edema", 5),
            ("Macular edema", 6),
            ("Normal", 7),
        ]


def test_trainers_and_evaluate_take_the_names_of_columns(tmp_path, mixed, capsys):
    from minim_pipeline.evaluation.command import read_rows
    from minim_pipeline.evaluation.options import EvaluateOptions
    from minim_pipeline.training import rows as training_rows
    from minim_pipeline.training.config import DataOptions

    repeated = mixed | {"b.png": mixed["a.png"]}
    pq.write_table(table_of(repeated).rename_columns({"caption": "report", "finding": "dx"}), tmp_path / "a.parquet")
    synthetic = make_imagefolder(tmp_path / "drawn", mixed)
    names: dict = {"caption_column": "report", "finding_column": "dx"}
    sets = {"real": tmp_path / "a.parquet", "synthetic": synthetic, "output_dir": tmp_path / "report"}
    _, rows, readings = read_rows(EvaluateOptions(**sets, **names))
    assert without_path(rows["real"]) == without_path(rows["synthetic"]) == without_path(rows_of(mixed))
    assert readings["real"].columns.caption == "report" and readings["synthetic"].columns.caption is None
    data = DataOptions(train_data=str(tmp_path / "a.parquet"), val_split="none", resolution=SIDE, **names)
    assert len(training_rows.read_splits(data)[0]) == 6
    repeats = f"1 of 6 train rows repeat the image of another: {tmp_path}/a.parquet#image/1 is {tmp_path}/a.parquet"
    assert repeats in capsys.readouterr().err


def test_scores_of_no_folder_need_a_file(tmp_path):
    from minim_pipeline.scoring import ScoreOptions, score_csv

    with pytest.raises(ValueError, match="--output has to say where the scores of org/films go"):
        score_csv(ScoreOptions(data=Path("org/films"), model="none"))


def test_what_needs_no_package_does_without(sources, monkeypatch, tmp_path, mixed):
    for name in ("pyarrow", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("csv", "metadata.csv", "metadata.jsonl", "webdataset"):
        assert len(read_dataset(sources[name])) == 6
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    for source, package in ((tmp_path / "a.parquet", "pyarrow"), ("org/other", "datasets")):
        with pytest.raises(ImportError, match=rf"{source} needs {package}: pip install 'minim-pipeline\[datasets\]'"):
            read_dataset(source)


def one_line(source, **options) -> str:
    with pytest.raises(ValueError) as error:
        read_dataset(source, **options)
    text = str(error.value)
    assert "\n" not in text and len(text) < 400
    return text


def test_what_is_wrong_with_a_file_is_said_in_one_line(tmp_path, mixed):
    good = make_webdataset(tmp_path / "tars", mixed)
    cut = tmp_path / "tars" / "shard-1.tar"
    whole = cut.read_bytes()
    for end in (len(whole) // 3, whole.rstrip(b"\0").__len__()):
        cut.write_bytes(whole[:end])
        assert "shard-1.tar is no whole tar file (unexpected end of data)" in one_line(good)
    with tarfile.open(tmp_path / "set.tar.gz", "w:gz"):
        pass
    assert "set.tar.gz is no whole tar file" in one_line(tmp_path / "set.tar.gz")

    folder = make_parquet(tmp_path / "parquet", mixed)
    whole = (folder / "part-1.parquet").read_bytes()
    (folder / "part-1.parquet").write_bytes(whole[: len(whole) // 2])
    assert "part-1.parquet is no whole Parquet file" in one_line(folder)
    (folder / "part-1.parquet").write_bytes(whole[:4] + b"\xff" * 200 + whole[204:])
    assert "part-1.parquet cannot be read: " in one_line(folder), "rows are whole, and images are not"
    pq.write_table(table_of(mixed).drop_columns(["caption"]), folder / "part-1.parquet")
    assert "other columns than" in one_line(folder) and "it lacks 'Text'; found: 'modality'" in one_line(folder)
    assert "lacks the column 'Text'; found: 'modality', " in one_line(folder / "part-1.parquet")

    (tmp_path / "a.jsonl").write_text('{"file_name": "a.png"}\n{"file_name"\n')
    assert "a.jsonl line 2 is no JSON" in one_line(tmp_path / "a.jsonl")
    (tmp_path / "empty").mkdir()
    assert "holds no images with captions: a folder has to hold metadata.csv" in one_line(tmp_path / "empty")
    assert "has to name Parquet files or tar files, and names nothing" in one_line(tmp_path / "*.tar")
    assert "org/none is no file or folder here, and no data set on the Hub or in its cache" in one_line("org/none")
    saved = make_saved(tmp_path / "saved", mixed)
    next(saved.glob("*.arrow")).unlink()
    assert "is no whole dataset of save_to_disk: it lacks data-0000" in one_line(saved)


def test_a_broken_image_is_a_bad_row_that_says_where(tmp_path, mixed):
    broken = mixed | {"b.png": mixed["b.png"][:60]}
    for make, place in ((make_parquet, "part-0.parquet#image/1"), (make_webdataset, "shard-0.tar#b.png")):
        source = make(tmp_path / make.__name__, broken)
        with pytest.raises(ValueError, match="1 bad row") as error:
            read_dataset(source)
        assert f"row 2 ({place}): broken image {tmp_path}" in str(error.value) and "BytesIO" not in str(error.value)
        with pytest.warns(UserWarning, match="Left out"):
            assert len(read_dataset(source, skip_bad_rows=True)) == 5


def test_mixed_depths_that_nobody_can_know_are_refused_before_training(tmp_path, mixed):
    mixed = mixed | {"e.tif": encoded(ramp(4).astype(np.int32) - 1000, "TIFF")}
    del mixed["e.png"]
    source = make_parquet(tmp_path / "set", mixed)
    rows = read_dataset(source)
    with pytest.raises(ValueError, match="cxr images hold values from -1000 to .*--window LOW HIGH"):
        check_values([(rows, source)])


def test_many_images_are_looked_at_once(tmp_path, monkeypatch):
    """Of those that are not new, or have changed, a later command knows what was found."""
    images = {f"{i}.png": encoded(ramp(i).astype(np.uint16) * 16) for i in range(4)}
    csv = make_csv(tmp_path, images)
    monkeypatch.setattr(looks, "MANY", 3)
    monkeypatch.setattr("minim_pipeline.data.sources.MANY", 3)
    decoded = []
    read = looks.read_pixels
    monkeypatch.setattr(looks, "read_pixels", lambda path: decoded.append(Path(path).name) or read(path))
    for expected in (["0.png", "1.png", "2.png", "3.png"], [], ["2.png"]):
        if expected == ["2.png"]:
            (tmp_path / "2.png").write_bytes(encoded(ramp(9).astype(np.uint16) * 16))
        monkeypatch.setattr(looks, "_seen", {})  # as in a process of its own
        monkeypatch.setattr(looks, "_recalled", {})
        decoded.clear()
        rows = read_dataset(csv)
        assert sorted(decoded) == expected
        assert check_values([(rows, csv)])["cxr"].whole == (0, 255 * 16)
    (tmp_path / "1.png").unlink()
    decoded.clear()
    monkeypatch.setattr(looks, "_seen", {})
    with pytest.raises(ValueError, match=r"1 bad row:\n  row 2 \(line 3\): no image .*1.png"):
        read_dataset(csv)
    assert not decoded, "what is missing is said before anything is read"


def test_a_folder_that_minim_generate_wrote_is_read_as_a_whole(tmp_path):
    writer = DatasetWriter(tmp_path / "out", ["finding"])
    for seed in range(3):
        writer.add(seed, Image.fromarray(ramp(seed)), {"Text": "Edema", "modality": "OCT", "seed": seed}, {})
    writer.finish()
    assert read_dataset(tmp_path / "out") == read_dataset(tmp_path / "out" / "data.csv")
