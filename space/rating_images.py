"""What is rated: the images of folders that the host names, in an order of each rater's own."""

import hashlib
import io
import os
import random
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from minim_pipeline import resolve_modality
from minim_pipeline.data.image_loading import check_values
from minim_pipeline.data.image_pixels import RESIZED, Found, as_modality, fit_to, named
from minim_pipeline.data.image_reader import Reading, read_image, tell
from minim_pipeline.data.sources import read_dataset, resolve_path
from minim_pipeline.ratings import Rating, image_digest


WHOLE = Reading(fit="pad")
AT_ONCE = 2000  # so many images are decoded before the start, which takes some 5 s; more would keep raters waiting


@dataclass(frozen=True)
class RatedImage:
    """An image that may be rated.

    Args:
        id: what the browser calls it: says nothing of where it lies, nor whether it is real.
        path: relative to its folder, as the store has it.
        kind: `"generated"` or `"real"`.
        seed, revision: of a generated image, what draws it again, as far as its data.csv says.
        found, reading: what lies in its data set, and how it is read, as for training.
    """

    id: str
    path: str
    file: Path
    text: str
    modality: str
    kind: str
    seed: int | None = None
    revision: str = ""
    found: Found = Found()
    reading: Reading = WHOLE

    @cached_property
    def digest(self) -> str:
        """`image_digest` of the file, as the store has it."""
        return image_digest(self.file)

    def pixels(self) -> tuple[Image.Image, list[str]]:
        """The image with the values that training sees, at its own size, and what was done to it."""
        image, notes = read_image(self.file, self.modality, self.found, self.reading.window)
        return as_modality(image, resolve_modality(self.modality), notes)

    def read(self, side: int = 512) -> bytes:
        """A PNG of the pixels alone, at one size for all: neither metadata nor size tell which images are real."""
        image, _ = fit_to(self.pixels()[0], (side, side), self.reading.fit)
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=3)
        return buffer.getvalue()


def read_folder(folder: str | Path, kind: str, reading: Reading = WHOLE) -> list[RatedImage]:
    """The images of a folder with `data.csv` (`path,Text,modality`), as `minim generate` writes it.

    Up to `AT_ONCE` images are decoded, and what was done to them is told on stderr; of more, `check_images` does so.
    Raises as `read_dataset`, and ValueError if what the values of its images mean cannot be known.
    """
    csv = Path(folder) / "data.csv"

    def check(row: dict[str, str]) -> None:
        # What the store would refuse is told now, and not to a rater.
        said = {"path": Path(row["path"]).as_posix(), "text": row["Text"], "modality": row["modality"], **drawn(row)}
        Rating(rater="nobody", rating=1, **said)
        file = resolve_path(row, csv)
        if not file.is_file():
            raise ValueError(f"no image {file}")

    rows = read_dataset(csv, check=check, check_images=False)
    if len(rows) <= AT_ONCE:
        rows = read_dataset(csv)
    found = check_values([(rows, csv)], reading)
    images = []
    for row in rows:
        path = Path(row["path"]).as_posix()
        name = hashlib.sha256(f"{kind}/{path}".encode()).hexdigest()[:16]
        modality, file = resolve_modality(row["modality"]).id, resolve_path(row, csv)
        read = {"found": found[modality], "reading": reading}
        images.append(RatedImage(name, path, file, row["Text"], modality, kind, **drawn(row), **read))
    if len(rows) <= AT_ONCE:
        check_images(images, csv, os.cpu_count())
    return images


def check_images(images: list[RatedImage], source: str | Path, threads: int | None = 1) -> list[RatedImage]:
    """Decodes images, tells on stderr what was done to them and which are broken, and returns those that are not."""
    changes, good = Counter[str](), []
    with ThreadPoolExecutor(threads) as pool:
        for image, notes in zip(images, pool.map(_notes, images)):
            if isinstance(notes, ValueError):
                print(f"{source}: {notes}; it is not shown", file=sys.stderr)
                continue
            changes.update(named(notes, image.path))
            good.append(image)
    if images:
        tell(changes, len(images), source, images[0].reading)
    return good


def drawn(row: dict[str, str]) -> dict:
    """The `seed` and the `revision` of the model of a row of data.csv; None and empty where it has none."""
    seed = row.get("drawn_seed") or row.get("seed")
    if seed and not seed.removeprefix("-").isdecimal():
        raise ValueError(f"seed has to be a whole number, got {seed!r}")
    return {"seed": int(seed) if seed else None, "revision": row.get("revision") or ""}


def _notes(image: RatedImage) -> list[str] | ValueError:
    try:
        picture, notes = image.pixels()
    except (ValueError, OSError) as error:
        return ValueError(str(error))
    return notes + [note for note in fit_to(picture, (8, 8), image.reading.fit)[1] if not note.startswith(RESIZED)]


def queue(
    images: list[RatedImage], rater: str, real_share: float, repeat_share: float, distance: int = 10
) -> list[tuple[RatedImage, int]]:
    """What a rater is shown, one after the other, and which turn of the image it is; always the same for a name.

    Args:
        images: generated and real ones.
        real_share: of what is shown for the first time, how much is real, in [0, 1); less if there are too few.
        repeat_share: how many of the images come a second time, in [0, 1].
        distance: how many others lie at least between both times; images nearer to the end do not come again.
    """
    # hash() differs from process to process.
    chance = random.Random(hashlib.sha256(rater.encode()).digest())
    generated, real = ([i for i in images if i.kind == kind] for kind in ("generated", "real"))
    chance.shuffle(generated)
    chance.shuffle(real)
    if generated:
        real = real[: round(len(generated) * real_share / (1 - real_share))]
    shown = generated + real
    chance.shuffle(shown)
    return with_repeats(shown, repeat_share, chance, distance)


def with_repeats(
    images: list[RatedImage], share: float, chance: random.Random, distance: int = 10
) -> list[tuple[RatedImage, int]]:
    """Images in their order, turn 0, and a share of them once more, turn 1; arguments as of `queue`."""
    shown = [(image, 0) for image in images]
    early = shown[: max(0, len(shown) - distance)]
    first = {image.id: i for i, (image, _) in enumerate(shown)}
    places = np.arange(len(shown))  # of the first showings, among all
    for image, _ in chance.sample(early, min(len(early), round(share * len(shown)))):
        again = chance.randint(int(places[first[image.id]]) + 1 + distance, len(shown))
        shown.insert(again, (image, 1))
        places[places >= again] += 1
    return shown
