"""Writes pipeline_card.md, the card of the embedded model: a template whose figures all come from its reports.

python research/make_card.py
"""

from dataclasses import dataclass
from pathlib import Path

import jinja2

from minim_pipeline import EMBEDDED_CHECKPOINT, MODALITIES
from minim_pipeline.minim_filter.funnel import plan_stages
from minim_pipeline.publishing.reports import gather_reports
from minim_pipeline.training.config import Options, option, parse


ROOT = Path(__file__).parents[1]
TEMPLATE = Path(__file__).with_name("pipeline_card.md.jinja")


@dataclass(kw_only=True)
class CardConfig(Options):
    """Options of the card."""

    model: str = option(str(EMBEDDED_CHECKPOINT), "Folder of the pipeline.")
    docs: str = option(str(ROOT / "docs"), "Folder of its reports.")
    output: str = option(str(ROOT / "pipeline_card.md"), "The card.")


WORDS = "no one two three four five six seven eight nine ten".split()


def dp(value: float, places: int) -> str:
    """So many decimal places."""
    return f"{float(value):.{places}f}"


def in_order(modalities: dict) -> list[str]:
    """Ids of modalities in the order of the package's table."""
    return sorted(modalities, key=list(MODALITIES).index)


def percent(value: float, places: int = 0) -> str:
    return dp(100 * value, places)


def points(value: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return f"{100 * value:+.1f}"


def of_candidates(share: float, candidates: int) -> str:
    """How many candidates a stage of the filter leaves, in words; at least one, as `plan_stages` has it."""
    return WORDS[plan_stages([(0.0, share)], candidates)[0][1]]


FILTERS = {
    "dp": dp,
    "pct": percent,
    "points": points,
    "band": lambda interval, places: f"[{', '.join(dp(end, places) for end in interval)}]",
    "band_pct": lambda interval: f"[{', '.join(map(percent, interval))}]",
    "band_points": lambda interval: f"[{', '.join(map(points, interval))}]",
    "millions": lambda value, places=1: dp(value / 1e6, places),
    "thousands": lambda value: f"{int(value):,}",
    "short": lambda value: f"{float(value):g}",
    "words": lambda value: WORDS[int(value)],
    "of_candidates": of_candidates,
    "in_order": in_order,
    "title_of": lambda name: MODALITIES[name].name,
}


def render(report: dict, template: str | None = None) -> str:
    """The card's text.

    Args:
        report: as `gather_reports` gives it.
        template: default: pipeline_card.md.jinja beside this file.

    Raises:
        jinja2.UndefinedError: the report has no such figure; the message names it.
    """
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    environment.filters |= FILTERS
    return environment.from_string(template or TEMPLATE.read_text(encoding="utf-8")).render(report=report)


def main(argv: list[str] | None = None) -> None:
    config = parse(CardConfig, argv, __doc__)
    report = gather_reports(config.docs, config.model)
    Path(config.output).write_text(render(report), encoding="utf-8")


if __name__ == "__main__":
    main()
