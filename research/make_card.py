"""Writes pipeline_card.md, the card of the embedded model: a template whose figures all come from its reports.

    python research/make_card.py

A section of the card is there where its report is: see `SECTIONS` of minim_pipeline/publishing/reports.py.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import jinja2

from minim_pipeline import EMBEDDED_CHECKPOINT, MODALITIES
from minim_pipeline.minim_filter.funnel import plan_stages
from minim_pipeline.publishing.reports import gather_reports
from minim_pipeline.training.config import Options, option, parse


ROOT = Path(__file__).parents[1]
TEMPLATE = Path(__file__).with_name("pipeline_card.md.jinja")
SOURCES = json.loads(Path(__file__).with_name("sources.json").read_text(encoding="utf-8"))


@dataclass(kw_only=True)
class CardConfig(Options):
    """Options of the card."""

    model: str = option(str(EMBEDDED_CHECKPOINT), "Folder of the pipeline.")
    docs: str = option(str(ROOT / "docs"), "Folder of its reports.")
    output: str = option(str(ROOT / "pipeline_card.md"), "The card.")


WORDS = "no one two three four five six seven eight nine ten".split()
PLURALS = {"oct": "OCT", "fundus": "fundus photographs", "cxr": "chest X-rays", "chest_ct": "chest CT"}
PLURALS |= {"brain_mri": "brain MRI", "breast_mri": "breast MRI", "breast_us": "breast ultrasound"}
NETWORKS = {"resnet": "a ResNet", "convnextv2": "a ConvNeXt V2"}
NETWORKS |= {f"efficientnet-lite{i}": f"an EfficientNet-Lite{i}" for i in range(3)}
PHRASINGS = {"train": "phrasings as in training", "new": "new phrasings", "test": "phrasings of other styles"}
# Captions of val images are drawn for the curve too, at the model's own settings.
EVALUATED = {f"evaluation_{name}": title for name, title in PHRASINGS.items()}
EVALUATED |= dict.fromkeys(("evaluation", "evaluation_curve"), "captions of val images")


def dp(value: float | None, places: int) -> str:
    """So many decimal places; a dash for what was left out."""
    return "–" if value is None else f"{float(value):.{places}f}"


def in_order(modalities: dict) -> list[str]:
    """Ids of modalities in the order of the package's table."""
    return sorted(modalities, key=list(MODALITIES).index)


def percent(value: float, places: int = 0) -> str:
    return dp(100 * value, places)


def points(value: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return f"{100 * value:+.1f}"


def listed(words: list[str]) -> str:
    """As in a sentence: one, two and three."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def of_candidates(share: float, candidates: int) -> str:
    """How many candidates a stage of the filter leaves, in words; at least one, as `plan_stages` has it."""
    return WORDS[plan_stages([(0.0, share)], candidates)[0][1]]


def sources_of(part: dict) -> list[str]:
    """Titles of the sources of a modality's images."""
    return list(
        dict.fromkeys(title for source in part["sources"] for title in SOURCES["titles"].get(source, [source]))
    )


def tags_of(data: dict) -> list[str]:
    """Of all sources, as the Hub writes the names of data sets."""
    titles = [title for name in in_order(data["modalities"]) for title in sources_of(data["modalities"][name])]
    return list(dict.fromkeys(re.sub(r"[^a-z0-9]+", "-", title.lower()) for title in titles))


def by_family(figures: dict) -> dict[str, dict]:
    """What was read of each family of findings of a modality; of each finding where judges knew no families."""
    return figures.get("families", figures["findings"])


def lowest(figures: dict, key: str, parts: str | None = None) -> list[tuple[float, str, str]]:
    """The six lowest of a figure by modality and finding, or by family without `parts`: value, modality, name."""
    each = (
        (found[key], modality, name)
        for modality, part in figures["modalities"].items()
        for name, found in (part[parts] if parts else by_family(part)).items()
    )
    return sorted(each)[:6]


def evaluations(report: dict) -> dict[str, dict]:
    """By what the images were drawn for: the evaluations of the report, at most one each."""
    found: dict[str, dict] = {}
    for name, title in EVALUATED.items():
        if name in report:
            found.setdefault(title, report[name])
    return found


def extractor_of(evaluation: dict, kind: str) -> str:
    """The name of the extractor of a kind that an evaluation looked through, or of its first where there is none."""
    names = [extractor["name"] for extractor in evaluation["extractors"]]
    return next((name for name in names if name.startswith(kind)), names[0])


def within_source(evaluation: dict) -> list[tuple[str, str, dict, dict]]:
    """Modality, source, and what was read of generated and of real images, where both have the source."""
    synthetic, real = (evaluation["judges"].get(name, {"modalities": {}}) for name in ("synthetic", "real"))
    sources = {name: part.get("within_source", {}) for name, part in synthetic["modalities"].items()}
    return [
        (name, source, sources[name][source], figures)
        for name in in_order(sources)
        for source, figures in real["modalities"][name].get("within_source", {}).items()
        if source in sources[name]
    ]


def removed(figures: dict) -> str:
    """Which share of the wrong images a filter removed, as `compare_wrong` gives it."""
    if figures["removed"] is None:
        return "–"
    interval = f" [{', '.join(map(percent, figures['interval']))}]" if figures["interval"] else ""
    return f"{percent(figures['removed'])} %{interval}"


def seen_through(evaluation: dict) -> str:
    """The extractor of distances: a judge, which learned from real images that nothing else here has learned from."""
    return extractor_of(evaluation, "judge ")


def told_by(evaluation: dict) -> str:
    """The extractor of the two-sample test: the one that finds most."""
    return extractor_of(evaluation, "efficientnet")


def compared(evaluation: dict) -> dict[str, dict[str, float | None]]:
    """By modality the figures of generated images beside real ones; None for those that were left out."""
    found = {}
    for modality, part in evaluation["modalities"].items():
        fidelity = part["fidelity"][seen_through(evaluation)]
        figures = {key: fidelity[key] for key in ("frechet_distance", "frechet_floor", "recall", "coverage")}
        figures |= {key: part["diversity"][key] for key in ("ms_ssim", "ms_ssim_real")}
        figures |= {key: part["retrieval"][key] for key in ("image_text", "image_text_real")}
        if realism := part.get("realism"):
            test = realism.get("two_sample_trained", realism["two_sample"][told_by(evaluation)])
            figures |= {"sharpness": realism["sharpness"], **test}
        values = {key: figure.get("value") for key, figure in figures.items()}
        distance, floor = values["frechet_distance"], values["frechet_floor"]
        values["over_floor"] = distance / floor if distance is not None and floor else None
        found[modality] = values
    return found


def cells(sets: list[dict], key: str, modality: str | None = None, places: int = 2) -> str:
    """A figure of each set, of a modality or the mean of all: "1.52 / 1.63"."""
    found = []
    for figures in sets:
        names = figures if modality is None else [modality] if modality in figures else []
        values = [figures[name][key] for name in names if figures[name][key] is not None]
        found.append(dp(sum(values) / len(values) if values else None, places))
    return " / ".join(found)


FILTERS = {
    "dp": dp,
    "pct": percent,
    "points": points,
    "band": lambda interval, places: f"[{', '.join(dp(end, places) for end in interval)}]" if interval else "",
    "band_pct": lambda interval: f"[{', '.join(map(percent, interval))}]",
    "band_points": lambda interval: f"[{', '.join(map(points, interval))}]",
    "millions": lambda value, places=1: dp(value / 1e6, places),
    "thousands": lambda value: f"{int(value):,}",
    "short": lambda value: f"{float(value):g}",
    "words": lambda value: WORDS[int(value)],
    "listed": listed,
    "of_candidates": of_candidates,
    "in_order": in_order,
    "title_of": lambda name: MODALITIES[name].name,
    "plural_of": lambda name: PLURALS.get(name, name),
    "network": lambda name: NETWORKS.get(name, name),
    "sources_of": sources_of,
    "tags_of": tags_of,
    "by_family": by_family,
    "lowest": lowest,
    "removed": removed,
    "within_source": within_source,
    "seen_through": seen_through,
    "told_by": told_by,
    "compared": compared,
    "cells": cells,
}


def gather(docs: str | Path, model: str | Path) -> dict:
    """What `render` takes: the reports as `gather_reports` has them, and of the configs in the model's folder."""
    configs = {name: json.loads((Path(model) / f"{name}/config.json").read_text()) for name in ("text_encoder", "vae")}
    built = {"text_layers": configs["text_encoder"]["num_hidden_layers"]}
    built["latent_channels"] = configs["vae"]["latent_channels"]
    built["side_factor"] = 2 ** (len(configs["vae"]["block_out_channels"]) - 1)
    return gather_reports(docs, model) | {"built": built}


def render(report: dict, template: str | None = None) -> str:
    """The card's text.

    Args:
        report: as `gather` gives it.
        template: default: pipeline_card.md.jinja beside this file.

    Raises:
        jinja2.UndefinedError: the report has no such figure; the message names it.
    """
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    environment.filters |= FILTERS
    known = {"report": report, "sets": evaluations(report), "notes": SOURCES["notes"], "phrasings": PHRASINGS}
    return environment.from_string(template or TEMPLATE.read_text(encoding="utf-8")).render(known)


def main(argv: list[str] | None = None) -> None:
    config = parse(CardConfig, argv, __doc__)
    Path(config.output).write_text(render(gather(config.docs, config.model)), encoding="utf-8")


if __name__ == "__main__":
    main()
