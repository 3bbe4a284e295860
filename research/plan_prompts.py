"""The prompts that a model is measured by: equally many of each finding that it and the judges know.

    python research/plan_prompts.py --model minim_pipeline/checkpoints/minim-256 --phrasing new --output new.csv
    minim generate --prompts-file new.csv --output-dir new

Image i has the seed `--seed` + i, so whoever draws them gets the same ones. `finding` is carried into the images'
`data.csv`, where `minim evaluate` and `report_model.py --drawn` find it.
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minim_pipeline import CAPTIONS, EMBEDDED_CHECKPOINT
from minim_pipeline.evaluation.comparison import JUDGES
from minim_pipeline.evaluation.judges import load_judges
from minim_pipeline.evaluation.sampling import plan
from minim_pipeline.files import atomic_path
from minim_pipeline.loading import register_modalities
from minim_pipeline.training.captions import load_captions
from minim_pipeline.training.config import Count, Options, Whole, option, parse


@dataclass(kw_only=True)
class PlanConfig(Options):
    """Options of the plan."""

    model: str = option(str(EMBEDDED_CHECKPOINT), "Folder or Hub id of the pipeline, whose findings are drawn.")
    judges: str = option(JUDGES, "The output_dir of train_classifier.py, which has to know them, too.")
    captions: str = option(str(CAPTIONS), "JSON with phrasings of every finding.")
    phrasing: Literal["train", "new", "test"] = option("new", "As in training, new ones, or those of other styles.")
    images_per_finding: Count = 64
    seed: Whole = option(0, "Of the first image.")
    output: str = option(help="The CSV: Text,modality,finding,seed.")


def main(argv: list[str] | None = None) -> list[dict]:
    config = parse(PlanConfig, argv, __doc__)
    learned = register_modalities(config.model).get("findings") or {}
    classes, captions = load_judges(config.judges).classes, load_captions(config.captions)
    planned = plan(classes, learned, captions, config.phrasing, config.images_per_finding, config.seed)
    if not planned:
        raise ValueError(f"{config.model} has learned no finding that {config.judges} know.")
    rows = [{"Text": item.pop("prompt"), **item} for item in planned]
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(Path(config.output)) as unfinished, open(unfinished, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["Text", "modality", "finding", "seed"])
        writer.writeheader()
        writer.writerows(rows)
    return rows


if __name__ == "__main__":
    main()
