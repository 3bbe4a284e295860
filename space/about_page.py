"""The page about the model: its card, and the evaluation report."""

import re
from pathlib import Path

import gradio as gr
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from minim_pipeline import EMBEDDED_CHECKPOINT
from minim_pipeline.publishing.reports import find_page


ROOT = Path(__file__).resolve().parent.parent


def from_hub(model: str, name: str) -> Path | None:
    """A file of a model on the Hub, if it has that one."""
    try:
        return Path(hf_hub_download(model, name))
    except EntryNotFoundError:
        return None


def build(model: str) -> Path | None:
    """Adds the page to the `gr.Blocks` that is open; returns the evaluation report, if there is one."""
    card, report = Path(model) / "README.md", Path(model) / "evaluation" / "report.html"
    if model == str(EMBEDDED_CHECKPOINT):
        card, report = ROOT / "pipeline_card.md", find_page(ROOT / "docs")
    elif not Path(model).is_dir():
        card, report = (from_hub(model, name) for name in ("README.md", "evaluation/report.html"))
    card, report = (path if path is not None and path.is_file() else None for path in (card, report))
    if report is not None:
        gr.Markdown(
            "The figures below come from measurements; [the evaluation report](report) has all of them, with plots."
        )
    if card is None:
        gr.Markdown("This model comes without a card.")
    else:
        # Without the front matter, which is for the Hub; links to files of the repository lead nowhere here.
        text = re.sub(r"\A---\n.*?\n---\n", "", card.read_text(encoding="utf-8"), flags=re.DOTALL)
        gr.Markdown(re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]+\)", r"\1", text), elem_id="about")
    return report
