"""The curve of guidance and candidates: what is read in the images against how far from real ones they lie.

Guidance makes findings plainer and images more typical; choosing among candidates makes them plainer, too, and costs
time. Every point draws the captions of the real images again, from the same seeds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
from torch import Tensor

from ..loading import read_model_index
from .drawing import draw_synthetic
from .extractors import Extractor
from .judges import Judges
from .options import EvaluateOptions
from .report import ImageSet, fidelity, judged


@dataclass(frozen=True)
class Point:
    """Images drawn with one guidance and number of candidates: the CSV of their folder, and its rows."""

    guidance: float
    candidates: int
    path: Path
    rows: list[dict]


def has_filter(model: str) -> bool:
    """Whether a pipeline, a folder or a Hub id, has a filter to choose among candidates with."""
    return read_model_index(model).get("filter_head") not in (None, [None, None])


def draw_curve(options: EvaluateOptions, model: str, real_rows: list[dict]) -> list[Point]:
    """Draws every point of the curve into OUTPUT/curve, or goes on with that, candidates by candidates."""
    # Of a model with a filter one candidate is one that it rates: it says which share it would have accepted.
    filtering = not options.no_filter and has_filter(model)
    points = []
    for candidates, guidance in product(sorted(set(options.curve_candidates)), sorted(set(options.curve_guidance))):
        folder = options.output_dir / "curve" / f"guidance-{guidance:g}-candidates-{candidates}"
        count = candidates if filtering else None
        drawn = draw_synthetic(replace(options, guidance_scale=guidance), model, real_rows, folder, count)
        points.append(Point(guidance, candidates, *drawn))
    return points


def measure_point(
    point: Point,
    synthetic: ImageSet,
    features: Mapping[tuple, Tensor],
    sets: Mapping[str, ImageSet],
    extractors: list[Extractor],
    judges: Judges | None,
    labels: Mapping,
) -> dict:
    """Figures of one point.

    Args:
        synthetic: its images.
        features: of the real and the training images in `sets`, by (extractor's name, set).
        labels: of the report of `evaluate`: the `column`, or why there is none.

    Returns:
        `guidance`, `candidates`; `read`: share of the images in which the judges find what was asked for, the mean
        over modalities of the mean over findings; `accepted`: share that the filter accepts; and of each extractor
        `frechet_over_floor` and `recall`. What differs by modality has the mean as `value` and all in `modalities`.
    """
    said = {"synthetic": judges.judge_each(synthetic.images)} if judges else {}
    read = judged(judges, {"synthetic": synthetic}, said, labels.get("column", ""), labels.get("left_out"))
    if "left_out" not in read:
        found = read["synthetic"]
        each = {name: part["balanced_accuracy"] for name, part in found["modalities"].items()}
        read = {"value": found["balanced_accuracy"], "n": found["n"], "modalities": each}
    accepted: dict = {"left_out": "no filter chose among the images"}
    if synthetic.has("accepted"):
        share = np.mean([row["accepted"] == "true" for row in synthetic.rows])
        accepted = {"value": round(float(share), 4), "n": len(synthetic.rows)}
    report: dict = {"guidance": point.guidance, "candidates": point.candidates, "read": read, "accepted": accepted}
    report["extractors"] = {}
    for extractor in extractors:
        generated, parts = extractor.extract(synthetic.images), {}
        for modality in map(str, dict.fromkeys(synthetic.modalities)):
            of = {name: features[extractor.name, name][part.of(modality)] for name, part in sets.items()}
            train = of["train"] if len(of.get("train", ())) else None
            parts[modality] = fidelity(of["real"], generated[synthetic.of(modality)], train, draws=0)
        keys = ("frechet_over_floor", "recall")
        report["extractors"][extractor.name] = {key: mean_figure(parts, key) for key in keys}
    return report


def mean_figure(parts: Mapping[str, Mapping], key: str) -> dict:
    """The mean over modalities of a figure that each may have, as a figure with `modalities`."""
    each = {name: part[key] for name, part in parts.items()}
    there = {name: found["value"] for name, found in each.items() if "value" in found}
    if not there:
        return next(iter(each.values()))
    return {"value": round(float(np.mean(list(there.values()))), 4), "modalities": there}
