"""The card of the embedded model claims nothing that its reports do not say."""

import copy
import re

import jinja2
import make_card
import pytest
from conftest import ROOT
from huggingface_hub import ModelCard

from minim_pipeline import EMBEDDED_CHECKPOINT
from minim_pipeline.publishing.reports import gather_reports


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
    "2.5 to 97.5 %": "what an interval is",
    "gain_at // 100": "percent, as times",
}


def literal_figures(template: str) -> list[str]:
    """Numbers in the template that do not come from the report: in prose, in tables, and in what Jinja works out."""
    text = re.sub(r"\A---\n.*?\n---\n", "", template, flags=re.DOTALL)
    for words in NO_FIGURES:
        text = text.replace(words, " ")
    text = re.sub(r"\{\{.*?\}\}|\{%.*?%\}", typed_in, text, flags=re.DOTALL)
    text = re.sub(r"\{#.*?#\}|```.*?```|`[^`\n]*`|<!--.*?-->|https?:\S+", " ", text, flags=re.DOTALL)
    text = re.sub(r"\n\n(?: {4}.*\n)+", "\n\n", text)  # commands
    return re.findall(r"[\w.,%-]*\d[\w.,%-]*", text)


def typed_in(expression: re.Match) -> str:
    """The numbers of an expression that may be figures: not in names, and more than an index or a count of places."""
    code = re.sub(r'"[^"]*"', "", expression[0])
    return " ".join([" ", *re.findall(r"(?<![\w.])(?:\d+\.\d+|\d{2,})", code), " "])


@pytest.fixture(scope="module")
def report() -> dict:
    return gather_reports(ROOT / "docs", EMBEDDED_CHECKPOINT)


def test_the_card_is_what_the_reports_say(report):
    card = (ROOT / "pipeline_card.md").read_text(encoding="utf-8")
    assert make_card.render(report) == card, "run: python research/make_card.py"
    other = copy.deepcopy(report)
    other["generation"]["generated"]["train"]["modalities"]["cxr"]["balanced_accuracy"] = 0.4321
    assert "| CXR | 0.43 [" in make_card.render(other)


def test_no_figure_is_typed_by_hand():
    template = make_card.TEMPLATE.read_text(encoding="utf-8")
    assert literal_figures(template) == []
    assert [words for words in NO_FIGURES if words not in template] == []
    claims = ["It finds 0.97 of them.", "| CXR | 93 % |", "Trained on 12,000 images", "removes 1 in 3"]
    for claim in [*claims, "{{ 0.97 }}", "{% set found = 93 %}", "- It finds\n    0.97 of them"]:
        assert literal_figures(f"{template}\n{claim}\n"), claim


def test_a_figure_that_the_report_lacks_is_an_error(report):
    lacking = copy.deepcopy(report)
    del lacking["filter"]["people"]["kappa"]
    with pytest.raises(jinja2.UndefinedError, match="kappa"):
        make_card.render(lacking)
    lacking = copy.deepcopy(report)
    del lacking["filter"]["comparisons"][0]["candidates"]
    with pytest.raises(jinja2.UndefinedError, match="candidates"):
        make_card.render(lacking)


def test_the_worst_findings_are_the_reports(report):
    findings = [
        (figures["accuracy"], modality, finding)
        for modality, read in report["generation"]["generated"]["new"]["modalities"].items()
        for finding, figures in read["findings"].items()
    ]
    card = make_card.render(report)
    named = re.findall(r'^"(.+)" in \w+ \((.*?),', card, flags=re.MULTILINE)
    worst = sorted(findings)[:6]
    assert [shown for _, shown in named] == [f"{accuracy:.2f}" for accuracy, *_ in worst]
    assert [finding for finding, _ in named] == [finding for *_, finding in worst]
    other = copy.deepcopy(report)
    other["generation"]["generated"]["new"]["modalities"]["oct"]["findings"]["normal"]["accuracy"] = 0.1234
    assert '"normal" in OCT (0.12, ' in make_card.render(other)


def test_a_modality_that_is_added_has_its_rows(report):
    def add(figures):
        """The figures of a seventh modality are brain MRI's, but for training on them, which is measured apart."""
        for name, value in list(figures.items()):
            if isinstance(value, dict) and name != "downstream":
                add(value)
            if name.endswith("brain_mri"):
                figures[name.replace("brain_mri", "breast_mri")] = value

    other = copy.deepcopy(report)
    add(other)
    card, before = make_card.render(other), make_card.render(report)
    rows = [len(re.findall(r"^\| BrainMRI\b.*", text, flags=re.MULTILINE)) for text in (card, before)]
    assert rows[0] == rows[1] == len(re.findall(r"^\| BreastMRI\b.*", card, flags=re.MULTILINE)) > 2
    assert "BreastMRI" not in before


def test_the_card_says_of_which_model_the_downstream_part_was_measured(report):
    other = copy.deepcopy(report)
    other["evaluation"]["downstream"]["note"] = "Measured of another model."
    assert "*Worth as training data*. Measured of another model. A small" in make_card.render(other)
    del other["evaluation"]["downstream"]["note"]
    assert "*Worth as training data*. A small" in make_card.render(other)


def test_huggingface_hub_reads_the_card():
    card = ModelCard.load(ROOT / "pipeline_card.md", ignore_metadata_errors=False)
    assert card.data.license == "other" and card.data.license_name
    assert (card.data.library_name, card.data.pipeline_tag) == ("diffusers", "text-to-image")
    assert {"medical", "synthetic"} <= set(card.data.tags) and len(card.data.datasets) > 5
