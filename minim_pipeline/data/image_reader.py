"""The one reader of image files, for training, evaluation, scoring and the rating page.

A file becomes an image of 8 bits, grey or RGB, upright and opaque, with notes on what was done to it. What its values
mean is decided over the whole data set that it is of (`looks.survey`): all files of a modality are scaled alike.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .dicom import is_dicom, read_dicom
from .image_files import file_states, opened
from .image_pixels import AS_ASKED, Found, check_reading, decode_picture, found_in, to_8_bits, told
from .table import Columns


# Raised when the same file comes out otherwise than before: what was kept of it (`images_key`) is made anew then.
READER_VERSION = 1


@dataclass(frozen=True)
class Reading:
    """How images are read; ValueError for a way that there is not.

    Args:
        fit: what becomes of an image that is not square: `"stretch"`, `"crop"` or `"pad"`.
        window: of pixels of more than 8 bits, the values that become black and white; None finds them out.
        modality, image_root, columns: with which `read_dataset` gave the rows at hand, so that all other images of
            their table are found: they are scaled alike.
    """

    fit: str = "stretch"
    window: tuple[float, float] | None = None
    modality: str | None = None
    image_root: str | None = None
    columns: Columns = Columns()

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
    pixels, notes = read_pixels(path, window)
    if found is None:
        found = found_in(pixels) if isinstance(pixels, np.ndarray) else Found()
    return to_8_bits(pixels, notes, found, modality, window)


def read_pixels(
    path: str | Path, window: tuple[float, float] | None = None
) -> tuple[Image.Image | np.ndarray, list[str]]:
    """What `decode_picture` gives of a file, or the image of mode L or RGB that DICOM is; raises as `read_image`."""
    try:
        if is_dicom(path):
            return read_dicom(path, window)
        with open_picture(path) as file:
            return decode_picture(file, lambda: open_picture(path))
    except (FileNotFoundError, ImportError):
        raise
    except Exception as error:  # decoders raise many types: OSError, SyntaxError, ValueError, struct.error, ...
        raise ValueError(f"broken image {path} ({error})") from error


def open_picture(path: str | Path) -> Image.Image:
    """As `Image.open`, of a part of a larger file, too."""
    return Image.open(opened(path))


def files_key(files: Iterable[str | Path]) -> str:
    """A digest of files, or parts of some: of each, the path, free of links to folders, and the state."""
    digest, folders = hashlib.sha256(), dict[str, str]()
    files = list(files)
    for file, state in zip(files, file_states(files)):
        folder, name = os.path.split(file)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        digest.update(json.dumps([f"{folders[folder]}/{name}", state]).encode())
    return digest.hexdigest()


def images_key(rows: list[dict], files: Iterable[str], found: Mapping[str, Found], reading: Reading) -> str:
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
