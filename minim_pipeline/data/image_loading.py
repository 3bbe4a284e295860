"""Reads images as training and evaluation see them: one size, and without bars that somebody put around them."""

import os
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ..modalities import resolve_modality
from .formats import find_source
from .image_files import file_state
from .image_pixels import Found, as_modality, black_and_white, fit_to, named
from .image_reader import DEFAULT_READING, Reading, images_key, read_image, tell
from .looks import survey
from .sources import read_dataset, resolve_paths


def load_images(
    rows: list[dict],
    csv_path: str | Path,
    resolution: int,
    trim: bool = True,
    changes: Counter | None = None,
    reading: Reading = DEFAULT_READING,
    found: dict[str, Found] | None = None,
    progress: bool = True,
) -> torch.Tensor:
    """The images of `rows` as uint8 [N, 3, resolution, resolution]; those of grey modalities with equal channels.

    Images of more than 8 bits are scaled by what lies in all images of their modality that the table names, whether or
    not they are among `rows`. What was done to the images is told on stderr.

    Args:
        rows: as `read_dataset` gives them, of the table `csv_path`.
        resolution: side in pixels.
        trim: take letterboxes away (`trim_letterbox`); never from an OCT, where what is flat and not black is the
            vitreous.
        changes: counts what had to be done to the images, in words, and leaves it to the caller to tell.
        reading: what becomes of images that are not square, and of more than 8 bits.
        found: what `check_values` gave, where these are only some of the images that are read; None asks it.
        progress: show a bar on a terminal.

    Raises:
        ValueError: what the values of the images mean cannot be known, or an image is broken.
        FileNotFoundError: an image is not there.
    """
    if found is None:
        found = check_values([(rows, csv_path)], reading)

    def load(row: dict, path: str) -> tuple[torch.Tensor, list[str]]:
        modality = resolve_modality(row["modality"])
        image, done = read_image(path, modality.id, found.get(modality.id, Found()), reading.window)
        image, done = as_modality(image, modality, done)
        if trim and modality.id != "oct":
            pixels = np.asarray(image)
            trimmed = trim_letterbox(pixels)
            if trimmed is not pixels:
                done.append("letterbox taken away")
                image = Image.fromarray(trimmed)
        image, fitted = fit_to(image, (resolution, resolution), reading.fit)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), named(done + fitted, row["path"])

    images, counted = [], Counter() if changes is None else changes
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        loaded = pool.map(load, rows, resolve_paths(rows, csv_path))
        for image, done in tqdm(loaded, "reading", len(rows), disable=None if progress else True):
            images.append(image)
            counted.update(done)
    if changes is None:
        tell(counted, len(rows), csv_path, reading)
    return torch.stack(images)


def check_values(
    sets: Sequence[tuple[list[dict], str | Path]], reading: Reading = DEFAULT_READING
) -> dict[str, Found]:
    """By modality, what lies in the pixels of more than 8 bits of all images that are to be scaled alike.

    `sets` are rows as `read_dataset` gives them, and the table they came from, whose other rows are looked at as well.
    Raises ValueError if what the values of a modality of the rows mean cannot be known.
    """
    files: dict[str, str] = {}
    modalities: set[str] = set()
    for rows, csv in sets:
        asked = dict(zip(resolve_paths(rows, csv), _modalities(rows)))
        source = find_source(csv)
        states = tuple(map(file_state, source.files))
        if all(states):
            options = ("modality", reading.modality), ("image_root", reading.image_root), ("columns", reading.columns)
            files |= dict(_images_of(str(csv), options, states))
        files |= asked
        modalities.update(asked.values())
    found = survey({path: name for path, name in files.items() if name in modalities})
    for name, values_of in found.items():
        for values, real in ((values_of.whole, False), (values_of.real, True)):
            if values is not None:
                try:
                    black_and_white(values, real, name, reading.window)
                except ValueError as error:
                    raise ValueError(f"{', '.join(str(csv) for _, csv in sets)}: {error}") from error
    return found


def key_of(rows: list[dict], csv_path: str | Path, reading: Reading = DEFAULT_READING) -> str:
    """A digest of the rows and of the state of their images, under which what is made of them is kept on disk.

    It changes with a row, with an image's place, size or time of change, with how images are read, and with the
    version of the reader.
    """
    found = check_values([(rows, csv_path)], reading)
    return images_key(rows, resolve_paths(rows, csv_path), found, reading)


@lru_cache(maxsize=64)
def _images_of(csv: str, options: tuple[tuple[str, Any], ...], states: tuple) -> tuple[tuple[str, str], ...]:
    """Every image that a table, whose files are in these states, names, with the id of its modality."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of bad rows, which whoever read the rows at hand has been told of
        try:
            asked: dict[str, Any] = {"check_images": False, "skip_bad_rows": True, **dict(options)}
            rows = read_dataset(csv, require=("path", "modality"), **asked)
        except ValueError:  # of modalities that nobody knows, or none: then of the rows at hand alone
            return ()
    return tuple(zip(resolve_paths(rows, csv), _modalities(rows)))


def _modalities(rows: list[dict]) -> list[str]:
    """The id of each row's modality."""
    ids = {name: resolve_modality(name).id for name in {row["modality"] for row in rows}}
    return [ids[row["modality"]] for row in rows]


def trim_letterbox(image: np.ndarray, max_stretch: float = 1.15) -> np.ndarray:
    """Cuts flat bright bars off opposite borders and makes the rest square again.

    Most of COVID-CT and some of the other chest CTs were padded to a square with grey or white, and a generator would
    learn the bars as anatomy. Black is left alone: it is the air around a body. What remains is stretched by at most
    `max_stretch`; where that is not enough, its longer side is cropped evenly.

    From uint8 [H, W, 3] to uint8 [S, S, 3], or `image` itself where there are no bars.
    """
    grey = image.mean(2)
    top, bottom = _bars(grey)
    left, right = _bars(grey.T)
    if not (top or left):
        return image
    content = image[top : len(grey) - bottom, left : grey.shape[1] - right]
    height, width = content.shape[:2]
    long = round(min(height, width) * max_stretch)
    y, x = max(0, height - long) // 2, max(0, width - long) // 2
    content = content[y : height - y, x : width - x]
    size = max(image.shape[:2])
    return np.asarray(Image.fromarray(content).resize((size, size), Image.Resampling.LANCZOS))


def _bars(lines: np.ndarray, darkest: float = 40, least: int = 4) -> tuple[int, int]:
    """How many lines of the grey image are a bar, at its beginning and at its end; (0, 0) unless both are."""
    bars = []
    for side in (lines, lines[::-1]):
        value = np.median(side[0])
        # Lossy compression leaves a ripple, strongest beside the content.
        flat = (side.std(1) < 3) & (np.abs(side - value).max(1) < 12)
        count = int(np.argmin(flat)) if not flat.all() else 0
        bars.append(count if value > darkest else 0)
    if min(bars) < least or sum(bars) > 0.6 * len(lines):
        return 0, 0
    # One line more on each side: the content's edge is blurred into the bar.
    return bars[0] + 1, bars[1] + 1
