"""Parts of the page of a report: tables and their cells, numbers in words, and ways through the report.

No key of a part is called as a method of dict is, such as `copy`: the template would find the method.
"""

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeGuard

import numpy as np
from PIL import Image

from ..modalities import MODALITIES


DASH = "—"
THUMBNAIL = 160  # px, the longer side


@dataclass
class Cell:
    """A cell of a table; `why` says why its figure is missing, and becomes a footnote."""

    text: str
    interval: str = ""
    details: list[str] = field(default_factory=list)
    why: str = ""
    head: bool = False
    wide: bool = False


# Parts of a section


def make_table(
    title: str, head: Sequence[str], rows: list[list[Cell]], reading: str, text: str = "", folded: bool = False
) -> dict:
    """A table of cells, with the reasons of left-out figures in order as its footnotes."""
    notes = list(dict.fromkeys(cell.why for row in rows for cell in row if cell.why))
    shown = {"head": head, "rows": rows, "notes": notes, "reading": reading}
    return {"kind": "table", "title": title, "text": text, "folded": folded, **shown}


def make_facts(facts: Iterable[tuple[str, object]], title: str = "", folded: bool = False) -> dict:
    facts = [(name, plain(value)) for name, value in facts]
    return {"kind": "facts", "title": title, "facts": facts, "folded": folded}


def left_out_part(reason: str, title: str = "") -> dict:
    return {"kind": "left_out", "title": title, "reason": reason}


def plot_part(svg: str, title: str) -> dict:
    from markupsafe import Markup  # comes with jinja2

    return {"svg": Markup(svg), "title": title}  # our own, from numbers only: the one thing that is not escaped


# Cells of a table


def training_row(name: str, part: Mapping, modalities: Sequence[str]) -> list[Cell]:
    """A row of accuracies of one training: all, and each modality."""
    whole = figure_cell(value_of(part, "accuracy", ("n_train",)), "percent")
    if part.get("seeds"):
        whole.details.append(f"each seed {', '.join(written(each, 'percent') for each in part['seeds'])}")
    each = (value_of(reach(part, "modalities", modality), "accuracy") for modality in modalities)
    return [head_cell(name), whole, *(figure_cell(figure, "percent") for figure in each)]


def cells_with_modalities(figure: Mapping, modalities: Sequence[str], style: str = "number") -> list[Cell]:
    """Cells of a figure and of what it has under `modalities`, figures or plain numbers; empty if it has none."""
    cells = [figure_cell(figure, style)]
    for modality in modalities:
        each = reach(figure, "modalities", modality)
        each = each if isinstance(each, Mapping) else {"value": each}
        cells.append(figure_cell(each, style) if "modalities" in figure else Cell(""))
    return cells


def head_cell(text: str, details: Sequence[str] = ()) -> Cell:
    return Cell(text, details=list(details), head=True)


def modality_cell(modality: str, part: Mapping) -> Cell:
    sets = ("real", "synthetic", "train")
    n = reach(part, "n")
    return head_cell(name_of(modality), [f"{name} {plain(n[name])}" for name in sets if n.get(name) is not None])


def figure_cell(figure: Mapping, style: str = "number") -> Cell:
    """The cell of a figure: its value and interval, and under it whatever else it carries, such as n or chance."""
    value, interval = figure.get("value"), figure.get("interval")
    if "left_out" in figure or not is_number(value):
        return Cell(DASH, why=figure.get("left_out", "not computed"))
    if not interval or not all(map(is_number, interval)):
        interval = None
    unit = "percent" if style == "points" else style
    details = [
        f"{key.replace('_', ' ')} {written(each, unit) if key == 'chance' else plain(each)}"
        for key, each in figure.items()
        if key not in ("value", "interval", "modalities") and each is not None
    ]
    bounds = (written(bound, style, interval).removesuffix(" %").removesuffix(" points") for bound in interval or ())
    return Cell(written(value, style, interval), f"[{', '.join(bounds)}]" if interval else "", details)


def share_cell(part: Mapping) -> Cell:
    """The cell of a share of copies."""
    cell = figure_cell(value_of(part, "share", ("interval", "captions")), "percent")
    if {"copies", "n"} <= part.keys():
        cell.details.insert(0, f"{plain(part['copies'])} of {plain(part['n'])}")
    return cell


def value_of(part: Mapping, key: str, extra: Iterable[str] = ()) -> dict:
    """`part[key]` as a figure of its own, with the `extra` keys that `part` has; its interval is the accuracy's."""
    if "left_out" in part:
        return {"left_out": part["left_out"]}
    if key in ("accuracy", "balanced_accuracy") and part.get("interval"):
        extra = (*extra, "interval")
    return {"value": part.get(key), **{name: part[name] for name in extra if name in part}}


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


def name_of(modality: str) -> str:
    return MODALITIES[modality].name if modality in MODALITIES else modality


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
