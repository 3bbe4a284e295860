"""Generated images rated by eye for anatomy, and whether the filter's score says the same.

    minim generate --prompts-file research/anatomy.csv --output-dir anatomy --batch-size 64
    python research/anatomy.py --images anatomy/data.csv --sheets sheets
    python research/anatomy.py --images anatomy/data.csv --ratings research/anatomy.csv --output docs/anatomy.json

The first draws the images again from their seeds, the second lays them out on numbered sheets to rate them, the third
compares. A rating is 1: something is there that cannot be; 2: doubtful; 3: nothing is amiss. No clinician rated.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import ImageDraw

from minim_pipeline.contact_sheet import contact_sheet
from minim_pipeline.data.image_loading import load_images
from minim_pipeline.data.sources import read_dataset
from minim_pipeline.evaluation.metrics import auroc, bootstrap_interval, places
from minim_pipeline.files import write_report
from minim_pipeline.modalities import resolve_modality
from minim_pipeline.training.config import Count, Options, option, parse


PARTS = ("score", "quality_rating", "finding_rating", "realism")


@dataclass(kw_only=True)
class AnatomyConfig(Options):
    """Options of sheets and figures."""

    images: str = option(
        help="data.csv of the folder that `minim generate` drew, with the filter, or what `minim score` made of it."
    )
    ratings: str | None = option(None, "CSV with Text,modality,seed,rating, the rating 1 to 3.")
    output: str | None = option(None, "The figures, JSON; needs --ratings.")
    sheets: str | None = option(None, "Folder for sheets of the images, numbered as the rows of --images.")
    columns: Count = option(5, "Of a sheet.")
    rows: Count = option(4, "Of a sheet.")
    side: Count = option(384, "Of an image there, in pixels.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.ratings) != bool(self.output):
            raise ValueError("--ratings and --output belong together.")
        if not (self.output or self.sheets):
            raise ValueError("Nothing to do: give --sheets, or --ratings and --output.")


def write_sheets(config: AnatomyConfig, rows: list[dict], folder: Path) -> None:
    """Sheets of one modality each, every image with its row's number, from 0."""
    folder.mkdir(parents=True, exist_ok=True)
    count, side = config.columns * config.rows, config.side
    for modality, index in places(resolve_modality(row["modality"]).id for row in rows).items():
        for start in range(0, len(index), count):
            some = index[start : start + count]
            images = load_images([rows[i] for i in some], config.images, side, trim=False)
            sheet = contact_sheet(images, config.columns)
            draw = ImageDraw.Draw(sheet)
            for place, number in enumerate(some):
                y, x = divmod(place, config.columns)
                draw.text((x * side + 4, y * side + 2), str(number), fill="yellow", font_size=22)
            sheet.save(folder / f"{modality}-{start // count}.png")


def rated(rows: list[dict], ratings: list[dict]) -> list[dict]:
    """The rows that were rated, each with its `rating`; raises ValueError for a rating of what was not drawn."""
    drawn = {(row["Text"], resolve_modality(row["modality"]).id, row["seed"]): row for row in rows}
    keys = [(row["Text"], resolve_modality(row["modality"]).id, row["seed"]) for row in ratings]
    if missing := [key for key in keys if key not in drawn]:
        raise ValueError(f"{len(missing)} ratings are of images that were not drawn, such as {missing[0]}.")
    if bad := [row["rating"] for row in ratings if row["rating"] not in ("1", "2", "3")]:
        raise ValueError(f"a rating has to be 1, 2 or 3, got {bad[0]!r}.")
    return [drawn[key] | {"rating": int(row["rating"])} for key, row in zip(keys, ratings, strict=True)]


def figures(rows: list[dict]) -> dict:
    """Of rated rows: how many of each rating, what of the accepted ones is rated 1, and the AUROC of the score.

    The AUROC is that with which the score tells what is rated 2 or 3 from what is rated 1; where `minim score` has
    told the others, also those of them.
    """
    wrong = torch.tensor([row["rating"] == 1 for row in rows])
    accepted = torch.tensor([row["accepted"] == "true" for row in rows])
    report: dict = {"n": len(rows), "ratings": {str(r): sum(row["rating"] == r for row in rows) for r in (1, 2, 3)}}
    report["accepted"] = int(accepted.sum())
    report["rated_1"] = share(wrong)
    report["rated_1_of_accepted"] = share(wrong[accepted])
    if wrong.any() and not wrong.all():
        for part in filter(rows[0].__contains__, PARTS):
            scores = torch.tensor([float(row[part]) for row in rows])
            sides = scores[wrong], scores[~wrong]
            report[f"auroc_of_{part}"] = {"value": round(auroc(*sides), 4)}
            if min(map(len, sides)) > 1:
                interval = bootstrap_interval(auroc, *sides, draws=1000, bounds=(0.0, 1.0))
                report[f"auroc_of_{part}"]["interval"] = [round(end, 4) for end in interval]
    return report


def share(which: torch.Tensor, z: float = 1.96) -> dict:
    """Which share is true, and its 95 % interval (Wilson's, which holds for few and for rare ones)."""
    n = len(which)
    if not n:
        return {"left_out": "there are none"}
    p = which.double().mean().item()
    middle, reach = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    ends = [(middle - reach) / (1 + z * z / n), (middle + reach) / (1 + z * z / n)]
    return {"value": round(p, 4), "interval": [round(min(max(end, 0.0), 1.0), 4) for end in ends], "n": n}


def main(argv: list[str] | None = None) -> dict | None:
    config = parse(AnatomyConfig, argv, __doc__)
    rows = read_dataset(config.images)
    if config.sheets:
        write_sheets(config, rows, Path(config.sheets))
    if not (config.ratings and config.output):
        return None
    known = rated(rows, read_dataset(config.ratings, require=("rating", "seed"), check_images=False))
    report = {"rater": "not a clinician", **figures(known), "modalities": {}}
    for modality, index in places(resolve_modality(row["modality"]).id for row in known).items():
        report["modalities"][modality] = figures([known[i] for i in index])
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    write_report(Path(config.output), report)
    return report


if __name__ == "__main__":
    main()
