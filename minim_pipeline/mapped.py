"""Tensors that lie on disk: made part by part, and read where they are asked for, so that memory does not grow.

They are files of safetensors, each of some rows of the tensor, a shard. A shard is there whole or not at all, and says
what it was made from, so that what was stopped goes on with the next one.
"""

import hashlib
import json
import mmap
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import PartialState
from safetensors import safe_open
from torch import Tensor

from .disk import whole_file


SHARDS = 64  # at most, of one tensor: a run that is killed loses no more of its work, and each is an open file
TYPES = {"U8": np.uint8, "F16": np.float16, "F32": np.float32}  # as safetensors calls them
NAME = "rows"  # of the tensor in each file
DROP = getattr(mmap, "MADV_DONTNEED", None)  # Windows has none
Item = TypeVar("Item")
Part = TypeVar("Part")
Some = TypeVar("Some", Tensor, "MappedTensor", "Tensor | MappedTensor")


class MappedTensor:
    """A tensor [N, ...] in files, of which nothing stays in memory but what was asked for.

    Args:
        files: of its rows, as `map_parts` writes them, one after the other.
        rows: int64 [N], which of them; default: all.
    """

    def __init__(self, files: Sequence[Path], rows: np.ndarray | None = None):
        self.files = list(files)
        self.parts = [_map(file) for file in self.files]
        self.ends = np.cumsum([len(array) for array, _ in self.parts])
        self.rows = np.arange(self.ends[-1]) if rows is None else rows
        array = self.parts[0][0]
        self.shape = torch.Size((len(self.rows), *array.shape[1:]))
        self.dtype = torch.from_numpy(array[:0].copy()).dtype
        self.nbytes = self.shape.numel() * self.dtype.itemsize

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def device(self) -> torch.device:
        """Of what is read."""
        return torch.device("cpu")

    def select(self, index) -> "MappedTensor":
        """Rows by a slice, numbers or a mask, not read yet."""
        other = object.__new__(MappedTensor)
        vars(other).update(vars(self))
        other.rows = self.rows[np.asarray(index) if not isinstance(index, slice) else index]
        other.shape = torch.Size((len(other.rows), *self.shape[1:]))
        other.nbytes = other.shape.numel() * self.dtype.itemsize
        return other

    def join(self, other: "MappedTensor") -> "MappedTensor":
        """These rows, and behind them those of another tensor of the same shape and type."""
        return MappedTensor(self.files + other.files, np.concatenate([self.rows, other.rows + self.ends[-1]]))

    def __getitem__(self, index) -> Tensor:
        """Rows in memory, by a number, a slice, numbers or a mask; `[rows, columns]` takes a column of each row."""
        index, *columns = index if isinstance(index, tuple) else (index,)
        rows = self.rows[index if isinstance(index, slice | int) else np.asarray(index)]
        places = np.atleast_1d(rows)
        columns = [np.broadcast_to(np.asarray(column), places.shape) for column in columns]
        found = np.empty((len(places), *self.shape[1 + len(columns) :]), self.parts[0][0].dtype)
        part_of = np.searchsorted(self.ends, places, side="right")
        for part in np.unique(part_of):
            (own,), (array, memory) = np.nonzero(part_of == part), self.parts[part]
            first = self.ends[part] - len(array)
            for place, *wanted in zip(own, places[own] - first, *(column[own] for column in columns), strict=True):
                found[place] = array[tuple(wanted)]
            if DROP is not None:
                # It need not stay in this process; the system keeps of the file what it has room for.
                memory.madvise(DROP)
        return torch.from_numpy(found[0] if np.ndim(rows) == 0 else found)

    def split(self, size: int) -> Iterator[Tensor]:
        """All rows, at most `size` at a time."""
        return blocks(self, size)

    def to(self, device: torch.device | str, rows_at_once: int = 256) -> Tensor:
        """All rows, on a device: the memory of the machine holds some of them at a time."""
        held = torch.empty(self.shape, dtype=self.dtype, device=device)
        for part, place in zip(self.split(rows_at_once), held.split(rows_at_once), strict=True):
            place.copy_(part)
        return held


@dataclass(frozen=True)
class Computed:
    """Rows that are made, by a slice of their numbers, where they are asked for."""

    count: int
    make: Callable[[slice], Tensor]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, part: slice) -> Tensor:
        return self.make(part)


Rows = Tensor | MappedTensor  # rows in memory, or on disk


def blocks(rows: Rows | Computed, size: int) -> Iterator[Tensor]:
    """All rows, at most `size` at a time."""
    for start in range(0, len(rows), size):
        yield rows[start : min(start + size, len(rows))]


def select(rows: Some, index) -> Some:
    """Some rows by a slice, numbers or a mask; those on disk are not read yet."""
    return rows.select(index) if isinstance(rows, MappedTensor) else rows[index]


def map_parts(
    path: Path,
    key: Any,
    count: int,
    size: int,
    make: Callable[[list[slice]], Iterable[Tensor]],
    alone: bool = False,
    most_files: int | None = None,
) -> tuple[MappedTensor, bool]:
    """A tensor of `count` rows in files beside `path`, of which every process makes its share.

    A file that is there is kept if it was made under the same key; the rows in it, and the bits, do not depend on the
    number of processes.

    Args:
        path: without an ending; the files are `path-K-of-N.safetensors`.
        key: anything that JSON can say, of all that the tensor depends on.
        size: rows that are made together.
        make: given the parts that are missing, of `size` rows each but the last, in order, gives the rows of each.
        alone: this process makes all of it, and the others know nothing of it.
        most_files: default: `SHARDS`.

    Returns:
        The tensor, and whether files that were made under another key were made anew.
    """
    state = PartialState()
    rank, world = (0, 1) if alone else (state.process_index, state.num_processes)
    parts = [slice(start, min(start + size, count)) for start in range(0, count, size)]
    shards = [
        [parts[i] for i in own] for own in np.array_split(range(len(parts)), min(most_files or SHARDS, len(parts)))
    ]
    files = [path.with_name(f"{path.name}-{i}-of-{len(shards)}.safetensors") for i in range(len(shards))]
    digest = hashlib.sha256(json.dumps([key, size, count], sort_keys=True, default=str).encode()).hexdigest()
    missing = [i for i in range(rank, len(shards), world) if _key_of(files[i]) != digest]
    other = any(files[i].is_file() for i in missing)
    if rank == 0:
        for file in files_of(path):
            if file not in files:
                file.unlink()
                other = True
    made = iter(make([part for i in missing for part in shards[i]]))
    left = sum(part.stop - part.start for i in missing for part in shards[i])
    for i in missing:
        rows = shards[i][-1].stop - shards[i][0].start
        _write(files[i], islice(made, len(shards[i])), rows, left, digest)
        left -= rows
    if not alone:
        state.wait_for_everyone()
    return MappedTensor(files), other


def derive(rows: Rows, name: str, size: int, function: Callable[[Tensor], Tensor], alone: bool = True) -> Rows:
    """What `function` makes of rows, `size` at a time: in memory if these are, else on disk beside them.

    Args:
        name: of the files.
        alone: as of `map_parts`.
    """
    if isinstance(rows, Tensor):
        return torch.cat([function(part) for part in rows.split(size)])
    key = [list(map(str, rows.files)), hashlib.sha256(rows.rows.tobytes()).hexdigest()]
    path, files = rows.files[0].with_name(name), 1 if alone else None
    return map_parts(path, key, len(rows), size, lambda parts: (function(rows[p]) for p in parts), alone, files)[0]


def files_of(path: Path) -> list[Path]:
    """The files that `map_parts` has written for `path`."""
    name = re.compile(re.escape(path.name) + r"-\d+-of-\d+\.safetensors")
    return [file for file in path.parent.glob("*.safetensors") if name.fullmatch(file.name)]


def _key_of(file: Path) -> str | None:
    if not file.is_file():
        return None
    with safe_open(file, "pt") as stored:
        return (stored.metadata() or {}).get("key")


def _write(file: Path, parts: Iterator[Tensor], rows: int, left: int, key: str) -> None:
    """A file of `rows` rows, as safetensors has them but part by part; there has to be room for `left` rows."""
    first = next(parts)
    shape, kind = (rows, *first.shape[1:]), next(k for k, v in TYPES.items() if v == first.numpy().dtype)
    row = first[0].nbytes
    entry = {"dtype": kind, "shape": shape, "data_offsets": [0, rows * row]}
    header = json.dumps({"__metadata__": {"key": key}, NAME: entry}).encode()
    header += b" " * (-len(header) % 8)
    with whole_file(file, left * row) as unfinished, open(unfinished, "wb") as opened, ThreadPoolExecutor(1) as pool:
        writing = pool.submit(opened.write, len(header).to_bytes(8, "little") + header)
        for part in chain([first], parts):  # a part is written while the next one is made
            writing.result()
            writing = pool.submit(opened.write, part.contiguous().numpy().data)
        writing.result()


def _map(file: Path) -> tuple[np.ndarray, mmap.mmap]:
    with open(file, "rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        entry = json.loads(opened.read(size))[NAME]
        memory = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    array = np.frombuffer(memory, TYPES[entry["dtype"]], offset=8 + size)
    return array.reshape(entry["shape"]), memory


def ahead(items: Iterable[Item], make: Callable[[Item], Part]) -> Iterator[Part]:
    """What `make` gives of each item, the next of which is made in a thread while this one is used."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for item in items:
            following = pool.submit(make, item)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()
