"""The card of a published model, its README.md: read, checked, and completed with what only publication knows."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from .reports import eval_results


# What stands for the repository's id in a card before it has one.
PLACEHOLDER = "org/minim"
REQUIRED = ("license", "library_name", "pipeline_tag", "tags")
FIXED: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
NO_FILTER = (
    "**This model comes without a filter head**: every image that is drawn is given back, none is rated, and copies of"
    " training images are not found."
)
PLAIN = Path(__file__).with_name("plain_card.md").read_text(encoding="utf-8")


@dataclass
class Sample:
    """A picture that the card shows: `path` in the repository, of what was asked for."""

    path: str
    modality: str
    prompt: str


def read_card(path: str | Path) -> ModelCard:
    """A card from a file; ValueError if there is none, or a field is missing that the Hub needs."""
    try:
        card = ModelCard(Path(path).read_text(encoding="utf-8"), ignore_metadata_errors=False)
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is no model card: {reason}") from error
    fields = card.data.to_dict()
    missing = [name for name in REQUIRED if not fields.get(name)]
    if fields.get("license") == "other" and not fields.get("license_name"):
        missing.append("license_name")
    if missing:
        raise ValueError(f"The front matter of {path} lacks {', '.join(missing)}: the Hub needs them to list a model.")
    for name, value in FIXED.items():
        if fields[name] != value:
            raise ValueError(f"The front matter of {path} says {name}: {fields[name]}; for a pipeline it is {value}.")
    return card


def write_card(pipe, name: str, has_report: bool, base_model: str | None = None) -> ModelCard:
    """A card for a model that has none of its own: what it is, how it is used, and what it was made from."""
    modalities = pipe.config.modalities or ["oct"]
    prompt = ((pipe.config.findings or {}).get(modalities[0]) or ["macular edema"])[0]
    inherited: dict[str, Any] = dict(pipe.weights_license or {"license": "unknown"})
    fields = {name: value for name, value in inherited.items() if name != "of"}
    data = ModelCardData(**fields, tags=["medical", "synthetic", "diffusers", *modalities], **FIXED)
    if base_model:
        data.base_model = base_model
    drawn = ", ".join(modalities) if pipe.config.modalities else "any modality (a base model, not trained yet)"
    figures = "In [report.json](report.json)." if has_report else "Nothing has been measured, or nothing is told."
    facts = {"name": name, "modalities": drawn, "prompt": prompt, "modality": modalities[0], "figures": figures}
    text = PLAIN.format(license_note=license_note(inherited), **facts)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def license_note(inherited: dict[str, str]) -> str:
    """A paragraph on a license as `license_of` gives it, with line breaks around; empty if nothing was inherited."""
    if "of" not in inherited:
        return ""
    made = f"The weights were made from those of {inherited['of']}, whose license holds for them too"
    return f"\n{made}: **{license_name(inherited)}**.\n"


def license_name(fields: dict[str, str]) -> str:
    return str(fields.get("license_name") or fields.get("license"))


def complete(card: ModelCard, repo_id: str, report: dict, samples: Sequence[Sample], filtered: bool) -> str:
    """The text of README.md: the card with the repository's id, figures for the Hub, pictures, and what is missing."""
    text = card.text.replace(PLACEHOLDER, repo_id)
    if not filtered and NO_FILTER not in text:
        text = re.sub(r"^(# .*\n)", rf"\1\n{NO_FILTER}\n", text, count=1, flags=re.MULTILINE)
    data = card.data.to_dict()
    data.pop("model-index", None)
    results = list(eval_results(report)) or None
    completed = ModelCardData(**data, model_name=repo_id.split("/")[-1] if results else None, eval_results=results)
    completed["widget"] = [{"text": f"{s.modality}: {s.prompt}", "output": {"url": s.path}} for s in samples] or None
    return f"---\n{completed.to_yaml()}\n---\n{text}"
