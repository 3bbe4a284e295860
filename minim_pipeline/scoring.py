"""What `minim score` does: the filter's ratings of any images, real ones too, into a CSV."""

import os
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from . import EMBEDDED_CHECKPOINT
from .data.image_reader import Reading, tell
from .data.sources import resolve_path
from .data.splits import read_split
from .files import write_csv
from .generate.command import load_pipeline, register_modalities
from .modalities import resolve_modality


def score_csv(
    data: str | Path,
    *,
    output: str | Path | None = None,
    model: str = str(EMBEDDED_CHECKPOINT),
    split: str | None = None,
    modality: str | None = None,
    image_root: str | Path | None = None,
    device: str | None = None,
    batch_size: int = 16,
    keep_copies: bool = False,
    skip_bad_rows: bool = False,
    quiet: bool = False,
    fit: str = "stretch",
    window: tuple[float, float] | None = None,
) -> tuple[Path, list[dict[str, str]]]:
    """Rates every image of a CSV for its caption.

    Args:
        data: CSV in MINIM's format, `path,Text,modality`; other columns are carried through.
        output: CSV with the columns `score`, `quality` and `finding` added, ratings from 1 to 3, `accepted`, and
            `reason`, why not: quality, finding or copy; by default `NAME-scored.csv` beside `data`.
        model: a pipeline with a filter head, a folder or an id on the Hub.
        split: only the rows of this split.
        modality: of all rows, where `data` has no such column.
        image_root: folder to look for the images in, see `resolve_path`; by default they lie beside `data`.
        device: by default a GPU if there is one.
        batch_size: images rated together.
        keep_copies: do not reject copies of the model's training images, nor those images themselves.
        skip_bad_rows: leave bad rows out instead of stopping.
        quiet: no progress bar.
        fit, window: how images are read, as of `image_reader.Reading`; what was done to them is told on stderr.

    Returns:
        The path written, and its rows.

    Raises:
        ValueError: the model has no filter head, or rows are bad, or what the images' values mean cannot be known.
    """
    root = image_root and str(image_root)
    data, reading = Path(data), Reading(fit, tuple(window) if window else None, modality, root)
    output = Path(output) if output is not None else data.with_name(f"{data.stem}-scored.csv")
    index = register_modalities(model)
    if not (index.get("filter_head") or [None])[0]:
        raise ValueError(f"{model} has no filter to score with.")
    trained = index.get("modalities") or None

    def check(row: dict[str, str]) -> None:
        resolve_modality(row["modality"], trained)

    options = {"image_root": image_root, "skip_bad_rows": skip_bad_rows, "modality": modality}
    rows = read_split(data, split, check=check, **options)
    from .data.image_loading import check_values, load_images

    # Of all images, so that those of every batch are scaled alike.
    found, changes = check_values([(rows, data)], reading), Counter()
    pipe = load_pipeline(model, device=device)
    resolution = pipe.unet.config.sample_size * pipe.vae_scale_factor
    scored = []
    with tqdm(total=len(rows), disable=quiet, unit=" images") as bar:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            images = load_images(batch, data, resolution, changes=changes, reading=reading, found=found).float() / 255
            prompts, modalities = ([row[column] for row in batch] for column in ("Text", "modality"))
            rated = pipe.score(images, prompts, modalities, reject_copies=not keep_copies)
            for i, row in enumerate(batch):
                place = os.path.relpath(resolve_path(row, data).resolve(), output.parent.resolve())
                scored.append(row | {"path": Path(place).as_posix()} | columns_of(rated, i))
            bar.update(len(batch))
    tell(changes, len(rows), data, reading)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_csv(output, scored, lineterminator="\n")
    return output, scored


def columns_of(rated, i: int) -> dict[str, str]:
    """The columns that the ratings of image `i` of a `MinimScores` become."""
    parts = {"score": rated.scores, "quality": rated.quality, "finding": rated.finding}
    ratings = {name: f"{values[i]:.4f}" for name, values in parts.items()}
    return ratings | {"accepted": str(rated.accepted[i]).lower(), "reason": rated.reasons[i] or ""}
