"""What is rated: the images of folders that the host names, in an order of each rater's own."""

import hashlib
import io
import os
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from minim_pipeline import resolve_modality
from minim_pipeline.data.image_loading import check_values
from minim_pipeline.data.image_pixels import RESIZED, Found, as_modality, fit_to, named
from minim_pipeline.data.image_reader import Reading, read_image, tell
from minim_pipeline.data.sources import read_csv, resolve_path
from minim_pipeline.ratings import Rating, image_digest


WHOLE = Reading(fit="pad")


@dataclass(frozen=True)
class RatedImage:
    """An image that may be rated.

    Args:
        id: what the browser calls it: says nothing of where it lies, nor whether it is real.
        path, digest: relative to its folder, and of the file; as the store has them.
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
    digest: str
    seed: int | None = None
    revision: str = ""
    found: Found = Found()
    reading: Reading = WHOLE

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

    What was done to them is told on stderr. Raises as `read_csv`, and ValueError if what the values of its images mean
    cannot be known.
    """
    csv = Path(folder) / "data.csv"
    images = []

    def check(row: dict[str, str]) -> None:
        # What the store would refuse is told now, and not to a rater.
        said = {"path": Path(row["path"]).as_posix(), "text": row["Text"], "modality": row["modality"], **drawn(row)}
        Rating(rater="nobody", rating=1, **said)

    rows = read_csv(csv, check=check)
    found = check_values([(rows, csv)], reading)
    for row in rows:
        path = Path(row["path"]).as_posix()
        name = hashlib.sha256(f"{kind}/{path}".encode()).hexdigest()[:16]
        modality, file = resolve_modality(row["modality"]).id, resolve_path(row, csv)
        digest = image_digest(file)
        read = {"found": found[modality], "reading": reading}
        images.append(RatedImage(name, path, file, row["Text"], modality, kind, digest, **drawn(row), **read))
    changes = Counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for image, notes in zip(images, pool.map(_notes, images)):
            changes.update(named(notes, image.path))
    tell(changes, len(images), csv, reading)
    return images


def drawn(row: dict[str, str]) -> dict:
    """The `seed` and the `revision` of the model of a row of data.csv; None and empty where it has none."""
    seed = row.get("drawn_seed") or row.get("seed")
    if seed and not seed.removeprefix("-").isdecimal():
        raise ValueError(f"seed has to be a whole number, got {seed!r}")
    return {"seed": int(seed) if seed else None, "revision": row.get("revision") or ""}


def _notes(image: RatedImage) -> list[str]:
    picture, notes = image.pixels()
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
    shown = [(image, 0) for image in generated + real]
    chance.shuffle(shown)
    early = shown[: max(0, len(shown) - distance)]
    for image, _ in chance.sample(early, min(len(early), round(repeat_share * len(shown)))):
        first = next(i for i, (other, _) in enumerate(shown) if other is image)
        shown.insert(chance.randint(first + 1 + distance, len(shown)), (image, 1))
    return shown
