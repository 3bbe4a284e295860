"""The page's sections of what is told from real images, and of the curve of guidance and candidates."""

from collections.abc import Mapping

from .page_parts import (
    AS_ABOVE,
    WORDS,
    Cell,
    figure_cell,
    figures_table,
    head_cell,
    is_number,
    keys_of,
    left_out_part,
    make_table,
    modality_cell,
    plain,
    plot_part,
    reach,
)
from .plots import realism_curve


def realism_parts(report: Mapping) -> list[dict]:
    """Tables of the two-sample test through each extractor, of the network's, and of sharpness."""
    words = WORDS["realism"]
    found = {name: part["realism"] for name, part in report["modalities"].items() if part.get("realism")}
    if not found:
        return []
    parts: list[dict] = []
    for name in keys_of(*(reach(part, "two_sample") for part in found.values())):
        reading = AS_ABOVE if parts else ""
        place = ["realism", "two_sample", name]
        parts.append(figures_table(report, "realism", f"Features of {name}", place, reading=reading))
    if any("two_sample_trained" in part for part in found.values()):
        place = ["realism", "two_sample_trained"]
        parts.append(figures_table(report, "realism", "A fine-tuned network", place, reading=words["trained"]))
    rows = [
        [modality_cell(name, part), figure_cell(reach(part, "realism", "sharpness"))]
        for name, part in report["modalities"].items()
    ]
    return [*parts, make_table("Sharpness", ["Modality", "Over that of real images"], rows, words["sharpness"])]


def curve_parts(curve: Mapping) -> list[dict]:
    """A plot and a table of each extractor; where nothing was read there is no plot, and why."""
    words, points, parts = WORDS["curve"], curve["points"], []
    for index, name in enumerate(keys_of(*(point["extractors"] for point in points))):
        lines: dict[int, list[dict]] = {}
        rows = []
        for point in points:
            far, read = (point["extractors"][name]["frechet_over_floor"], point["read"])
            if is_number(far.get("value")) and is_number(read.get("value")):
                place = {"guidance": point["guidance"], "over_floor": far["value"], "read": read["value"]}
                lines.setdefault(point["candidates"], []).append(place)
            figures = [figure_cell(read, "percent"), figure_cell(far)]
            figures += [figure_cell(point["extractors"][name]["recall"]), figure_cell(point["accepted"], "percent")]
            rows.append([head_cell(plain(point["guidance"])), Cell(plain(point["candidates"])), *figures])
        if lines:
            svg = realism_curve(lines, curve["real"].get("value"), f"curve-{index}")
            plots = [plot_part(svg, f"Features of {name}")]
            parts.append({"kind": "plots", "title": "", "plots": plots, "reading": words["plot"]})
        else:
            missing = (figure["left_out"] for figure in (read, far) if "left_out" in figure)
            parts.append(left_out_part(next(missing), f"Plot, features of {name}"))
        head = ["Guidance", "Candidates", "Finding read", "Over floor", "Recall", "Accepted"]
        parts.append(make_table(f"Figures, features of {name}", head, rows, AS_ABOVE if index else words["reading"]))
    return parts
