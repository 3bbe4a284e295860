"""A plan as a table, in Parquet: an image a row, of a run of any size, which processes and machines can share.

pyarrow, of the extra `bulk`, is imported where there is such a plan.
"""

import errno
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..captions import check_caption
from ..modalities import resolve_modality
from .plan import Item, Request
from .storage import Storage


SHARD_SIZE = 8192  # images
NEEDED = ("id", "prompt", "modality", "seed")
# What the files of a run say of an image by themselves: columns of these names speak of another one.
TAKEN = {*NEEDED, "image", "file_name", "caption", "provenance", "score", "accepted", "candidates", "drawn_seed"}


@dataclass(frozen=True)
class Plan:
    """The images to draw.

    Attributes:
        table: a `pyarrow.Table` with the columns `id` (int64, each once), `prompt`, `modality` (an id, a name or an
            alias), `seed` (int64: image `id` is drawn from it alone), and columns of strings to carry through, such as
            `finding`. Strings are dictionaries, so that a million rows are some 20 MB.
        settings: what its images are drawn with, as far as the file says so: `model`, `revision`, ...
    """

    table: Any
    settings: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.table.num_rows

    @property
    def carried(self) -> list[str]:
        """The columns beyond those that are needed."""
        return [name for name in self.table.column_names if name not in NEEDED]

    @property
    def digits(self) -> int:
        """Of the images' names, so that they sort."""
        from pyarrow import compute

        return max(4, len(str(compute.max(self.table["id"]).as_py())))

    def items(self, start: int, stop: int) -> list[Item]:
        """The images of rows `start` to `stop`, without that itself."""
        return [
            Item(
                row["id"],
                row["prompt"],
                resolve_modality(row["modality"]),
                row["seed"],
                {name: row[name] or "" for name in self.carried},
            )
            for row in self.table.slice(start, stop - start).to_pylist()
        ]

    def distinct(self) -> tuple[list[str], list[str]]:
        """The prompts and the modalities of them, each pair once."""
        pairs = self.table.select(["prompt", "modality"]).group_by(["prompt", "modality"]).aggregate([])
        return pairs["prompt"].to_pylist(), pairs["modality"].to_pylist()


def make_plan(requests: Sequence[Request]) -> Plan:
    """The plan of what is asked for, image after image, with ids from 0 on; the same at any time and place.

    Columns to carry through whose names are taken are called `source_...`; what is empty there is null.
    """
    pa = _pyarrow()
    counts = np.array([request.count for request in requests], np.int64)
    rows = np.repeat(np.arange(len(requests), dtype=np.int32), counts)
    within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)

    def column(values: list[str | None]):
        return pa.DictionaryArray.from_arrays(rows, pa.array(values, pa.string()))

    columns = {
        "id": pa.array(np.arange(len(rows))),
        "prompt": column([request.text for request in requests]),
        "modality": column([request.modality.id for request in requests]),
        "seed": pa.array(np.array([request.seed for request in requests], np.int64)[rows] + within),
    }
    for name in dict.fromkeys(name for request in requests for name in request.extra):
        own = f"source_{name}" if name in TAKEN or name.startswith("rejected_") else name
        columns[own] = column([request.extra.get(name) or None for request in requests])
    return Plan(pa.table(columns))


def write_plan(plan: Plan, file: str | Path | BinaryIO) -> None:
    """Writes a plan as Parquet, in row groups of `SHARD_SIZE`; its settings are in the schema, as JSON."""
    pa = _pyarrow()
    from pyarrow import parquet

    types = {name: pa.int64() if name in ("id", "seed") else pa.string() for name in plan.table.column_names}
    schema = pa.schema(list(types.items()), {"minim": json.dumps(plan.settings)})
    with parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        for start in range(0, len(plan), SHARD_SIZE):  # else all of a dictionary would stand in every group
            writer.write_table(plan.table.slice(start, SHARD_SIZE).cast(schema))


def read_plan(source: str | Path | BinaryIO, trained: list[str] | None = None, name: str | None = None) -> Plan:
    """A plan from a Parquet file that `write_plan` or anybody else has written.

    Args:
        source: a path, a URL that fsspec knows, or an open file.
        trained: ids of the modalities that the model has learned.
        name: of the file, for messages; by default the path.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no Parquet file, lacks a column, has no rows; an id stands twice; a value is missing, or
            none that is possible. The message is one line, with the first of what is wrong.
    """
    if not isinstance(source, str | Path):
        plan, name = _read(source, name or "the plan"), name or "the plan"
    else:
        name = name or str(source)
        folder, file = os.path.split(source)  # of a URL, too
        if (content := Storage(folder).read(file)) is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        plan = _read(io.BytesIO(content), name)
    _check(plan, name, trained)
    return plan


def _read(file: BinaryIO, name: str) -> Plan:
    pa = _pyarrow()
    from pyarrow import parquet

    try:
        schema = parquet.read_schema(file)
        strings = [
            part.name for part in schema if pa.types.is_string(part.type) or pa.types.is_large_string(part.type)
        ]
        table = parquet.ParquetFile(file, read_dictionary=strings).read()
        settings = json.loads((schema.metadata or {}).get(b"minim", b"{}"))
    except (pa.ArrowException, ValueError) as error:
        raise ValueError(f"{name} is no Parquet file of a plan: {' '.join(str(error).split())}") from error
    missing = [column for column in NEEDED if column not in table.column_names]
    if missing:
        found = ", ".join(map(repr, table.column_names))
        raise ValueError(f"{name} lacks the column {', '.join(map(repr, missing))}; found: {found}.")
    for column in ("id", "seed"):
        kind = schema.field(column).type
        if not pa.types.is_integer(kind):
            raise ValueError(f"{name}: column {column!r} has to be of whole numbers, got {kind}.")
    text = pa.dictionary(pa.int32(), pa.string())
    types = {part: pa.int64() if part in ("id", "seed") else text for part in table.column_names}
    try:
        table = table.cast(pa.schema(list(types.items()))).unify_dictionaries().combine_chunks()
    except pa.ArrowException as error:
        raise ValueError(f"{name} has a column of neither strings nor numbers that fit: {error}") from error
    return Plan(table, settings)


def _check(plan: Plan, name: str, trained: list[str] | None) -> None:
    from pyarrow import compute

    if not len(plan):
        raise ValueError(f"{name} has no rows: there is nothing to draw.")
    for column in NEEDED:
        if plan.table[column].null_count:
            raise ValueError(f"{name}: column {column!r} has {plan.table[column].null_count} empty values.")
    for column in ("id", "seed"):
        if (least := compute.min(plan.table[column]).as_py()) < 0:
            raise ValueError(f"{name}: {column} has to be at least 0, got {least}.")
    if compute.count_distinct(plan.table["id"]).as_py() < len(plan):
        counts = plan.table.group_by("id").aggregate([("id", "count")])
        twice = counts.filter(compute.greater(counts["id_count"], 1))["id"]
        raise ValueError(f"{name} has {len(twice)} ids more than once, such as {compute.min(twice)}.")
    prompts, modalities = plan.distinct()
    for prompt in dict.fromkeys(prompts):
        check_caption(prompt)
    for modality in dict.fromkeys(modalities):
        resolve_modality(modality, trained)


def difference(there: Plan, now: Plan) -> str | None:
    """In what two plans differ first, in words; None if all their rows are the same."""
    from pyarrow import compute

    if len(there) != len(now):
        return f"{len(there)} images there, {len(now)} now"
    if there.table.column_names != now.table.column_names:
        return f"columns: {', '.join(there.table.column_names)} there, {', '.join(now.table.column_names)} now"
    for name in now.table.column_names:
        kind = now.table.schema.field(name).type
        columns = [plan.table[name].cast(getattr(kind, "value_type", kind)) for plan in (there, now)]
        if not columns[0].equals(columns[1]):
            same = compute.fill_null(compute.equal(*columns), False)
            both = compute.and_(compute.is_null(columns[0]), compute.is_null(columns[1]))
            row = compute.index(compute.or_(same, both), False).as_py()
            return f"row {row} has {name}: {columns[0][row]!s} there, {columns[1][row]!s} now"
    return None


def setting_differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What settings that a plan or a run has noted are now, where that is something else."""
    names = [name for name in there if there[name] != now.get(name)]
    return [f"{name}: {there[name]!r} there, {now.get(name)!r} now" for name in names]


def _pyarrow():
    try:
        import pyarrow
    except ImportError as error:
        raise ImportError("shards need pyarrow: pip install 'minim-pipeline[bulk]'.") from error
    return pyarrow
