"""The card of the embedded model claims nothing that its reports do not say."""

import copy
import re
from pathlib import Path

import jinja2
import make_card
import pytest
from huggingface_hub import ModelCard

from minim_pipeline import EMBEDDED_CHECKPOINT
from minim_pipeline.publishing import gather_reports


ROOT = Path(__file__).parent.parent
# Numbers that are no results, and what they are.
NO_FIGURES = {
    "Nature Medicine, 2025": "the paper's year",
    "arXiv 2505.23343": "a paper",
    "at 256 px": "the size of the images",
    "from 1 to 3": "the scale of ratings",
    "Apache License 2.0": "a licence",
    "ConvNeXt V2": "a network",
    "Figure1": "a data set",
    "ODIR-5K": "a data set",
    "ChestX-ray14": "a data set",
    "x0": "a term",
    "2.5 to 97.5 %": "what an interval is",
}


def literal_figures(template: str) -> list[str]:
    """Numbers in the template's prose and tables that do not come from the report."""
    text = re.sub(r"\A---\n.*?\n---\n", "", template, flags=re.DOTALL)
    text = re.sub(r"\{%-? *macro way.*?endmacro *-?%\}", "", text, flags=re.DOTALL)
    text = re.sub(r"\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\}", " ", text, flags=re.DOTALL)
    text = re.sub(r"```.*?```|`[^`\n]*`|<!--.*?-->|https?:\S+", " ", text, flags=re.DOTALL)
    text = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
    for words in NO_FIGURES:
        text = text.replace(words, " ")
    return re.findall(r"[\w.,%-]*\d[\w.,%-]*", text)


@pytest.fixture(scope="module")
def report() -> dict:
    return gather_reports(ROOT / "docs", EMBEDDED_CHECKPOINT)


def test_the_card_is_what_the_reports_say(report):
    card = (ROOT / "pipeline_card.md").read_text(encoding="utf-8")
    assert make_card.render(report) == card, "run: python train/make_card.py"
    other = copy.deepcopy(report)
    other["generation"]["generated"]["train"]["modalities"]["cxr"]["balanced_accuracy"] = 0.4321
    assert "| CXR | 0.43 [" in make_card.render(other)


def test_no_figure_is_typed_by_hand():
    template = make_card.TEMPLATE.read_text(encoding="utf-8")
    assert literal_figures(template) == []
    for claim in ("It finds 0.97 of them.", "| CXR | 93 % |", "Trained on 12,000 images", "removes 1 in 3"):
        assert literal_figures(f"{template}\n{claim}\n"), claim


def test_a_figure_that_the_report_lacks_is_an_error(report):
    lacking = copy.deepcopy(report)
    del lacking["filter"]["people"]["kappa"]
    with pytest.raises(jinja2.UndefinedError, match="kappa"):
        make_card.render(lacking)


def test_huggingface_hub_reads_the_card():
    card = ModelCard.load(ROOT / "pipeline_card.md", ignore_metadata_errors=False)
    assert card.data.license == "other" and card.data.license_name
    assert (card.data.library_name, card.data.pipeline_tag) == ("diffusers", "text-to-image")
    assert {"medical", "synthetic"} <= set(card.data.tags) and len(card.data.datasets) > 5
