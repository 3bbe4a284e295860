"""The page about the model: its card, and the evaluation report."""

import re
from pathlib import Path

import gradio as gr


ROOT = Path(__file__).resolve().parent.parent


def first_file(*paths: Path) -> Path | None:
    return next((path for path in paths if path.is_file()), None)


def build(model: str) -> Path | None:
    """Adds the page to the `gr.Blocks` that is open; returns the evaluation report, if there is one."""
    card = first_file(Path(model) / "README.md", ROOT / "pipeline_card.md")
    report = first_file(Path(model) / "evaluation" / "report.html", ROOT / "docs" / "evaluation" / "report.html")
    if report is not None:
        gr.Markdown(
            "The figures below come from measurements; [the evaluation report](report) has all of them, with plots."
        )
    if card is None:
        gr.Markdown("This model comes without a card.")
    else:
        # Without the front matter, which is for the Hub; links to files of the repository lead nowhere here.
        text = re.sub(r"\A---\n.*?\n---\n", "", card.read_text(encoding="utf-8"), flags=re.DOTALL)
        gr.Markdown(re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]+\)", r"\1", text))
    return report
