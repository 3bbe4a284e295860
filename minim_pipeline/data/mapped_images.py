"""Images as training and evaluation see them, on disk: as many as there are, in the same memory."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm

from ..mapped import MappedTensor, ahead, map_parts
from .image_loading import check_values, key_of, load_images
from .image_pixels import Found
from .image_reader import DEFAULT_READING, Reading, tell


IMAGES = ".images"  # folder in that of a run, for what is as large as the data; it is removed when the run is over
IMAGES_AT_ONCE = 64  # that are read together


def map_images(
    path: Path,
    rows: list[dict],
    csv_path: str | Path,
    resolution: int,
    *,
    trim: bool = True,
    changes: Counter | None = None,
    reading: Reading = DEFAULT_READING,
    found: dict[str, Found] | None = None,
    alone: bool = False,
) -> MappedTensor:
    """As `load_images`, in files beside `path`, as `map_parts` has them; every process reads its share.

    Args:
        path, alone: as of `map_parts`.
        changes: as of `load_images`, of the images that were not there yet; every process gets those of all.
    """
    found = check_values([(rows, csv_path)], reading) if found is None else found
    scales = sorted((name, astuple(values)) for name, values in found.items())
    own: Counter[str] = Counter()
    options: dict[str, Any] = {"trim": trim, "changes": own, "reading": reading, "found": found, "progress": False}

    def read(part: slice) -> Tensor:
        return load_images(rows[part], csv_path, resolution, **options)

    def make(parts: list[slice]) -> Iterator[Tensor]:
        total = sum(part.stop - part.start for part in parts)
        with tqdm(total=total, desc="reading", disable=None) as bar:
            for images in ahead(parts, read):
                yield images
                bar.update(len(images))

    key = [key_of(rows, csv_path, reading), scales, resolution, trim]
    images, _ = map_parts(path, key, len(rows), IMAGES_AT_ONCE, make, alone)
    every = own if alone else sum(gather_object([own]), Counter())
    if changes is None:
        tell(every, len(rows), csv_path, reading)
    else:
        changes.update(every)
    return images
