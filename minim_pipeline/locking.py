"""One run a folder: who comes second is told so, before anything is drawn."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]  # mypy has no modules that may be missing

LOCK_FILE = ".lock"


@contextmanager
def locked(folder: str | Path, state=None) -> Iterator[None]:
    """Keeps other runs out of `folder`, which is made if missing, and goes again if it stays empty.

    The operating system holds the lock (`flock` on `.lock`), so that nothing stays locked when a process is killed.
    It holds between machines where the file system does (NFS from version 4 on); where it cannot lock, a warning says
    so. On Windows nothing is locked.

    Args:
        folder: for which a run that lasts as long as the context.
        state: accelerate's `PartialState` where several processes share the run: the main one locks for all.

    Raises:
        ValueError: another run has the folder now. All processes of `state` raise it.
    """
    folder, handle, made = Path(folder), None, []
    problem: list[str | None] = [None]
    if state is None or state.is_main_process:
        made = [place for place in (folder, *folder.absolute().parents) if not place.exists()]
        try:
            handle = _lock(folder)
        except BlockingIOError:
            problem = [f"another run is writing to {folder} now: wait for its end, or choose another folder."]
        except (FileExistsError, NotADirectoryError):
            nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
            problem = [f"{nearest} is a file, not a folder."]
    if state is not None and state.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(problem)
    if problem[0]:
        raise ValueError(problem[0])
    try:
        yield
    finally:
        if handle is not None:
            # Removed while it is held: who opened it meanwhile finds out, and opens the next.
            (folder / LOCK_FILE).unlink(missing_ok=True)
            for place in made:
                try:
                    place.rmdir()
                except OSError:  # there is something in it
                    break
            os.close(handle)


def _lock(folder: Path) -> int:
    """The handle that holds the lock; raises BlockingIOError if another process has it."""
    file = folder / LOCK_FILE
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # an empty folder that another run has just taken away
            continue
        try:
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise
        except OSError as error:
            warnings.warn(f"{folder} cannot be locked ({error}): let no other run write to it.", stacklevel=4)
        try:
            if os.path.samestat(os.fstat(handle), os.stat(file)):
                return handle
        except FileNotFoundError:
            pass
        os.close(handle)  # the run before has just ended, and taken the file with it
