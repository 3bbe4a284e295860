"""The one reader of image files, for training, evaluation, scoring and the rating page.

A file becomes an image of 8 bits, grey or RGB, upright and opaque, with notes on what was done to it. What its values
mean is decided over the whole data set that it is of (`survey`): all files of a modality are scaled alike.
"""

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .dicom import is_dicom, read_dicom
from .image_pixels import AS_ASKED, Found, check_reading, decode_picture, found_in, is_deep, to_8_bits, told


# Raised when the same file comes out otherwise than before: what was kept of it (`images_key`) is made anew then.
READER_VERSION = 1


@dataclass(frozen=True)
class Reading:
    """How images are read; ValueError for a way that there is not.

    Args:
        fit: what becomes of an image that is not square: `"stretch"`, `"crop"` or `"pad"`.
        window: of pixels of more than 8 bits, the values that become black and white; None finds them out.
        modality, image_root: with which `read_csv` gave the rows at hand, so that all other images of their CSV are
            found: they are scaled alike.
    """

    fit: str = "stretch"
    window: tuple[float, float] | None = None
    modality: str | None = None
    image_root: str | None = None

    def __post_init__(self):
        check_reading(self.fit, self.window)


DEFAULT_READING = Reading()


def read_image(
    path: str | Path, modality: str, found: Found | None = None, window: tuple[float, float] | None = None
) -> tuple[Image.Image, list[str]]:
    """The pixels of a file, as an image of mode L or RGB, and notes on what was done to them.

    Args:
        path: any image that Pillow reads, or a DICOM file.
        modality: id of what it shows.
        found: what `survey` found in its data set; None takes the file alone.
        window: values that become black and white in an image of more than 8 bits.

    Raises:
        OSError, ValueError: there is no such image, it is broken, or its values cannot be known.
        ImportError: it is DICOM, and pydicom is missing.
    """
    try:
        if is_dicom(path):
            return read_dicom(path, window)
        with Image.open(path) as file:
            pixels, notes = decode_picture(file)
    except (FileNotFoundError, ImportError):
        raise
    except Exception as error:  # decoders raise many types: OSError, SyntaxError, ValueError, struct.error, ...
        raise ValueError(f"broken image {path} ({error})") from error
    if found is None:
        found = found_in(pixels) if isinstance(pixels, np.ndarray) else Found()
    return to_8_bits(pixels, notes, found, modality, window)


def image_problem(path: Path) -> str | None:
    """What is wrong with a file as an image; None if it can be read."""
    if not path.is_file():
        return f"no image {path}"
    try:
        # Any window will do: what the values mean is asked where the whole data set is known.
        read_image(path, "", window=None if is_dicom(path) else (0, 1))
    except ValueError as error:
        return str(error)
    return None


def survey(files: Iterable[tuple[Path, str]]) -> dict[str, Found]:
    """What lies in the pixels of more than 8 bits of a data set, by modality; other files are only opened.

    `files`: path and modality's id of each. Those that cannot be read are passed over: whoever reads them is told.
    """

    def look(file: tuple[Path, str]) -> Found:
        with suppress(Exception):
            if not is_dicom(file[0]):
                with Image.open(file[0]) as image:
                    pixels = decode_picture(image)[0] if is_deep(image) else None
                return found_in(pixels) if isinstance(pixels, np.ndarray) else Found()
        return Found()

    files = list(files)
    found: dict[str, Found] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (_, modality), own in zip(files, pool.map(look, files)):
            found[modality] = found.get(modality, Found()) | own
    return found


def file_keys(paths: Sequence[Path]) -> list[str]:
    """A key for each path, the same for the same file or content. Only files that share their size are read."""
    places = [path.resolve() for path in paths]
    distinct = list(dict.fromkeys(places))
    sizes = {path: path.stat().st_size for path in distinct}
    shared = Counter(sizes.values())

    def key(path: Path) -> str:
        if shared[sizes[path]] == 1:
            return str(path)
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor() as pool:
        keys = dict(zip(distinct, pool.map(key, distinct), strict=True))
    return [keys[path] for path in places]


def files_key(files: Iterable[Path]) -> str:
    """A digest of files: of each, the resolved path and the state."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(json.dumps([str(file.resolve()), file_state(file)]).encode())
    return digest.hexdigest()


def file_state(path: Path) -> tuple[int, int] | None:
    """Size and time of the last change; None if there is no such file."""
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_size, state.st_mtime_ns


def images_key(rows: list[dict], files: list[Path], found: Mapping[str, Found], reading: Reading) -> str:
    """A digest that changes whenever what `rows` say, or the images in `files` as they are read, may have changed."""
    scales = sorted((name, astuple(values)) for name, values in found.items())
    key = [READER_VERSION, astuple(reading), scales, rows, files_key(files)]
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()


def tell(notes: Mapping[str, int], total: int, source: str | Path, reading: Reading = DEFAULT_READING) -> None:
    """Says on stderr what was done to the images of `source`; where several processes run, the first one does."""
    if os.environ.get("RANK", "0") != "0":
        return
    lines = told(notes.items(), total)
    if reading.window is not None and not any(AS_ASKED in note for note in notes):
        lines.append("warning: no image has more than 8 bits a pixel, so the window changed nothing")
    for line in lines:
        print(f"{source}: {line}", file=sys.stderr)
