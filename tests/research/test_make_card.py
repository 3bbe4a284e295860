"""The card of the embedded model claims nothing that its reports do not say."""

import copy
import re

import anatomy
import jinja2
import make_card
import pytest
from conftest import ROOT
from huggingface_hub import ModelCard

from minim_pipeline import EMBEDDED_CHECKPOINT, MODALITIES
from minim_pipeline.files import write_report
from minim_pipeline.publishing.reports import find_page, read_sections


# Numbers that are no results, and what they are.
NO_FIGURES = {
    "Nature Medicine, 2025": "the paper's year",
    "arXiv 2505.23343": "a paper",
    "at 256 px": "the size of the images",
    "from 1 to 3": "the scale of ratings",
    "Apache License 2.0": "a licence",
    "2.5 to 97.5 %": "what an interval is",
    "1 where something is there that cannot be, 2 where that is doubtful,\n3 where nothing": "the scale of ratings",
    "| | rated | 1 | accepted | 1, of accepted |": "the scale of ratings",
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


# Parts of reports that a model may come without.
FIGURE = {"value": 0.1234, "interval": [0.1, 0.2], "n": 9}
REALISM = {"sharpness": {"value": 0.9876}, "two_sample": {}}
TESTS = {"raw": {"value": 0.8765}, "raw_floor": {"value": 0.5111}, "decoded": {"value": 0.7654}}
TESTS |= {"decoded_floor": {"left_out": "too few"}}
POINT = {"guidance": 1.5, "candidates": 4, "read": {"value": 0.9753}, "accepted": {"left_out": "no filter"}}
GAIN = {"gain": FIGURE | {"modalities": {"oct": FIGURE}}, "gain_at": 2000, "real": {"accuracy": 0.5}}
GAIN |= {"points": [{"accuracy": 0.6}]}
DOWNSTREAM = {
    "settings": {"findings": 22, "seeds": [0, 1, 2], "share_of_real_images": 0.1},
    "real": {"n_train": 5712, "accuracy": 0.7},
    "synthetic": {"accuracy": 0.6},
    "cas_ratio": FIGURE | {"modalities": {"oct": FIGURE}},
    "low_data": {"data_sharing": GAIN, "honest_low_data": GAIN},
}


@pytest.fixture(scope="module")
def report() -> dict:
    return make_card.gather(ROOT / "docs", EMBEDDED_CHECKPOINT)


@pytest.fixture
def whole(report) -> dict:
    """The report of a model of which all has been measured: what this one lacks is made up."""
    shown = copy.deepcopy(next(iter(make_card.evaluations(report).values())))
    whole = {name: copy.deepcopy(part) for name, part in report.items() if not name.startswith("evaluation")}
    whole["evaluation_new"] = shown
    names = [extractor["name"] for extractor in shown["extractors"]]
    for part in shown["modalities"].values():
        part["realism"] = REALISM | {"two_sample": dict.fromkeys(names, TESTS)}
    seen = {"frechet_over_floor": {"value": 1.5432}, "recall": {"value": 0.8642}}
    points = [POINT | {"extractors": dict.fromkeys(names, seen)}]
    curve = {"real": {"value": 0.8}, "points": points}
    whole["evaluation_curve"] = shown | {"curve": curve, "downstream": DOWNSTREAM}
    shown["downstream"] = DOWNSTREAM | {"note": "Measured of another model."}
    for figures in whole["generation"]["generated"].values():
        parts = {
            name: {"value": 0.5, "findings": {finding: {"value": 0.75} for finding in part["findings"]}}
            for name, part in figures["modalities"].items()
        }
        parts["oct"]["findings"]["normal"] = {"value": 0.0625}
        figures["acceptance"] = {"value": 0.55, "modalities": parts}
    rows = [{"rating": 1 + i % 3, "accepted": "true", "score": 2 + i / 10, "realism": i % 3} for i in range(6)]
    rated = anatomy.figures(rows)
    whole["anatomy"] = {"rater": "not a clinician", **rated, "modalities": {"oct": rated}}
    return whole


def test_the_card_is_what_the_reports_say(report):
    card = (ROOT / "pipeline_card.md").read_text(encoding="utf-8")
    assert make_card.render(report) == card, "run: python research/make_card.py"
    other = copy.deepcopy(report)
    other["generation"]["generated"]["train"]["modalities"]["cxr"]["balanced_accuracy"] = 0.4321
    other["generation"]["generated"]["train"]["modalities"]["cxr"]["balanced_accuracy_merged"] = 0.5432
    assert "| CXR | 0.43 [" in make_card.render(other) and "| CXR | 0.54 |" in make_card.render(other)


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
        for finding, figures in make_card.by_family(read).items()
    ]
    card = make_card.render(report)
    named = re.findall(r'^"(.+)" in \w+ \((.*?),', card, flags=re.MULTILINE)
    worst = sorted(findings)[:6]
    assert [shown for _, shown in named] == [f"{accuracy:.2f}" for accuracy, *_ in worst]
    assert [finding for finding, _ in named] == [finding for *_, finding in worst]
    other = copy.deepcopy(report)
    for part in other["generation"]["generated"]["new"]["modalities"].values():
        for figures in make_card.by_family(part).values():
            figures["accuracy"] = 0.9
    make_card.by_family(other["generation"]["generated"]["new"]["modalities"]["oct"])["normal"]["accuracy"] = 0.1234
    assert '"normal" in OCT (0.12, ' in make_card.render(other)


def test_a_modality_has_its_rows_where_it_has_figures(report):
    def without(figures):
        """The figures of a model that has not learned brain MRI."""
        for name, value in list(figures.items()):
            if isinstance(value, dict):
                without(value)
            if name.endswith("brain_mri"):
                del figures[name]

    other = copy.deepcopy(report)
    without(other)
    for comparison in other["filter"]["comparisons"]:
        without(comparison)
    card, before = make_card.render(other), make_card.render(report)
    rows = {name: len(re.findall(rf"^\| {name}\b.*", before, flags=re.MULTILINE)) for name in ("OCT", "BrainMRI")}
    assert rows["BrainMRI"] > 2 and "BrainMRI" not in card and "brain MRI" not in card.split("## Data")[0]
    assert len(re.findall(r"^\| OCT\b.*", card, flags=re.MULTILINE)) == rows["OCT"]


SECTIONS = {
    "data": "## Data",
    "filter": "## Filter",
    "rounds": "rounds of self-improvement",
    "anatomy": "### Anatomy, rated by eye",
    "evaluation_curve": "*Guidance and candidates*",
}


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_is_there_where_its_report_is(section, whole):
    if section in whole:
        assert SECTIONS[section] in make_card.render(whole)
    whole.pop(section, None)
    card = make_card.render(whole)
    assert SECTIONS[section] not in card
    assert [said for name, said in SECTIONS.items() if name in whole and said not in card] == []


def test_without_evaluations_nothing_is_compared(report):
    card = make_card.render({name: part for name, part in report.items() if not name.startswith("evaluation")})
    assert "### Beside real images" not in card and "## Known flaws" in card


def test_what_only_some_reports_have_is_told(whole):
    card = make_card.render(whole)
    assert "Of what a user gets, with the filter on." in card
    assert re.search(r"^\*Accepted\* by the filter[^#]*^\| OCT \| 0\.50 \|", card, flags=re.MULTILINE)
    assert re.search(r'^Accepted least.*\n"normal" in OCT 0\.06 \(0\.06\),$', card, flags=re.MULTILINE)
    told = r"0\.77 / 0\.77 \| – \| 0\.88 / 0\.88 \| 0\.51 \| 0\.99 / 0\.99 \|"
    assert re.search(rf"^\*Told from real images\*[^#]*^\| OCT \| {told}", card, flags=re.MULTILINE)
    assert "| 1.5 | 4 | 0.98 | – | 1.54 | 0.86 |" in card
    assert "rated by somebody who is not a clinician" in card and "| all | 6 | 33.3 % | 6 | 33.3 % [" in card
    assert "\n\nAUROC of the parts of the score: realism 1.00.\n" in card


def test_the_card_says_of_which_model_the_downstream_part_was_measured(whole):
    assert "*Worth as training data*. Measured of another model. A small" in make_card.render(whole)
    del next(iter(make_card.evaluations(whole).values()))["downstream"]["note"]
    assert "*Worth as training data*. A small" in make_card.render(whole)


def test_every_phrasing_has_its_place_in_a_cell(report):
    shown = next(iter(make_card.evaluations(report).values()))
    other = {name: part for name, part in report.items() if not name.startswith("evaluation")}
    other |= dict.fromkeys(("evaluation_train", "evaluation_new", "evaluation_test"), shown)
    value = make_card.dp(make_card.compared(shown)["oct"]["recall"], 2)
    assert f"| {value} / {value} / {value} |" in make_card.render(other)


def test_what_the_card_says_of_data_is_counted(report):
    data, card = report["data"], make_card.render(report)
    for name, part in data["modalities"].items():
        assert f"| {MODALITIES[name].name} | {part['train']} | {part['val']} | {len(part['findings'])} |" in card
        assert set(part["sources"]) <= set(make_card.SOURCES["titles"])
    assert all(note in card for note in make_card.SOURCES["notes"][data["name"]])


def test_the_page_that_is_shown_is_that_of_new_phrasings(tmp_path):
    assert find_page(tmp_path) is None
    for folder in ("evaluation", "evaluation/new"):
        page = tmp_path / folder / "report.html"
        page.parent.mkdir()
        page.touch()
        assert find_page(tmp_path) == page
    write_report(tmp_path / "report.json", {"sets": {}, "curve": {"points": []}})
    assert list(read_sections(tmp_path / "report.json")) == ["evaluation"], "a curve is no section by itself"


def test_huggingface_hub_reads_the_card():
    card = ModelCard.load(ROOT / "pipeline_card.md", ignore_metadata_errors=False)
    assert card.data.license == "other" and card.data.license_name
    assert (card.data.library_name, card.data.pipeline_tag) == ("diffusers", "text-to-image")
    assert {"medical", "synthetic"} <= set(card.data.tags) and len(card.data.datasets) > 5
