"""Tables of images and captions as the field has them, beside MINIM's CSV: where their rows are, and their columns.

ImageFolder, Parquet, WebDataset, datasets that `save_to_disk` wrote or the Hub has. Rows become those of a CSV:
strings by column, `path` among them, which for an image inside of a larger file is its address (`image_files`). No
image is read here. pyarrow and `datasets`, the extra `datasets`, are imported for the formats that need them.
"""

import glob
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from .image_files import file_state, need
from .table import AS_USUAL, Columns
from .table_files import PICTURES, Table, read_file


METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
KINDS = {".jsonl": "jsonl", ".parquet": "parquet", ".tar": "webdataset", ".arrow": "arrow"}
# As `datasets` calls splits, in names of files and folders, and as they are called here.
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val"}
SPLITS |= {"test": "test", "testing": "test"}
HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?")
SHARD = re.compile(r"data/\w+-\d{5}-of-\d{5}[^/]*")
ALLOWED = (
    "a folder has to hold metadata.csv, .jsonl or .parquet beside its images, data.csv, Parquet files, tar files, "
    "what save_to_disk wrote, or a folder of images for each finding"
)


@dataclass(frozen=True)
class Source:
    """Where the rows of a table are.

    Args:
        kind: `"csv"`, `"jsonl"`, `"parquet"`, `"webdataset"`, `"arrow"`, `"metadata"` (of an image folder) or
            `"images"` (the images themselves, in folders by finding).
        base: the folder from which each row's `path` leads.
        files: that hold the rows.
        splits: of each file, where their names say it; else empty.
    """

    kind: str
    base: Path
    files: tuple[Path, ...]
    splits: tuple[str, ...] = ()


def find_source(source: str | Path) -> Source:
    """What a path, a glob or an id on the Hub stands for; a path that is nothing else, for a CSV.

    Raises:
        ValueError: a folder or a glob of nothing that is known, or an id that the Hub and its cache do not have.
        ImportError: the id needs `datasets`.
    """
    path, base = Path(source), base_of(source)
    if path.is_dir():
        return _in_folder(path)
    if _is_glob(path):
        files = sorted(map(Path, glob.glob(str(path), recursive=True)))
        kinds = {KINDS.get(file.suffix, file.suffix or file.name) for file in files}
        if kinds not in ({"parquet"}, {"webdataset"}):
            found = ", ".join(sorted(kinds)) or "nothing"
            raise ValueError(f"{source} has to name Parquet files or tar files, and names {found}.")
        return _with_splits(kinds.pop(), base, files)
    if _is_hub_id(path):
        return _on_hub(str(path))
    packed = path.name.endswith((".tar.gz", ".tgz"))
    return Source(KINDS.get(path.suffix, "webdataset" if packed else "csv"), base, (path,))


def base_of(source: str | Path) -> Path:
    """The folder from which the paths of a table's rows lead; raises as `find_source`."""
    path = Path(source)
    if path.is_dir():
        return path
    if _is_glob(path):
        parts = path.parts
        return Path(*parts[: next(i for i, part in enumerate(parts) if glob.has_magic(part))])
    return _on_hub(str(path)).base if _is_hub_id(path) else path.parent


def _is_glob(path: Path) -> bool:
    return glob.has_magic(str(path)) and not path.exists()


def _is_hub_id(path: Path) -> bool:
    known = path.suffix in (*KINDS, ".csv", ".txt", ".tsv") or path.exists()
    return not known and HUB_ID.fullmatch(str(path)) is not None


def read_source(source: str | Path, wanted: Columns = AS_USUAL) -> Table:
    """The rows of any table but a CSV.

    Args:
        wanted: how the columns are called that have a meaning; others are known by their usual names.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file is broken, has other columns than the first one, or lacks one that is `wanted`.
        ImportError: a package of the extra `datasets` is not installed.
    """
    found = find_source(source)
    return _read(found, tuple(map(file_state, found.files)), wanted)


@lru_cache(maxsize=4)
def _read(source: Source, states: tuple, wanted: Columns) -> Table:
    """`states` of its files: of those that have changed, what was read before is no longer it."""
    if source.kind == "images":
        return _read_images(source)
    table: Table | None = None
    for i, file in enumerate(source.files):
        own = read_file(file, wanted)
        _from_base(own.rows, os.path.relpath(file.parent, source.base))
        if source.splits and "split" not in own.columns:
            own = Table(own.found, [*own.columns, "split"], [row | {"split": source.splits[i]} for row in own.rows])
        if table is None:
            table = own
            continue
        lacking = [name for name in table.columns if name not in own.columns]
        if lacking and source.kind != "webdataset":
            names, found = (", ".join(map(repr, columns)) for columns in (lacking, own.found))
            raise ValueError(f"{file} has other columns than {source.files[0]}: it lacks {names}; found: {found}.")
        table.columns.extend(name for name in own.columns if name not in table.columns)
        table.rows.extend(own.rows)
    assert table is not None
    if source.kind == "metadata" and "split" not in table.columns:
        _split_by_folder(table)
    return table


def _in_folder(folder: Path) -> Source:
    if (folder / "dataset_dict.json").is_file():
        names = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        return _by_split(folder, {file: name for name in names for file in _saved_files(folder / name)})
    if (folder / "state.json").is_file():
        return Source("arrow", folder, tuple(_saved_files(folder)))
    if found := [folder / name for name in METADATA if (folder / name).is_file()]:
        return Source("metadata", folder, tuple(found[:1]))
    if (folder / "data.csv").is_file():
        return Source("csv", folder, (folder / "data.csv",))
    files: list[Path] = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(place, name) for name in sorted(names) if not name.startswith(".")]
    if found := [file for file in files if file.name in METADATA]:
        return Source("metadata", folder, tuple(found))
    # Where there are shards as on the Hub, other files beside them are no data.
    shards = [file for file in files if SHARD.fullmatch(file.relative_to(folder).as_posix())]
    for suffix in (".parquet", ".tar"):
        if found := [file for file in shards or files if file.suffix == suffix]:
            return _with_splits(KINDS[suffix], folder, found)
    found = [file for file in files if file.suffix.lower() in PICTURES and file.parent != folder]
    if not found:
        raise ValueError(f"{folder} holds no images with captions: {ALLOWED}.")
    return Source("images", folder, tuple(found))


def _saved_files(folder: Path) -> list[Path]:
    try:
        state = json.loads((folder / "state.json").read_text())
        files = [folder / part["filename"] for part in state["_data_files"]]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} is no dataset that save_to_disk wrote: {error}.") from error
    for file in files:
        if not file.is_file():
            raise ValueError(f"{folder} is no whole dataset of save_to_disk: it lacks {file.name}.")
    return files


@lru_cache(maxsize=16)
def _on_hub(name: str) -> Source:
    datasets = need("datasets", name)
    given = HUB_ID.fullmatch(name)
    assert given is not None
    try:
        splits = datasets.load_dataset(given["name"], given["config"], revision=given["revision"])
    except Exception as error:  # of many types: offline, no such repository, several configurations, a broken file
        why = " ".join(str(error).split("\n")[0].split())
        raise ValueError(
            f"{name} is no file or folder here, and no data set on the Hub or in its cache: {why}"
        ) from error
    files = {Path(part["filename"]): split for split, table in splits.items() for part in table.cache_files}
    return _by_split(Path(os.path.commonpath([file.parent for file in files])), files)


def _by_split(base: Path, files: dict[Path, str]) -> Source:
    return Source("arrow", base, tuple(files), _told_apart([SPLITS.get(split, split) for split in files.values()]))


def _with_splits(kind: str, base: Path, files: Sequence[Path]) -> Source:
    names = [re.split(r"[^a-z]+", os.path.relpath(file, base).lower()) for file in files]
    known = [next((SPLITS[word] for word in words if word in SPLITS), "") for words in names]
    return Source(kind, base, tuple(files), _told_apart(known) if all(known) else ())


def _told_apart(splits: Sequence[str]) -> tuple[str, ...]:
    """The splits, if there are several: one alone says nothing of what is held out."""
    return tuple(splits) if len(set(splits)) > 1 else ()


def _split_by_folder(table: Table) -> None:
    """Gives a table the column `split` where every image lies in a folder that is called like one."""
    splits = [SPLITS.get(row.get("path", "").partition("/")[0], "") for row in table.rows]
    if all(splits) and _told_apart(splits):
        table.columns.append("split")
        for row, split in zip(table.rows, splits):
            row["split"] = split


def _from_base(rows: Iterable[dict[str, str]], folder: str) -> None:
    """Lets paths that lead from `folder` lead from where that begins."""
    if folder != ".":
        for row in rows:
            if row.get("path") and not os.path.isabs(row["path"]):
                row["path"] = f"{folder}/{row['path']}"


def _read_images(source: Source) -> Table:
    """Images in a folder for each finding, perhaps in one for each split, as `datasets` reads them: no captions.

    The folder's name is the finding and, with its underscores as spaces, the caption.
    """
    rows = []
    for file in source.files:
        path, finding = os.path.relpath(file, source.base), file.parent.name
        rows.append({"path": Path(path).as_posix(), "Text": finding.replace("_", " "), "finding": finding})
    table = Table(["path", "Text", "finding"], ["path", "Text", "finding"], rows)
    _split_by_folder(table)
    return table
