"""What a model learned from, counted: images, findings and sources of each of its modalities.

    python research/describe_data.py --data data.csv --name minim-open --output docs/data.json

The card takes its section on data from here; `research/sources.json` has the titles of sources, and by the set's name
what has to be known of it.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from minim_pipeline import EMBEDDED_CHECKPOINT
from minim_pipeline.data.sources import read_dataset
from minim_pipeline.evaluation.judges import class_of
from minim_pipeline.files import write_report
from minim_pipeline.loading import register_modalities
from minim_pipeline.training.config import Options, option, parse


@dataclass(kw_only=True)
class DescribeConfig(Options):
    """Options of the count."""

    data: list[str] = option(help="CSV files with path,Text,modality,finding,split,source.")
    name: str = option(help="What the set is called.")
    model: str = option(str(EMBEDDED_CHECKPOINT), "The pipeline, whose modalities are counted.")
    output: str = option(help="The counts, JSON.")


def describe(rows: list[dict]) -> dict:
    """Counts of rows: `train`, `val`, and by modality the same, `findings`, each with both, and `sources`."""
    report: dict = splits(rows) | {"modalities": {}}
    for name in dict.fromkeys(class_of(row)[0] for row in rows):
        own = [row for row in rows if class_of(row)[0] == name]
        findings = {
            finding: splits([row for row in own if row["finding"] == finding])
            for finding in sorted({row["finding"] for row in own})
        }
        sources = dict(sorted(Counter(row["source"] for row in own).items()))
        report["modalities"][name] = splits(own) | {"findings": findings, "sources": sources}
    return report


def splits(rows: list[dict]) -> dict[str, int]:
    return {split: sum(row["split"] == split for row in rows) for split in ("train", "val")}


def main(argv: list[str] | None = None) -> dict:
    config = parse(DescribeConfig, argv, __doc__)
    learned = register_modalities(config.model).get("findings") or {}
    require = ("modality", "finding", "split", "source")
    rows = [row for path in config.data for row in read_dataset(path, require=require, check_images=False)]
    rows = [row for row in rows if class_of(row)[0] in learned]
    if not rows:
        raise ValueError(f"{', '.join(config.data)} have no images of {config.model}: {', '.join(learned)}.")
    report = {"name": config.name, **describe(rows)}
    write_report(Path(config.output), report)
    return report


if __name__ == "__main__":
    main()
