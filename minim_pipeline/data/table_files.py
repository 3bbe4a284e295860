"""The rows of one file of a table: JSON lines, a tar of WebDataset, Parquet, Arrow, the metadata.csv of a folder.

Rows have the columns of a CSV by their usual names, and strings. The image of a row inside of the file is its address.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from .dicom import SUFFIXES
from .image_files import need, tar_index
from .table import FIELD_ALIASES, Columns, read_table, usual_names


PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", *SUFFIXES)


class Table(NamedTuple):
    """Rows, with the names of columns as they are written in the file, and by their usual spelling."""

    found: list[str]
    columns: list[str]
    rows: list[dict[str, str]]


def read_file(file: Path, wanted: Columns) -> Table:
    """The rows of a file, by its ending; paths in it lead from its folder.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is broken, or lacks a column that is `wanted`.
        ImportError: it needs a package that is not installed.
    """
    readers = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_arrow, ".arrow": _read_arrow}
    return readers.get(file.suffix, _read_tar)(file, wanted)


def _read_csv(file: Path, wanted: Columns) -> Table:
    columns, records = read_table(file, wanted, FIELD_ALIASES)
    for record in records:
        if len(record.values) != len(columns):
            found = f"{len(record.values)} fields, the header has {len(columns)}"
            raise ValueError(f"{file} line {record.line}: {found} ({record.text[:100]!r}).")
    rows = [{name: value for name, value in zip(columns, record.values) if name} for record in records]
    return Table(columns, [name for name in columns if name], rows)


def _read_jsonl(file: Path, wanted: Columns) -> Table:
    rows: list[dict] = []
    with open(file, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                rows.append(_json_row(line, f"{file} line {number}"))
    return _table(file, rows, wanted)


def _json_row(text: str | bytes, place: str) -> dict:
    try:
        row = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{place} is no JSON: {error}.") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place} has to be a JSON object, got {str(row)[:40]!r}.")
    return row


def _read_tar(file: Path, wanted: Columns) -> Table:
    """Samples of WebDataset: files whose names are the same up to the first dot are of one."""
    samples: dict[str, dict[str, Any]] = {}
    pictures = tuple(suffix[1:] for suffix in PICTURES)
    with open(file, "rb") as data:
        for member, (start, size) in tar_index(str(file)).items():
            folder, _, name = member.rpartition("/")
            key, _, field = name.partition(".")
            if not key or not field:
                continue
            sample, address = samples.setdefault(f"{folder}/{key}", {}), f"{file.name}#{member}"
            if field.lower() in pictures or field == wanted.image:
                if wanted.image in (None, field):
                    sample.setdefault("path", address)
            elif field in ("json", "txt", "cls"):
                data.seek(start)
                text = data.read(size)
                if field == "json":
                    values = _json_row(text, str(file.with_name(address)))
                    sample |= {name: value for name, value in values.items() if name != "path"}
                else:
                    sample[field] = text.decode("utf-8", "replace")
    for sample in samples.values():
        if wanted.caption is None and sample.keys() & {"Text", "text", "caption", "prompt"}:
            sample.pop("txt", None)  # the caption again
    if wanted.image and not any("path" in sample for sample in samples.values()):
        raise ValueError(f"{file} has no files *.{wanted.image}.")
    return _table(file, list(samples.values()), wanted._replace(image=None))


def _read_arrow(file: Path, wanted: Columns) -> Table:
    """Of a Parquet file, or an Arrow file of `datasets`, all columns but those that hold images."""
    pa = need("pyarrow", file)
    try:
        if file.suffix == ".parquet":
            from pyarrow.parquet import ParquetFile

            with ParquetFile(file) as parquet:
                schema = parquet.schema_arrow
                table = parquet.read([field.name for field in schema if not _holds_images(pa, field.type)])
        else:
            with pa.memory_map(str(file)) as source:
                whole = pa.ipc.open_stream(source).read_all()
            schema = whole.schema
            table = whole.select([field.name for field in schema if not _holds_images(pa, field.type)])
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{file} is no whole {file.suffix[1:].capitalize()} file: {error}") from error
    images = [field.name for field in schema if _holds_images(pa, field.type)]
    image = wanted.image or ("image" if "image" in images or len(images) != 1 else images[0])
    names = _class_names(schema)
    columns = {name: _texts(table.column(name), names.get(name)) for name in table.column_names}
    if image in images:
        columns[image] = [f"{file.name}#{image}/{i}" for i in range(table.num_rows)]
        wanted = wanted._replace(image=image)
    rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
    return _table(file, rows, wanted, list(columns))


def _holds_images(pa: Any, kind: Any) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _class_names(schema: Any) -> dict[str, list[str]]:
    """The names of classes, by column, that `datasets` notes where the values are their numbers."""
    noted = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = noted.get("info", {}).get("features") or {}
    return {name: feature["names"] for name, feature in features.items() if feature.get("_type") == "ClassLabel"}


def _texts(column: Any, names: list[str] | None) -> list[str]:
    values = column.to_pylist()
    if names is not None:
        return ["" if value is None or value < 0 else names[value] for value in values]
    return [value.strip() if isinstance(value, str) else _text(value) for value in values]


def _text(value: Any) -> str:
    """A value as a CSV has it."""
    if value is None or value != value:  # nan
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value, default=str) if isinstance(value, dict | list) else str(value).strip()


def _table(file: Path, rows: list[dict], wanted: Columns, found: list[str] | None = None) -> Table:
    """Rows with their columns by the usual names, and values as a CSV has them."""
    if found is None:
        found = list(dict.fromkeys(name for row in rows for name in row))
        rows = [{name: _text(row.get(name)) for name in found} for row in rows]
    columns = usual_names(found, wanted, FIELD_ALIASES, file)
    pairs = [(name, usual) for name, usual in zip(found, columns) if usual]
    return Table(found, [usual for _, usual in pairs], [{usual: row[name] for name, usual in pairs} for row in rows])
