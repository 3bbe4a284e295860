"""The figures of a model in one `report.json` beside its weights; whatever its card claims is read from there."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult
from safetensors import safe_open

from ..files import read_report


# Reports that make up report.json, as `train/`, `research/` and `minim evaluate` write them into a project's docs/;
# each may be missing. An evaluation is of images for captions of val, or for the phrasings that it is named by.
SECTIONS = {
    "data": "data.json",
    "generation": "report.json",
    "filter": "filter/report.json",
    "evaluation": "evaluation/report.json",
    "evaluation_train": "evaluation/train/report.json",
    "evaluation_new": "evaluation/new/report.json",
    "evaluation_test": "evaluation/test/report.json",
    "evaluation_curve": "evaluation/curve/report.json",
    "anatomy": "anatomy.json",
    "rounds": "rounds/both-rounds.json",
}
# The evaluations of which one is shown, where there is one: the first found.
SHOWN = ("evaluation_new", "evaluation")


def gather_reports(docs: str | Path, model: str | Path) -> dict:
    """What report.json of a published model holds: the model's `parts`, and by section the reports found in `docs`."""
    found = {name: Path(docs) / file for name, file in SECTIONS.items()}
    report = {name: read_report(path) for name, path in found.items() if path.is_file()}
    return {"parts": count_parts(model)} | report


def find_page(docs: str | Path) -> Path | None:
    """The page of the evaluation in `docs` that is shown beside a model."""
    pages = [(Path(docs) / SECTIONS[name]).with_suffix(".html") for name in SHOWN]
    return next((page for page in pages if page.is_file()), None)


def count_parts(model: str | Path) -> dict[str, dict[str, int]]:
    """`parameters` (floating-point numbers) and `bytes` of each component with weights, without the variants."""
    parts: dict[str, dict[str, int]] = {}
    for path in sorted(Path(model).glob("*/*.safetensors")):
        if ".fp16" in path.name:
            continue
        part = parts.setdefault(path.parent.name, {"parameters": 0, "bytes": 0})
        part["bytes"] += path.stat().st_size
        with safe_open(path, "pt") as file:
            for key in file.keys():
                weights = file.get_slice(key)
                if weights.get_dtype().startswith(("F", "BF")):  # fingerprints are U8
                    part["parameters"] += math.prod(weights.get_shape())
    return parts


def read_sections(path: str | Path) -> dict:
    """A report.json with its sections: a published model's, or one of those that make it up; ValueError for others."""
    report = read_report(path)
    marks = {"generation": "generated", "filter": "comparisons", "evaluation": "sets", "rounds": "frechet"}
    if set(report) & set(SECTIONS):
        return report
    for section, mark in marks.items():
        if mark in report:
            return {section: report}
    raise ValueError(
        f"{path} is no report of this package: none of its sections {', '.join(SECTIONS)}, and not one of them itself."
    )


def eval_results(report: dict) -> Iterator[EvalResult]:
    """The figures that the Hub shows beside a card (`model-index`)."""
    phrasings = {"train": "phrasings as in training", "new": "new phrasings", "test": "phrasings of other styles"}
    for split, part in report.get("generation", {}).get("generated", {}).items():
        name = f"findings read right by classifiers, {phrasings.get(split, split)}"
        yield result("all", "balanced_accuracy", name, part["balanced_accuracy"])
        for modality, figures in part["modalities"].items():
            yield result(modality, "balanced_accuracy", name, figures["balanced_accuracy"])
    evaluation: dict = next((report[name] for name in SHOWN if name in report), {})
    for modality, part in evaluation.get("modalities", {}).items():
        for extractor, figures in part.get("fidelity", {}).items():
            name = f"Fréchet distance to real val images, features of {extractor}"
            yield result(modality, "frechet_distance", name, figures["frechet_distance"]["value"])


def result(modality: str, metric: str, name: str, value: float) -> EvalResult:
    figure: dict[str, Any] = {"metric_type": metric, "metric_name": name, "metric_value": value}
    figure |= {"dataset_type": "minim-open", "dataset_config": modality, "dataset_split": "val"}
    return EvalResult(task_type="text-to-image", dataset_name=f"val images, {modality}", **figure)
