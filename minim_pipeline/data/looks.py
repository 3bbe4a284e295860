"""One look at every image before it is used: whether it can be read, how deep it is, and what its content is.

Each is opened once for all three. Of large data sets what was found is kept under `HF_HOME`, so that the next command
looks only at images that are new or have changed.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from filelock import FileLock
from huggingface_hub.constants import HF_HOME
from tqdm import tqdm

from ..files import atomic_path
from .dicom import is_dicom
from .image_files import State, check_containers, file_state, file_states, is_there, locate, read_bytes, split_address
from .image_pixels import Found, decode_picture, found_in, is_deep
from .image_reader import READER_VERSION, open_picture, read_pixels


MANY = 1000  # images from which on what was found is kept on disk: of fewer, looking again takes no time

Item = TypeVar("Item")
Result = TypeVar("Result")
_SHALLOW = Found()  # of 8 bits a pixel


class Look(NamedTuple):
    """What an image in a certain state was found to be.

    Args:
        state: its size and time of change; None if it is not there.
        found: least and greatest value, if it has more than 8 bits a pixel and is no DICOM file.
        digest: the first 16 bytes of SHA-256 of its bytes; empty if it was not read as a whole.
        problem: what is wrong with it; None if it can be read.
    """

    state: State | None
    found: Found = _SHALLOW
    digest: bytes = b""
    problem: str | None = None


_seen: dict[str, Look] = {}  # by path, in this process
_recalled: dict[Path, State | None] = {}  # stores that were read, and in which state


def unseen(paths: Iterable[str], whole: bool = True) -> list[str]:
    """Those of images that nobody looked at, that have changed since, or could not be read.

    `whole`: and those of which only the beginning was read.
    """
    paths = list(dict.fromkeys(paths))
    looks = zip(paths, map(_seen.get, paths), file_states(paths))
    return [
        path
        for path, look, state in looks
        if look is None or look.problem is not None or look.state != state or (whole and not look.digest)
    ]


def problems(paths: Iterable[str], source: str | Path, all_of_them: bool = True) -> dict[str, str]:
    """What is wrong with the images of the table `source`, by path; those that can be read are left out.

    Args:
        all_of_them: look into every image; `False` stops at once if some are not there, and tells these.

    Raises:
        ValueError: a larger file that some of them are parts of cannot be read.
        ImportError: one is DICOM, and pydicom is missing, or such a file needs another package.
    """
    new = unseen(paths)
    gone = {path: f"no image {path}" for path in new if not is_there(path)}
    if gone and not all_of_them:
        return gone
    new = [path for path in new if path not in gone]
    _look_at(new, source)
    return gone | {path: problem for path in new if (problem := _seen[path].problem)}


def _look_at(paths: list[str], source: str | Path) -> None:
    """Looks at images, in threads; where they are many, with what is kept on disk of the table `source`."""
    home = Path(HF_HOME, "minim", "looks")
    kept = len(paths) >= MANY and _can_write(home)
    # Paths are as they were given: relative ones, and so their stores, are of the folder that the command runs in.
    place = f"{os.getcwd()} {source}"
    store = home / f"{hashlib.sha256(place.encode()).hexdigest()[:32]}.json"
    # One process looks; others that run the same command wait, and read what it found.
    with FileLock(f"{store}.lock") if kept else nullcontext():
        if kept:
            _recall(store)
            paths = unseen(paths)
        check_containers(paths)
        looks = tqdm(in_threads(_look, paths), "looking at images", len(paths), disable=None if kept else True)
        _seen.update(zip(paths, looks))
        if kept and paths:
            _keep(store, paths)


def _look(path: str) -> Look:
    state = file_state(path)
    try:
        pixels, _ = read_pixels(path)
        found = found_in(pixels) if isinstance(pixels, np.ndarray) else _SHALLOW
        return Look(state, found, _digest(path))
    except (FileNotFoundError, ValueError) as error:
        return Look(state, problem=str(error))


def _digest(path: str) -> bytes:
    return hashlib.sha256(read_bytes(path)).digest()[:16]


def in_threads(function: Callable[[Item], Result], items: Sequence[Item], at_once: int = 32) -> Iterator[Result]:
    """`function` of each item, in order; some at once, as a thread's task takes a kilobyte until it is asked for."""
    parts = [items[i : i + at_once] for i in range(0, len(items), at_once)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for results in pool.map(lambda part: [function(item) for item in part], parts):
            yield from results


def _can_write(folder: Path) -> bool:
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return os.access(folder, os.W_OK)


def _keep(store: Path, paths: Iterable[str]) -> None:
    """Adds to a store what was found of images that can be read."""
    kept = {}
    if store.is_file() and (content := json.loads(store.read_text()))["version"] == READER_VERSION:
        kept = content["images"]
    for path in paths:
        look = _seen[path]
        if look.problem is None:
            kept[path] = [look.state, (look.found.whole, look.found.real), look.digest.hex()]
    with atomic_path(store) as temporary:
        temporary.write_text(json.dumps({"version": READER_VERSION, "images": kept}))


def _recall(store: Path) -> None:
    """Knows again what a store has of images; whether they are still the same, `unseen` finds out."""
    state = file_state(store)
    if state is None or _recalled.get(store) == state:
        return
    content = json.loads(store.read_text())
    if content["version"] == READER_VERSION:
        for path, ((size, changed), ends, digest) in content["images"].items():
            found = Found(*(tuple(pair) if pair else None for pair in ends)) if any(ends) else _SHALLOW
            _seen.setdefault(path, Look((size, changed), found, bytes.fromhex(digest)))
    _recalled[store] = state


def survey(files: Mapping[str, str]) -> dict[str, Found]:
    """What lies in the pixels of more than 8 bits of a data set, by modality.

    Images that nobody looked at are opened, and decoded only if they have more than 8 bits; those that cannot be read
    are passed over: whoever reads them is told.

    `files`: the modality's id of each image, by path.
    """

    def look(path: str) -> Look:
        state = file_state(path)
        with suppress(Exception):
            if not is_dicom(path):
                with open_picture(path) as image:
                    pixels = decode_picture(image, lambda: open_picture(path))[0] if is_deep(image) else None
                return Look(state, found_in(pixels) if isinstance(pixels, np.ndarray) else _SHALLOW)
        return Look(state)

    new = unseen(files, whole=False)
    _seen.update(zip(new, in_threads(look, new)))
    found: dict[str, Found] = {}
    for path, modality in files.items():
        found[modality] = found.get(modality, _SHALLOW) | _seen[path].found
    return found


def file_keys(paths: Sequence[str | Path]) -> list[str]:
    """A key for each path, the same for the same file or content. Only images that share their size are read.

    And of these only the ones that nobody has looked at.
    """
    sizes, places = dict[str, int](), dict[str, str]()
    names = [str(path) for path in paths]
    for path in dict.fromkeys(names):
        if split_address(path) is None:
            state = os.stat(path)
            places[path], sizes[path] = f"{state.st_dev}:{state.st_ino}", state.st_size
        else:
            places[path], sizes[path] = path, locate(path)[2]
    # Of one file by several names one stands for all.
    by_place = {place: path for path, place in places.items()}
    shared = Counter(sizes[path] for path in by_place.values())
    alike = {path: place for place, path in by_place.items() if shared[sizes[path]] > 1}
    new = unseen(alike)
    digests = {path: _seen[path].digest for path in alike if path in _seen} | dict(zip(new, in_threads(_digest, new)))
    keys = {place: digests[path].hex() if path in alike else place for place, path in by_place.items()}
    return [keys[places[path]] for path in names]
