"""One run a folder: who comes second is told so, before anything is drawn."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


LOCK_FILE = ".lock"
PATIENCE = 0.2  # seconds, for a run that has just ended and is about to take its lock away


@contextmanager
def locked(folder: str | Path, state=None) -> Iterator[None]:
    """Keeps other runs out of `folder`, which is made if missing, and goes again if it stays empty.

    The operating system holds the lock, so that nothing stays locked when a process is killed. It holds between
    machines where the file system does (NFS from version 4 on); where it cannot lock, a warning says so.

    Args:
        folder: for which a run that lasts as long as the context.
        state: accelerate's `PartialState` where several processes share the run: the main one locks for all.

    Raises:
        ValueError: another run has the folder now. All processes of `state` raise it.
    """
    folder, lock = Path(folder), FileLock(Path(folder) / LOCK_FILE, timeout=PATIENCE)
    places = [folder, *folder.absolute().parents]
    made: list[Path] = []
    problem: list[str | None] = [None]
    main = state is None or state.is_main_process
    if main:
        made = [place for place in places if not place.exists()]
        try:
            _acquire(lock, folder)
        except Timeout:
            problem = [f"another run is writing to {folder} now: wait for its end, or choose another folder."]
        except (FileExistsError, NotADirectoryError):
            problem = [f"{next(place for place in places if place.exists())} is a file, not a folder."]
    if state is not None and state.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(problem)
    if problem[0]:
        raise ValueError(problem[0])
    try:
        yield
    finally:
        if main:
            # Removed while it is held: who opened it meanwhile finds out, and opens the next.
            (folder / LOCK_FILE).unlink(missing_ok=True)
            with suppress(OSError):  # there is something in it
                for place in made:
                    place.rmdir()
            lock.release()


@contextmanager
def held(file: Path) -> Iterator[bool]:
    """Whether the lock `file` was free; if so, this process has it as long as the context lasts.

    As `locked`, for a part of a folder whose other parts other processes may write to.
    """
    lock = FileLock(file, timeout=0)
    try:
        _acquire(lock, file.parent)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        file.unlink(missing_ok=True)  # while it is held, as above
        lock.release()


def _acquire(lock: FileLock, folder: Path) -> None:
    """Takes the lock, in a folder that another run may take away at any moment; raises Timeout if it is held."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except FileNotFoundError:
            continue
        except (Timeout, FileExistsError, NotADirectoryError):
            raise
        except OSError as error:
            warnings.warn(f"{folder} cannot be locked ({error}): let no other run write to it.", stacklevel=4)
        return
