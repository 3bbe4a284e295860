"""Plots of the evaluation's page as SVG to be written into HTML: no fonts, no clip paths, nothing from outside.

Text, axes and grid have the colour of the text around them (`currentColor`), so that they are seen on light and dark.
Needs matplotlib, which is imported where it is used; pyplot and its global state are not.
"""

import io
import re
from collections.abc import Mapping
from typing import Any

import numpy as np


# Of middling lightness: seen on white and on black. Dashes and marks tell lines apart where colours do not.
SYNTHETIC = "#d9730d"
REAL = "#3b82c4"
STYLES: dict[str, dict] = {
    "synthetic": {"color": SYNTHETIC, "linestyle": "-"},
    "val": {"color": REAL, "linestyle": "--"},
}

# Stands for the colour of the text while matplotlib draws, which knows no currentColor.
_TEXT = "#010203"
_STYLE: dict[Any, Any] = {  # matplotlib's types want literal keys
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": _TEXT,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def distance_curves(curves: Mapping, name: str = "distances") -> str:
    """Cumulative share of images against their distance to the nearest training image, and where copies begin.

    Args:
        curves: `synthetic` and `val`, distances of each image (sequences of float, in any order; either may be
            empty), and `limit`, the distance below which an image is called a copy.
        name: goes in front of the SVG's ids; another for each plot of a page.

    Returns:
        `<svg ...>...</svg>`, the same for the same input.
    """
    lines = {key: np.sort(np.asarray(curves[key], dtype=float)) for key in STYLES if len(curves[key])}
    limit = float(curves["limit"])
    start = min([0.0, *(x[0] for x in lines.values())])  # rounding may give a copy less than 0
    end = max([limit, *(x[-1] for x in lines.values())]) * 1.02

    def draw(axes):
        for key, x in lines.items():
            share = np.arange(len(x) + 1) / len(x) * 100
            label, style = f"{key} (n {len(x)})", {"where": "post", "clip_on": False, **STYLES[key]}
            axes.step([start, *x, end], [*share, 100], label=label, **style)
        axes.axvline(limit, color=_TEXT, linewidth=1, linestyle=":", label=f"limit {limit:.3g}", clip_on=False)
        axes.set(xlabel="distance to the nearest training image", ylabel="images no farther (%)", ylim=(0, 100))
        axes.set_xlim(start, end if end > start else 1)

    return _svg(draw, name)


def downstream_curve(setting: Mapping, name: str = "downstream") -> str:
    """A classifier's accuracy against how many synthetic images are added to the real ones.

    Args:
        setting: `real`, a dict with `accuracy` (0 to 1) of training on the real images alone, and `points`, dicts
            with `percent` (of the real images), `accuracy` and, if known, `interval` (low, high). Points without an
            accuracy are left out.
        name: goes in front of the SVG's ids; another for each plot of a page.

    Returns:
        `<svg ...>...</svg>`, the same for the same input.
    """
    points = [point for point in setting["points"] if point.get("accuracy") is not None]
    points = [{"percent": 0, **setting["real"]}, *sorted(points, key=lambda point: point["percent"])]
    percent = [point["percent"] for point in points]
    accuracy = 100 * np.array([point["accuracy"] for point in points])
    # Without an interval the band shrinks to the line.
    low, high = 100 * np.array([point.get("interval") or [point["accuracy"]] * 2 for point in points]).T

    def draw(axes):
        axes.fill_between(percent, low, high, color=SYNTHETIC, alpha=0.2, linewidth=0, clip_on=False)
        axes.plot(percent, accuracy, "o-", color=SYNTHETIC, markersize=4, label="with synthetic", clip_on=False)
        axes.axhline(accuracy[0], color=REAL, linestyle="--", label="real alone", clip_on=False)
        axes.set(xlabel="synthetic images added (% of the real ones)", ylabel="accuracy (%)")
        axes.set_xlim(left=0)
        # Room for the band; a scale from 0 would hide what a few points are.
        axes.margins(y=0.1)

    return _svg(draw, name)


def _svg(draw, name: str) -> str:
    """What `draw` puts on axes, as SVG without ids of its own name, declarations and links."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(4.6, 3.0), layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        draw(axes)
        axes.grid(alpha=0.15, color=_TEXT, clip_on=False)
        # Above the axes, where it covers nothing.
        figure.legend(loc="outside upper left", ncols=3, handlelength=1.8, columnspacing=1.2, borderpad=0)
        file = io.StringIO()
        # Without any metadata matplotlib writes no block of it, which has the date and addresses in it.
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))

    text = file.getvalue()
    text = text[text.index("<svg") :].strip().replace(_TEXT, "currentColor")
    text = re.sub(r"<!--.*?-->\n?", "", text, flags=re.DOTALL)
    text = text.replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "").replace("xlink:href", "href")
    # The page's fonts. matplotlib writes "font: 9px 'DejaVu Sans', ..." or the same in two declarations.
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    text = re.sub(r"font-family: [^;\"]*; ", "", text)
    # Groups are called axes_1 and the like in every plot; a page holds several.
    prefix = re.sub(r"[^A-Za-z0-9_-]", "-", name)
    return re.sub(r'( id="| href="#)', rf"\1{prefix}-", text)
