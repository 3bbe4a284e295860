"""Parts of the page of a report: tables and their cells, numbers in words, and ways through the report.

A cell is `{"text", "interval", "details", "why", "head", "wide"}`; `why` says why a figure is missing. No key is
called as a method of dict is, such as `copy`: the template would find the method.
"""

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeGuard

import numpy as np
from PIL import Image

from ..modalities import MODALITIES


DASH = "—"
THUMBNAIL = 160  # px, the longer side


# Parts of a section


def make_table(
    title: str, head: Sequence[str], rows: list[list[dict]], reading: str, text: str = "", folded: bool = False
) -> dict:
    """A table of cells, with the reasons of left-out figures numbered in order as its footnotes."""
    notes = list(dict.fromkeys(cell["why"] for row in rows for cell in row if cell["why"]))
    rows = [[{**cell, "note": notes.index(cell["why"]) + 1 if cell["why"] else None} for cell in row] for row in rows]
    return {
        "kind": "table",
        "title": title,
        "text": text,
        "head": head,
        "rows": rows,
        "notes": notes,
        "reading": reading,
        "folded": folded,
    }


def make_facts(facts: Iterable[tuple[str, object]], title: str = "", folded: bool = False) -> dict:
    facts = [(name, plain(value)) for name, value in facts]
    return {"kind": "facts", "title": title, "facts": facts, "folded": folded}


def left_out_part(reason: str, title: str = "") -> dict:
    return {"kind": "left_out", "title": title, "reason": reason}


def plot_part(svg: str, title: str) -> dict:
    from markupsafe import Markup  # comes with jinja2

    return {"svg": Markup(svg), "title": title}  # our own, from numbers only: the one thing that is not escaped


def training_row(name: str, part: Mapping, modalities: Sequence[str]) -> list[dict]:
    """A row of accuracies of one training: all, and each modality."""
    cells = [figure_cell(accuracy_of(part, "accuracy", ("n_train",)), "percent")]
    if part.get("seeds"):
        cells[0]["details"].append(f"each seed {', '.join(written(each, 'percent') for each in part['seeds'])}")
    each = (accuracy_of(reach(part, "modalities", modality), "accuracy") for modality in modalities)
    return [head_cell(name), *cells, *(figure_cell(figure, "percent") for figure in each)]


def cells_with_modalities(figure: Mapping, modalities: Sequence[str], style: str = "number") -> list[dict]:
    """Cells of a figure and of what it has under `modalities`, figures or plain numbers; empty if it has none."""
    cells = [figure_cell(figure, style)]
    for modality in modalities:
        mine = reach(figure, "modalities", modality)
        mine = mine if isinstance(mine, Mapping) else {"value": mine}
        cells.append(figure_cell(mine, style) if "modalities" in figure else text_cell(""))
    return cells


# Cells of a table: {"text", "interval", "details", "why", "head", "wide"}


def text_cell(text: str, wide: bool = False) -> dict:
    return {"text": text, "interval": "", "details": [], "why": "", "head": False, "wide": wide}


def head_cell(text: str) -> dict:
    return {**text_cell(text), "head": True}


def modality_cell(report: Mapping, modality: str) -> dict:
    n = reach(report, "modalities", modality, "n")
    words = ("real", "synthetic", "train")
    details = [f"{key} {plain(n[key])}" for key in words if n.get(key) is not None]
    return {**head_cell(name_of(modality)), "details": details}


def figure_cell(figure: Mapping, style: str = "number") -> dict:
    """The cell of a figure: its value and interval, and under it whatever else it carries, such as n or chance."""
    if "left_out" in figure:
        return {**text_cell(DASH), "why": figure["left_out"]}
    value, interval = figure.get("value"), figure.get("interval")
    if not is_number(value):
        return {**text_cell(DASH), "why": "not computed"}
    if not interval or not all(map(is_number, interval)):
        interval = None
    unit = "percent" if style == "points" else style
    details = [
        f"{key.replace('_', ' ')} {written(each, unit) if key == 'chance' else plain(each)}"
        for key, each in figure.items()
        if key not in ("value", "interval", "modalities") and each is not None
    ]
    cell = {**text_cell(written(value, style, interval)), "details": details}
    if interval:
        bounds = (written(bound, style, interval).removesuffix(" %").removesuffix(" points") for bound in interval)
        cell["interval"] = f"[{', '.join(bounds)}]"
    return cell


def share_cell(part: Mapping) -> dict:
    """The cell of a share of copies."""
    cell = figure_cell(value_of(part, "share", ("interval", "captions")), "percent")
    if {"copies", "n"} <= part.keys():
        cell["details"].insert(0, f"{plain(part['copies'])} of {plain(part['n'])}")
    return cell


def value_of(part: Mapping, key: str, extra: Iterable[str] = ()) -> dict:
    """`part[key]` as a figure of its own, with the `extra` keys that `part` has."""
    if "left_out" in part:
        return {"left_out": part["left_out"]}
    return {"value": part.get(key), **{name: part[name] for name in extra if name in part}}


def accuracy_of(part: Mapping, key: str, extra: Iterable[str] = ()) -> dict:
    """As `_value`, with the interval of `part`, which is that of its first accuracy."""
    figure = value_of(part, key, extra)
    if key in ("accuracy", "balanced_accuracy") and part.get("interval"):
        figure["interval"] = part["interval"]
    return figure


# Words and numbers


def written(value: float, style: str = "number", interval: Sequence[float] | None = None) -> str:
    """A number with as many digits as make sense.

    Args:
        value: finite.
        style: `number`; `percent` of a share; `points` of a difference of shares, with its sign.
        interval: (low, high), if known: a plain number has the decimals that show three digits of the largest of the
            three, so that all are written alike. Percentages and points always have one decimal.
    """
    value = value if style == "number" else value * 100
    largest = max(map(abs, (value, *(interval or ()))))
    if style != "number":
        decimals = 1
    else:
        decimals = 2 - math.floor(math.log10(largest)) if largest else 0
    if decimals > 7:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa} × 10^{int(exponent)}".replace("-", "−")
    text = f"{value:{'+' if style == 'points' else ''}.{max(decimals, 0)}f}"
    if not float(text):
        text = text.lstrip("+-")
    return text.replace("-", "−") + {"number": "", "percent": " %", "points": " points"}[style]


def plain(value: object) -> str:
    """Any value of the report in words."""
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}".replace("-", "−")
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {plain(each)}" for key, each in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(plain, value))
    return str(value)


def set_words(part: Mapping) -> str:
    split = f"split {part['split']}, " if part.get("split") else ""
    return f"{part['file']}, {split}{plain(part['n'])} images"


def name_of(modality: str) -> str:
    return MODALITIES[modality].name if modality in MODALITIES else modality


def titled(words: Iterable[str]) -> list[str]:
    return [word.capitalize() for word in words]


# Ways through the report


def reach(part: Mapping, *keys: str):
    """What lies at the end of `keys`; on the way a `left_out` ends it, and so does a key that is not there."""
    for key in keys:
        if "left_out" in part:
            return part
        if part.get(key) is None:
            return {"left_out": "not computed"}
        part = part[key]
    return part


def keys_of(*parts: Mapping) -> list[str]:
    """The keys of all parts, in order, without that of what is left out."""
    return [key for key in dict.fromkeys(key for part in parts for key in part) if key != "left_out"]


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and math.isfinite(value)


def thumbnail(image: np.ndarray) -> dict:
    """`uri`, `width` and `height` of an image, uint8 [H, W, 3], made `THUMBNAIL` px a side at most.

    The address holds the image itself, as WebP.
    """
    picture = Image.fromarray(np.asarray(image))
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    picture.save(file, format="WEBP", quality=80)
    data = base64.b64encode(file.getvalue()).decode()
    return {"uri": f"data:image/webp;base64,{data}", "width": picture.width, "height": picture.height}
