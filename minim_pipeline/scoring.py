"""What `minim score` does: the filter's ratings of any images, real ones too, into a CSV."""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from .data.image_reader import tell
from .data.sources import resolve_path
from .data.splits import read_split
from .files import write_csv
from .generate.options import ModelOptions
from .loading import load_pipeline, register_modalities
from .modalities import resolve_modality
from .options import Count, TableOptions, option


@dataclass(kw_only=True)
class ScoreOptions(ModelOptions, TableOptions):
    """Which images are rated, by which model, and into which file."""

    data: Path = option(
        help="Columns path,Text,modality; others are carried through. A CSV, or another format (docs/data.md)."
    )
    output: Path | None = option(None, "Default: NAME-scored.csv beside the data.")
    split: str | None = option(None, "Only its rows of this split.")
    device: str | None = option(None, "E.g. cpu, cuda (default: a GPU if there is one).")
    batch_size: Count = option(16, "Images rated together.")
    keep_copies: bool = option(False, "Do not reject the model's training images and copies.")
    skip_bad_rows: bool = option(False, "Leave bad rows of the CSV out instead of stopping.")
    quiet: bool = option(False, "No progress bar, and nothing said at the end.")


def score_csv(options: ScoreOptions) -> tuple[Path, list[dict[str, str]]]:
    """Rates every image of a table for its caption; what was done to the images on reading is told on stderr.

    Returns:
        The path written, and its rows: those of the data with `score`, `quality_rating` and `finding_rating`, from 1
        to 3, if the filter rates it `realism`, a log ratio, `accepted`, and `reason`, why not: quality, finding, copy,
        realism. What an earlier rating has left in columns of these names is replaced.
    """
    data, reading = options.data, options.reading
    if options.output is None and data.suffix != ".csv" and not data.exists():
        raise ValueError(f"--output has to say where the scores of {data} go, which is no file or folder here.")
    output = options.output or data.with_name(f"{data.stem}-scored.csv")
    index = register_modalities(options.model)
    if not (index.get("filter_head") or [None])[0]:
        raise ValueError(f"{options.model} has no filter to score with.")
    trained = index.get("modalities") or None

    def check(row: dict[str, str]) -> None:
        resolve_modality(row["modality"], trained)

    rows = read_split(data, options.split, check=check, skip_bad_rows=options.skip_bad_rows, **options.csv_options)
    from .data.image_loading import check_values, load_images

    # Of all images, so that those of every batch are scaled alike.
    found = check_values([(rows, data)], reading)
    changes: Counter[str] = Counter()
    pipe = load_pipeline(options.model, device=options.device)
    resolution = pipe.unet.config.sample_size * pipe.vae_scale_factor
    scored = []
    with tqdm(total=len(rows), disable=options.quiet, unit=" images") as bar:
        for start in range(0, len(rows), options.batch_size):
            batch = rows[start : start + options.batch_size]
            images = load_images(batch, data, resolution, changes=changes, reading=reading, found=found).float() / 255
            prompts, modalities = ([row[column] for row in batch] for column in ("Text", "modality"))
            rated = pipe.score(images, prompts, modalities, reject_copies=not options.keep_copies)
            for i, row in enumerate(batch):
                place = os.path.relpath(resolve_path(row, data).resolve(), output.parent.resolve())
                parts = {"score": rated.scores, "quality_rating": rated.quality, "finding_rating": rated.finding}
                parts |= {"realism": rated.realism} if rated.realism else {}
                columns = {name: f"{values[i]:.4f}" for name, values in parts.items()}
                columns |= {"accepted": str(rated.accepted[i]).lower(), "reason": rated.reasons[i] or ""}
                scored.append(row | {"path": Path(place).as_posix()} | columns)
            bar.update(len(batch))
    tell(changes, len(rows), data, reading)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_csv(output, scored, end="\n")
    return output, scored
