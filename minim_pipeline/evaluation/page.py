"""The evaluation's report as one HTML page that stands alone: pictures and plots are in it, nothing is requested.

`render` turns the report into sections of tables, plots and pictures, in plain dicts, whose titles, column heads and
explanations are in `page.json`; `report.html.jinja` only lays them out, with everything escaped. Needs jinja2, and
matplotlib where there are curves to draw.

Whatever lacks a figure says why: a dict with `left_out` in place of a figure, or of a whole part of the report,
becomes a dash with a footnote; what is not in the report at all is "not computed".
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .page_parts import (
    AS_ABOVE,
    DASH,
    WORDS,
    Cell,
    cells_with_modalities,
    figure_cell,
    figures_table,
    head_cell,
    keys_of,
    left_out_part,
    make_facts,
    make_table,
    name_of,
    plain,
    plot_part,
    reach,
    share_cell,
    thumbnail,
    training_row,
    value_of,
    written,
)
from .page_realism import curve_parts, realism_parts
from .plots import distance_curves, downstream_curve


SPACES = {"encoder": "the encoder's features", "pixels": "pixels"}
SIDES = ("synthetic", "real")
WORTHWHILE_GAIN = 0.05  # of balanced accuracy, from adding synthetic images to real ones


def render(report: Mapping, pictures: Mapping, curves: Mapping) -> str:
    """The whole page.

    Args:
        report: what `minim evaluate` writes to `report.json`.
        pictures: `sheets`, modality id -> dicts of synthetic images (`image` uint8 [H, W, 3], `caption`, `lines`: list
            of str, `copy`: bool), and `neighbours`, modality id -> dicts (`synthetic` uint8 [H, W, 3], `train` the
            same or None where the real image may not be shown, `distance`, `names` of both, `copy`). Both may lack.
        curves: modality id -> what `plots.distance_curves` takes. May be empty.

    Returns:
        HTML.

    Raises:
        ModuleNotFoundError: jinja2 is not installed, or matplotlib where there is something to plot.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def if_there(name: str, parts: Callable[[Mapping], list[dict]]) -> list[dict]:
        part = report.get(name)
        return parts(part) if part and "left_out" not in part else [left_out_part(part["left_out"])] if part else []

    # Each is a list of parts; empty where the report has nothing of it.
    sections = {
        "overview": _overview(report),
        "fidelity": _fidelity(report),
        "realism": realism_parts(report),
        "diversity": [figures_table(report, "diversity", "Diversity", ["diversity"])],
        "retrieval": [figures_table(report, "retrieval", "Retrieval", ["retrieval"], "percent")],
        "judges": if_there("judges", _judges),
        "acceptance": _acceptance(report.get("acceptance") or {}),
        "curve": if_there("curve", curve_parts),
        "downstream": if_there("downstream", _downstream),
        "memorisation": _memorisation(report, pictures.get("neighbours") or {}, curves),
        "extraction": if_there("extraction", _extraction),
        "images": [_sheet(name, items) for name, items in (pictures.get("sheets") or {}).items() if items],
        "made": _conditions(report),
    }
    shown = [{"id": name, "title": WORDS[name]["title"], "parts": parts} for name, parts in sections.items() if parts]
    version = reach(report, "made").get("minim", "")
    return environment.get_template("report.html.jinja").render(sections=shown, version=version)


def _overview(report: Mapping) -> list[dict]:
    sets, extractors = report["sets"], report.get("extractors", [])

    def set_words(name: str) -> str:
        split = f"split {sets[name]['split']}, " if sets[name].get("split") else ""
        return f"{sets[name]['file']}, {split}{plain(sets[name]['n'])} images"

    facts = [("Real images", set_words("real")), ("Synthetic images", set_words("synthetic"))]
    facts.append(("Training images", set_words("train") if sets.get("train") else "none given"))
    synthetic = sets["synthetic"]
    if synthetic.get("model"):
        revision = f", revision {synthetic['revision']}" if synthetic.get("revision") else ""
        facts.append(("Model", f"{synthetic['model']}{revision}"))
    labels = reach(report, "labels")
    facts.append(("Labels", f"none: {labels['left_out']}" if "left_out" in labels else f"column {labels['column']}"))
    for extractor in extractors:
        known = [f"{plain(extractor['dimensions'])} dimensions"] if extractor.get("dimensions") else []
        known += [f"digest {extractor['digest']}"] if extractor.get("digest") else []
        facts.append((f"Features of {extractor['name']}", ", ".join(known) or DASH))
    for modality, reason in (report.get("modalities_left_out") or {}).items():
        facts.append((f"{name_of(modality)} left out", reason))

    names = [extractor["name"] for extractor in extractors][:1]
    # What is missing here is said where the section itself would be, or has its reason there.
    judged = [("Found by the judges", "synthetic"), ("Same of real images", "real")] if report.get("judges") else []
    head = ["Modality", *("Fréchet distance", "Fréchet floor", "Over floor", "Coverage") * bool(names)]
    head += [*(title for title, _ in judged), "Copies, by features", "Copies, by pixels"]
    rows = []
    for modality, part in report["modalities"].items():
        row = [head_cell(name_of(modality))]
        for name in names:
            keys = ("frechet_distance", "frechet_floor", "frechet_over_floor", "coverage")
            row += [figure_cell(reach(part, "fidelity", name, key)) for key in keys]
        for _, side in judged:
            found = reach(report, "judges", side, "modalities", modality)
            row.append(figure_cell(value_of(found, "balanced_accuracy"), "percent"))
        rows.append(row + [share_cell(reach(part, "memorisation", space)) for space in SPACES])
    reading = WORDS["overview"]["reading"] + (WORDS["overview"]["features"].format(names[0]) if names else "")
    conversions = report.get("conversions") or []
    changed = [{"kind": "list", "title": "Changed before measuring", "lines": conversions}] if conversions else []
    return [make_facts(facts), *changed, make_table("Main figures", head, rows, reading)]


def _fidelity(report: Mapping) -> list[dict]:
    names = [extractor["name"] for extractor in report.get("extractors", [])]
    names += keys_of(*(reach(part, "fidelity") for part in report["modalities"].values()))
    parts: list[dict] = []
    for name in dict.fromkeys(names):
        reading = AS_ABOVE if parts else ""
        parts.append(figures_table(report, "fidelity", f"Features of {name}", ["fidelity", name], reading=reading))
    return parts or [left_out_part("no extractor was used")]


def _judges(judges: Mapping) -> list[dict]:
    words = WORDS["judges"]
    columns = words["columns"]

    def row(name: str, before: Sequence[str] = (), after: Sequence[str] = (), extra: Sequence[str] = ()) -> list[Cell]:
        cells = [head_cell(name)]
        for key in columns:
            parts = (reach(judges, *before, side, *after) for side in SIDES)
            of_key = extra if key == "balanced_accuracy" else ()
            cells += [figure_cell(value_of(part, key, of_key), "percent") for part in parts]
        return cells

    head = [f"{title}, {side}" for title in columns.values() for side in SIDES]
    modalities = keys_of(*(reach(judges, side, "modalities") for side in SIDES))
    beside = ("chance", "n")
    rows = [row(name_of(modality), (), ("modalities", modality), beside) for modality in modalities]
    rows.append(row("All", extra=beside))
    names = ", ".join(judges.get("names") or judges.get("each") or [])
    title = f"Mean of the judges{f' ({names})' if names else ''}"
    parts = [make_table(title, ["Modality", *head], rows, words["reading"])]
    if judges.get("each"):
        rows = [row(name, ("each", name)) for name in judges["each"]]
        parts.append(make_table("Each judge", ["Judge", *head], rows, words["each"], folded=True))
    for title, kind, place, key in (
        ("Each finding", "Finding", "findings", "accuracy"),
        ("Each family of findings", "Family", "families", "accuracy"),
        ("Within each source", "Source", "within_source", "balanced_accuracy"),
    ):
        rows = []
        for modality in modalities:
            found = [reach(judges, side, "modalities", modality, place) for side in SIDES]
            for name in keys_of(*found):
                cells = [figure_cell(value_of(reach(part, name), key, beside), "percent") for part in found]
                rows.append([head_cell(name_of(modality)), Cell(name), *cells])
        if rows:
            head = ["Modality", kind, *map(str.capitalize, SIDES)]
            parts.append(make_table(title, head, rows, words[place], folded=True))
    return parts


def _acceptance(acceptance: Mapping) -> list[dict]:
    words, modalities, rows = WORDS["acceptance"], acceptance.get("modalities", {}), []
    if not modalities:  # no filter chose, which is no lack
        return []
    for name, part in modalities.items():
        shares = {finding: share["value"] for finding, share in part.get("findings", {}).items()}
        least = min(shares, key=lambda finding: shares[finding], default=None)
        lowest = figure_cell(part["findings"][least], "percent") if least else Cell("")
        rows.append([head_cell(name_of(name)), figure_cell(part, "percent"), lowest, Cell(least or "")])
    rows.append([head_cell("All"), figure_cell({"value": acceptance["value"]}, "percent"), Cell(""), Cell("")])
    head = ["Modality", "Accepted", "Lowest of a finding", "Finding"]
    parts = [make_table("Accepted", head, rows, words["reading"])]
    rows = [
        [head_cell(name_of(name)), Cell(finding), figure_cell(share, "percent")]
        for name, part in modalities.items()
        for finding, share in part.get("findings", {}).items()
    ]
    if rows:
        head = ["Modality", "Finding", "Accepted"]
        parts.append(make_table("Each finding", head, rows, words["findings"], folded=True))
    return parts


def _downstream(downstream: Mapping) -> list[dict]:
    real, synthetic = reach(downstream, "real"), reach(downstream, "synthetic")
    modalities = keys_of(reach(real, "modalities"), reach(synthetic, "modalities"))
    rows = [
        training_row("Real alone", real, modalities),
        training_row("Synthetic alone", synthetic, modalities),
        [head_cell("Ratio"), *cells_with_modalities(reach(downstream, "cas_ratio"), modalities)],
    ]
    head = ["Trained on", "All", *map(name_of, modalities)]
    # `note`: what a reader has to know first, such as that it was measured of another model than the rest.
    note, reading = downstream.get("note", ""), WORDS["downstream"]["reading"]
    parts = [make_table("Trained on one set", head, rows, reading, text=note)]
    low_data = downstream.get("low_data") or {}
    if "left_out" in low_data:
        parts.append(left_out_part(low_data["left_out"], "Few real images"))
    else:
        for index, (name, setting) in enumerate(low_data.items()):
            parts += _low_data(name.replace("_", " "), setting, f"downstream-{index}")
    if downstream.get("settings"):
        parts.append(make_facts(downstream["settings"].items(), "Settings of the training", folded=True))
    return parts


def _low_data(name: str, setting: Mapping, plot: str) -> list[dict]:
    title = f"Few real images: {name}"
    if "left_out" in setting:
        return [left_out_part(setting["left_out"], title)]
    points = setting.get("points", [])
    modalities = keys_of(*(reach(point, "modalities") for point in (setting["real"], *points)))
    rows = [training_row("Real alone", setting["real"], modalities)]
    for point in points:
        rows.append(training_row(f"+ {plain(point['percent'])} %", point, modalities))
        gain = figure_cell(reach(point, "gain"), "points")
        if not gain.why:
            rows[-1][1].details.append(f"gain {gain.text} {gain.interval}".strip())
    whole = reach(setting, "gain")
    name_of_gain = f"Gain at {plain(setting['gain_at'])} %" if "gain_at" in setting else "Gain"
    rows.append([head_cell(name_of_gain), *cells_with_modalities(whole, modalities, "points")])
    head = ["Synthetic images added", "All", *map(name_of, modalities)]
    text = " ".join(filter(None, [setting.get("meaning", ""), _verdict(whole)]))
    parts = [make_table(title, head, rows, WORDS["downstream"]["low_data"], text=text)]
    if "left_out" not in setting["real"] and any("accuracy" in point for point in points):
        drawn = plot_part(downstream_curve(setting, plot), name)
        parts.append({"kind": "plots", "title": "", "plots": [drawn], "reading": ""})
    return parts


def _verdict(gain: Mapping) -> str:
    """What a gain means, in a sentence; nothing where there is none."""
    if not isinstance(gain.get("value"), int | float) or not gain.get("interval"):
        return ""
    if gain["interval"][0] <= 0:
        return WORDS["downstream"]["no_gain"]
    size = "at least" if gain["value"] >= WORTHWHILE_GAIN else "less than"
    return WORDS["downstream"]["gain"].format(size, 100 * WORTHWHILE_GAIN)


def _memorisation(report: Mapping, neighbours: Mapping, curves: Mapping) -> list[dict]:
    whole, words = reach(report, "memorisation"), WORDS["memorisation"]
    found = {name: reach(part, "memorisation") for name, part in report["modalities"].items()}
    spaces = keys_of(*found.values(), whole)
    # Where all is left out for one reason, one sentence says it.
    reasons = {part.get("left_out") for part in (whole, *found.values())}
    parts = [] if spaces else [left_out_part(reason) for reason in sorted(filter(None, reasons))]
    for space in spaces:
        rows = []
        for name, part in found.items():
            measured = reach(part, space)
            distances = (("median", ()), ("median_val", ("n_val",)), ("limit", ()))
            cells = [figure_cell(value_of(measured, key, extra)) for key, extra in distances]
            rows.append([head_cell(name_of(name)), share_cell(measured), *cells])
        rows.append([head_cell("All"), share_cell(reach(whole, space)), Cell(""), Cell(""), Cell("")])
        head = ["Modality", "Copies", "Median, synthetic", "Median, val", "Limit"]
        reading = AS_ABOVE if parts else words["reading"]
        parts.append(make_table(f"Distance in {SPACES.get(space, space)}", head, rows, reading))

    plots = [
        plot_part(distance_curves(curve, f"distances-{index}"), name_of(name))
        for index, (name, curve) in enumerate(curves.items())
    ]
    if plots:
        parts.append({"kind": "plots", "title": "Distances", "plots": plots, "reading": words["distances"]})
    parts += [_neighbours(name, pairs) for name, pairs in neighbours.items() if pairs]
    parts += filter(None, (_pair_table(found, space) for space in spaces))
    return parts


def _neighbours(name: str, pairs: Sequence[Mapping]) -> dict:
    """Synthetic images of a modality beside the training images nearest to them."""
    shown = [
        {
            "synthetic": thumbnail(pair["synthetic"]),
            "train": None if pair["train"] is None else thumbnail(pair["train"]),
            "names": pair["names"],
            "distance": written(pair["distance"]),
            "copied": pair["copy"],
        }
        for pair in pairs
    ]
    title = f"Nearest training images: {name_of(name)}"
    return {"kind": "pairs", "title": title, "pairs": shown, "reading": WORDS["memorisation"]["neighbours"]}


def _pair_table(found: Mapping[str, Mapping], space: str) -> dict | None:
    """The nearest pairs of all modalities by name, in one space; None where there are none."""
    rows = []
    for name, part in found.items():
        measured = reach(part, space)
        copied, nearest = (
            {(pair["synthetic"], pair["train"]): pair["distance"] for pair in measured.get(key, [])}
            for key in ("copied", "nearest")
        )
        for pair, distance in sorted((copied | nearest).items(), key=lambda item: item[1]):
            rows.append([head_cell(name_of(name)), *map(Cell, (*pair, written(distance), "yes" * (pair in copied)))])
    head = ["Modality", "Synthetic", "Training image", "Distance", "Copy"]
    title, reading = f"Nearest pairs in {SPACES.get(space, space)}", WORDS["memorisation"]["pairs"]
    return make_table(title, head, rows, reading, folded=True) if rows else None


def _extraction(extraction: Mapping) -> list[dict]:
    words = WORDS["extraction"]
    spaces = [key for key, part in extraction.items() if isinstance(part, Mapping)]
    rows = [[head_cell(SPACES.get(space, space).capitalize()), share_cell(extraction[space])] for space in spaces]
    parts = [make_table("Copies of training images", ["Distance in", "Copies"], rows, words["reading"])]
    prompts = extraction.get("prompts")
    if prompts:
        head = ["Modality", "Caption", "Training images", "Images made", "Copies", "Nearest distance"]
        rows = [
            [
                head_cell(name_of(prompt["modality"])),
                Cell(prompt["text"], wide=True),
                *(Cell(plain(prompt.get(key))) for key in ("train_images", "images", "copies", "distance")),
            ]
            for prompt in prompts
        ]
        parts.append(make_table("Each caption", head, rows, words["prompts"], folded=True))
    return parts


def _sheet(name: str, items: Sequence[Mapping]) -> dict:
    images = [
        {
            "image": thumbnail(item["image"]),
            "caption": item["caption"],
            "lines": [line for line in item.get("lines", []) if line],
            "copied": item.get("copy", False),
        }
        for item in items
    ]
    return {"kind": "sheet", "title": name_of(name), "images": images}


def _conditions(report: Mapping) -> list[dict]:
    made = reach(report, "made")
    facts = [(words, plain(made[key])) for key, words in (("minim", "minim"), ("device", "Device")) if key in made]
    if "minutes" in made:
        facts.append(("Time", f"{plain(made['minutes'])} minutes"))
    parts = [make_facts([*facts, *(made.get("versions") or {}).items()])]
    settings = report["sets"]["synthetic"].get("settings")
    if settings:
        parts.append(make_facts(settings.items(), "Settings of the synthetic images", folded=True))
    return parts
