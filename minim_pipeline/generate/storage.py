"""Where the shards of a run go: a folder of this machine, or one behind a URL that fsspec knows.

Whatever appears there appears whole. Of a folder of images behind a URL that is so for the table beside them, which is
sent last.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from ..files import atomic_path
from ..locking import held


TABLE = "metadata.csv"  # of a folder of images


def is_url(place: str | Path) -> bool:
    return "://" in str(place)


class Storage:
    """A folder that names, such as `data/train-00000-of-00002.tar`, are relative to.

    Args:
        root: a path, or a URL such as `s3://bucket/set`.

    Raises:
        ValueError, ImportError: fsspec does not know the protocol, or needs a package for it.
    """

    def __init__(self, root: str | Path):
        self.root = str(root).rstrip("/")
        self.folder = None if is_url(root) else Path(root)
        if self.folder is None:
            from fsspec.core import url_to_fs

            self.fs, self._path = url_to_fs(self.root)

    def exists(self, name: str) -> bool:
        """Whether there is a file, or a folder of images with its table, of this name."""
        if self.folder is not None:
            return (self.folder / name).exists()
        with self._telling(name):
            self.fs.invalidate_cache()  # another machine may have written it
            return self.fs.isfile(f"{self._path}/{name}") or self.fs.isfile(f"{self._path}/{name}/{TABLE}")

    def read(self, name: str) -> bytes | None:
        """The content of a file; None if there is none."""
        if not self.exists(name):
            return None
        if self.folder is not None:
            return (self.folder / name).read_bytes()
        with self._telling(name):
            return self.fs.cat_file(f"{self._path}/{name}")

    def write(self, name: str, content: bytes) -> None:
        """Writes a file, whole or not at all, over one that is there."""
        if self.folder is not None:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(self.folder / name) as temporary:
                temporary.write_bytes(content)
        else:
            with self._telling(name):
                self.fs.pipe_file(f"{self._path}/{name}", content)

    def remove(self, name: str) -> None:
        """Takes a shard away, or of a folder behind a URL the table, if there is one."""
        if not self.exists(name):
            return
        if self.folder is not None:
            place = self.folder / name
            shutil.rmtree(place) if place.is_dir() else place.unlink()
            return
        with self._telling(name):
            path = f"{self._path}/{name}"
            self.fs.rm_file(path if self.fs.isfile(path) else f"{path}/{TABLE}")

    @contextmanager
    def shard(self, name: str, folder: bool, size: int = 0) -> Iterator[Path]:
        """A place of this machine to write a shard to, a file or a `folder`, which is then put where it belongs.

        What an earlier run has left of it is gone. If anything fails, nothing of it remains. Raises OSError if the
        disk has no room for `size` bytes, or is full, or the place behind the URL does not take the shard.
        """
        from ..disk import whole_file, whole_folder

        here = nullcontext(str(self.folder)) if self.folder else tempfile.TemporaryDirectory(prefix="minim-")
        with here as root:
            place = Path(root) / name
            with whole_folder(place, size) if folder else whole_file(place, size) as unfinished:
                yield unfinished
            if self.folder is None:
                self._send(place, name)

    def _send(self, place: Path, name: str) -> None:
        """Uploads a shard: the table of a folder last, since that says that all the rest is there."""
        with self._telling(name):
            if place.is_dir():
                files = sorted(path.name for path in place.iterdir() if path.name != TABLE)
                there = f"{self._path}/{name}"
                self.fs.put([str(place / file) for file in files], [f"{there}/{file}" for file in files])
                self.fs.put_file(str(place / TABLE), f"{there}/{TABLE}")
            else:
                self.fs.put_file(str(place), f"{self._path}/{name}")

    @contextmanager
    def only_here(self, name: str) -> Iterator[bool]:
        """Whether no other process of this machine, or of its network file system, is writing that shard now.

        Behind a URL nobody knows; two that write the same there write the same bytes.
        """
        if self.folder is None:
            yield True
            return
        with held((self.folder / name).with_name(f".{Path(name).name}.lock")) as free:
            yield free

    @contextmanager
    def _telling(self, name: str) -> Iterator[None]:
        """Whatever a client of some storage raises becomes an OSError that says where and why, in one line."""
        try:
            yield
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise OSError(f"{self.root}/{name} cannot be read or written: {reason}") from error
