"""Where the bytes of an image lie: in a file of its own, or as a part of a larger one.

A part has an address that reads like a path, so that whatever holds paths holds it as well, relative ones, too:

    shard-000.tar#0001.png          a file in a tar
    part-000.parquet#image/17       row 17 (from 0) of the column `image` of a Parquet file
    data-000.arrow#image/17         the same of an Arrow file, as the library `datasets` keeps them

Tar and Arrow files hold the bytes as they are: they are read from there, and nothing else of the file is. Parquet is
compressed; `datasets` unpacks it once into its cache.
"""

import glob
import io
import os
import re
import tarfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


_PART = re.compile(r"(.+\.(?:tar|parquet|arrow))#(.+)", re.DOTALL)
_EXTRA = "pip install 'minim-pipeline[datasets]'"
State = tuple[int, int]  # size in bytes, and time of the last change in ns
_lock = threading.Lock()  # a file is indexed once, however many threads ask


class Part(io.BytesIO):
    """The bytes of a part; messages that show it show its address."""

    def __init__(self, data: bytes, address: str | Path):
        super().__init__(data)
        self.address = str(address)

    def __repr__(self) -> str:
        return repr(self.address)


class Ranges(NamedTuple):
    """Of each row of a column, the file that holds its bytes, where they begin in it, and how many they are.

    `files` are those that `file` [N] counts; `start` and `size` [N] are in bytes, a size of -1 says that the row has
    none. `paths` are then the files that have them, as an image folder on the Hub is cached.
    """

    files: list[str]
    file: np.ndarray
    start: np.ndarray
    size: np.ndarray
    paths: dict[int, str]


def split_address(path: str | Path) -> tuple[str, str] | None:
    """The file that a part is of, and its name there; None if `path` is a file of its own."""
    found = _PART.fullmatch(str(path))
    return (found[1], found[2]) if found else None


def opened(path: str | Path) -> str | Part:
    """What Pillow and pydicom open: the path, or the bytes of a part.

    Raises:
        FileNotFoundError: there is no such part.
        ValueError: the file that it is of cannot be read.
        ImportError: that file needs a package that is not installed.
    """
    return str(path) if split_address(path) is None else Part(read_bytes(path), path)


def read_bytes(path: str | Path, most: int = -1) -> bytes:
    """The bytes of an image, or the first `most` of them; raises as `opened`."""
    file, start, size = locate(path)
    with open(file, "rb") as handle:
        handle.seek(start)
        return handle.read(size if most < 0 or 0 <= size < most else most)


def locate(path: str | Path) -> tuple[str, int, int]:
    """The file that holds an image, where it begins there, and its size in bytes, -1 for all; raises as `opened`."""
    part = split_address(path)
    if part is None:
        return str(path), 0, -1
    file, name = part
    state = file_state(file)
    if state is None:
        raise FileNotFoundError(f"no image {path}")
    if file.endswith(".tar"):
        found = tar_index(file).get(name)
        if found is None:
            raise FileNotFoundError(f"no image {path}")
        return file, *found
    column, _, row = name.rpartition("/")
    with _lock:
        ranges = _ranges(file, column, state)
    if not row.isdigit() or int(row) >= len(ranges.size):
        raise FileNotFoundError(f"no image {path}")
    index = int(row)
    if ranges.size[index] < 0:
        if index not in ranges.paths:
            raise FileNotFoundError(f"no image {path}")
        return os.path.join(os.path.dirname(file), ranges.paths[index]), 0, -1
    return ranges.files[ranges.file[index]], int(ranges.start[index]), int(ranges.size[index])


def file_state(path: str | Path) -> State | None:
    """Size and time of the last change, of a part those of the file that it is of; None if there is no such file."""
    part = split_address(path)
    try:
        state = os.stat(part[0] if part else path)
    except OSError:
        return None
    return state.st_size, state.st_mtime_ns


def file_states(paths: Iterable[str | Path]) -> Iterator[State | None]:
    """`file_state` of each; a file that many are parts of is asked once."""
    known: dict[str, State | None] = {}
    for path in paths:
        part = split_address(path)
        if part is None:
            yield file_state(path)
        else:
            if part[0] not in known:
                known[part[0]] = file_state(part[0])
            yield known[part[0]]


def is_there(path: str | Path) -> bool:
    """Whether there is such an image; of a part, the file that it is of is looked for."""
    part = split_address(path)
    return os.path.isfile(part[0] if part else path)


def check_containers(paths: Iterable[str]) -> None:
    """Raises ValueError if a larger file that some images are parts of cannot be read: once, and not for each part."""
    for path in {part[0]: path for path in paths if (part := split_address(path))}.values():
        with suppress(FileNotFoundError):  # of this part alone
            locate(path)


def tar_index(file: str) -> dict[str, tuple[int, int]]:
    """Where each file in a tar begins, and its size in bytes, by name and in order.

    Raises ValueError if the tar is cut, compressed or none, FileNotFoundError if it is not there.
    """
    with _lock:
        return _tar_index(file, file_state(file))


@lru_cache(maxsize=1024)
def _tar_index(file: str, state: State | None) -> dict[str, tuple[int, int]]:
    try:
        with tarfile.open(file, "r:") as tar:
            found = {member.name: (member.offset_data, member.size) for member in tar if member.isfile()}
            # A whole one ends with blocks of zeros, of which tarfile does not ask.
            tar.fileobj.seek(tar.offset)
            if len(tar.fileobj.read(512)) < 512:
                raise tarfile.ReadError("unexpected end of data")
    except tarfile.TarError as error:
        raise ValueError(f"{file} is no whole tar file ({error}): it is cut, compressed or none.") from error
    return found


@lru_cache(maxsize=1024)
def _ranges(file: str, column: str, state: State) -> Ranges:
    files = unpack_parquet(file, column) if file.endswith(".parquet") else [file]
    parts = [_arrow_ranges(name, column) for name in files]
    counts = [len(part.size) for part in parts]
    paths = {row + sum(counts[:i]): path for i, part in enumerate(parts) for row, path in part.paths.items()}
    start, size = (np.concatenate([getattr(part, name) for part in parts]) for name in ("start", "size"))
    return Ranges(files, np.repeat(np.arange(len(files), dtype=np.uint16), counts), start, size, paths)


def _arrow_ranges(file: str, column: str) -> Ranges:
    """Where the images of an Arrow file begin: the addresses of a memory map are places in the file."""
    import pyarrow as pa

    starts, sizes, row = [np.empty(0, np.int64)], [np.empty(0, np.int64)], 0
    paths: dict[int, str] = {}
    with pa.memory_map(file) as source:
        first = source.read_buffer().address
        source.seek(0)
        for batch in pa.ipc.open_stream(source):
            images = batch.column(column)
            data = images.field("bytes") if pa.types.is_struct(images.type) else images
            wide = pa.types.is_large_binary(data.type) or pa.types.is_large_string(data.type)
            none = np.asarray(images.is_null()) | np.asarray(data.is_null())
            if not none.all():
                places = np.frombuffer(data.buffers()[1], np.int64 if wide else np.int32).astype(np.int64)
                places = places[data.offset : data.offset + len(data) + 1]
                starts.append(places[:-1] + data.buffers()[2].address - first)
                sizes.append(np.where(none, -1, np.diff(places)))
                if not 0 <= starts[-1][0] <= starts[-1][-1] + sizes[-1][-1] <= source.size():
                    raise ValueError(f"{file} is a compressed Arrow file: save it without compression.")
            else:
                starts.append(np.zeros(len(data), np.int64))
                sizes.append(np.full(len(data), -1))
            if none.any() and pa.types.is_struct(images.type):
                named = images.field("path").to_pylist()
                paths |= {row + int(i): named[i] for i in np.flatnonzero(none) if named[i]}
            row += len(data)
    return Ranges([file], np.zeros(row, np.uint16), np.concatenate(starts), np.concatenate(sizes), paths)


def unpack_parquet(file: str, column: str) -> list[str]:
    """The Arrow files in the cache of `datasets` that hold a column of a Parquet file; they are made if missing."""
    datasets = need("datasets", file)
    place, quiet = glob.escape(str(Path(file).resolve())), datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()  # one a file: whoever reads them has one for all
    try:
        table = datasets.load_dataset("parquet", data_files=place, split="train", columns=[column])
    except datasets.exceptions.DatasetGenerationError as error:
        why = " ".join(str(error.__cause__ or error).split())  # in one line
        raise ValueError(f"{file} cannot be read: {why}") from error
    finally:
        if not quiet:
            datasets.enable_progress_bars()
    return [part["filename"] for part in table.cache_files]


def need(package: str, file: str | Path) -> Any:
    """A package of the extra `datasets`; raises ImportError, which says what it is needed for, without it."""
    try:
        return __import__(package)
    except ImportError as error:
        raise ImportError(f"{file} needs {package}: {_EXTRA}.") from error
