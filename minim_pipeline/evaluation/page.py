"""The evaluation's report as one HTML page that stands alone: pictures and plots are in it, nothing is requested.

`render` turns the report into sections of tables, plots and pictures, in plain dicts; `report.html.jinja` only lays
them out, with everything escaped. Needs jinja2, and matplotlib where there are curves to draw.

Whatever lacks a figure says why: a dict with `left_out` in place of a figure, or of a whole part of the report,
becomes a dash with a footnote; what is not in the report at all is "not computed".
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from .page_parts import (
    DASH,
    accuracy_of,
    cells_with_modalities,
    figure_cell,
    head_cell,
    keys_of,
    left_out_part,
    make_facts,
    make_table,
    modality_cell,
    name_of,
    plain,
    plot_part,
    reach,
    set_words,
    share_cell,
    text_cell,
    thumbnail,
    titled,
    training_row,
    value_of,
    written,
)
from .plots import distance_curves, downstream_curve


SPACES = {"encoder": "the encoder's features", "pixels": "pixels"}
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
    sections = [
        _overview(report),
        _fidelity(report),
        _diversity(report),
        _retrieval(report),
        _judges(report),
        _downstream(report),
        _memorisation(report, pictures.get("neighbours") or {}, curves),
        _extraction(report),
        _sheets(pictures.get("sheets") or {}),
        _conditions(report),
    ]
    return environment.get_template("report.html.jinja").render(
        sections=[section for section in sections if section], version=reach(report, "made").get("minim", "")
    )


# Sections: each gives {"id", "title", "parts"}, or None where the report has nothing of it. No key is called as a
# method of dict is, such as `copy`: the template would find the method.


def _overview(report: Mapping) -> dict:
    sets = report["sets"]
    facts = [
        ("Real images", set_words(sets["real"])),
        ("Synthetic images", set_words(sets["synthetic"])),
        ("Training images", set_words(sets["train"]) if sets.get("train") else "none given"),
    ]
    synthetic = sets["synthetic"]
    if synthetic.get("model"):
        revision = f", revision {synthetic['revision']}" if synthetic.get("revision") else ""
        facts.append(("Model", f"{synthetic['model']}{revision}"))
    labels = reach(report, "labels")
    facts.append(("Labels", f"none: {labels['left_out']}" if "left_out" in labels else f"column {labels['column']}"))
    for extractor in report.get("extractors", []):
        known = [f"{plain(extractor['dimensions'])} dimensions"] if extractor.get("dimensions") else []
        known += [f"digest {extractor['digest']}"] if extractor.get("digest") else []
        facts.append((f"Features of {extractor['name']}", ", ".join(known) or DASH))
    for modality, reason in (report.get("modalities_left_out") or {}).items():
        facts.append((f"{name_of(modality)} left out", reason))

    names = [extractor["name"] for extractor in report.get("extractors", [])][:1]
    # What is missing here is said where the section itself would be, or has its reason there.
    judges = [("Found by the judges", "judges", "synthetic"), ("Same of real images", "judges", "real")]
    judges = judges if report.get("judges") else []
    head = ["Modality", *("Fréchet distance", "Fréchet floor", "Coverage") * bool(names)]
    head += [*(title for title, *_ in judges), "Copies, by features", "Copies, by pixels"]
    rows = []
    for modality in report["modalities"]:
        row = [
            figure_cell(reach(report, "modalities", modality, "fidelity", name, key))
            for name in names
            for key in ("frechet_distance", "frechet_floor", "coverage")
        ]
        row += [
            figure_cell(accuracy_of(reach(report, *keys, "modalities", modality), "balanced_accuracy"), "percent")
            for _, *keys in judges
        ]
        row += [share_cell(reach(report, "modalities", modality, "memorisation", space)) for space in SPACES]
        rows.append([head_cell(name_of(modality)), *row])
    reading = "The main figures; each is explained, with the rest, in its own section below."
    if names:
        reading += f" Fréchet distance and coverage in the features of {names[0]}."
    parts = [make_facts(facts), make_table("Main figures", head, rows, reading)]

    conversions = report.get("conversions") or []
    if conversions:
        parts.insert(1, {"kind": "list", "title": "Changed before measuring", "lines": conversions})
    return {"id": "overview", "title": "Overview", "parts": parts}


def _rows(report: Mapping, place: list[str], columns: Mapping, style: str = "number") -> list[list[dict]]:
    """A row for each modality, of the figures of `columns` that lie at `place` in its part of the report."""
    return [
        [
            modality_cell(report, name),
            *(figure_cell(reach(report, "modalities", name, *place, key), style) for key in columns),
        ]
        for name in report["modalities"]
    ]


def _fidelity(report: Mapping) -> dict:
    columns = {
        "frechet_distance": "Fréchet distance",
        "frechet_floor": "Fréchet floor",
        "kernel_distance": "Kernel distance",
        "kernel_floor": "Kernel floor",
        "precision": "Precision",
        "recall": "Recall",
        "density": "Density",
        "coverage": "Coverage",
    }
    reading = (
        "Fréchet distance: lower is nearer. It depends on n, so compare it only with the floor beside it, which is "
        "real against real at equal n. Kernel distance (KID): near 0 where both sets are alike, and at times below. "
        "Precision: share of synthetic images within the neighbourhood of a real one. Recall: share of real images "
        "within that of a synthetic one. Density: near 1 where both sets are alike. Coverage: share of real images "
        "with a synthetic one in their neighbourhood. Figures of different extractors cannot be compared."
    )
    names = [extractor["name"] for extractor in report.get("extractors", [])]
    for modality in report["modalities"]:
        names += [name for name in reach(report, "modalities", modality, "fidelity") if name != "left_out"]
    parts = []
    for name in dict.fromkeys(names):
        rows = _rows(report, ["fidelity", name], columns)
        parts.append(make_table(f"Features of {name}", ["Modality", *columns.values()], rows, reading))
        reading = "Read as the table above."
    parts = parts or [left_out_part("no extractor was used")]
    return {"id": "fidelity", "title": "Fidelity: how near synthetic images are to real ones", "parts": parts}


def _diversity(report: Mapping) -> dict:
    columns = {
        "ms_ssim": "MS-SSIM",
        "ms_ssim_real": "MS-SSIM of real images",
        "inception_score": "Inception score",
        "inception_score_real": "Inception score of real images",
    }
    reading = (
        "MS-SSIM: how alike pairs of images are, lower is more varied and 1 is one image repeated. Inception score: "
        "higher where a classifier is certain of each image and gives many different answers; 1 is the least. "
        "Beside both, the same of real images, which is where a good set comes to lie."
    )
    rows = _rows(report, ["diversity"], columns)
    return {
        "id": "diversity",
        "title": "Diversity: how synthetic images differ among themselves",
        "parts": [make_table("Diversity", ["Modality", *columns.values()], rows, reading)],
    }


def _retrieval(report: Mapping) -> dict:
    columns = {
        "image_image": "Image to image",
        "image_image_real": "Image to image, real",
        "image_text": "Image to text",
        "image_text_real": "Image to text, real",
    }
    reading = (
        "Image to image: share of images that find a real one of their own label among the nearest. Image to text: "
        "share that find their own caption among the nearest. Higher is better; compare with chance and with real "
        "images, which are under and beside each rate. It is easier in a smaller pool. Where labels are few, "
        "chance is high: precision, the share of the nearest that match, then tells more."
    )
    rows = _rows(report, ["retrieval"], columns, "percent")
    return {
        "id": "retrieval",
        "title": "Retrieval: whether images match their label and caption",
        "parts": [make_table("Retrieval", ["Modality", *columns.values()], rows, reading)],
    }


def _judges(report: Mapping) -> dict | None:
    if not report.get("judges"):
        return None
    judges, title = report["judges"], "Judges: whether classifiers find what was asked for"
    if "left_out" in judges:
        return {"id": "judges", "title": title, "parts": [left_out_part(judges["left_out"])]}

    columns = {
        "balanced_accuracy": "Finding",
        "balanced_accuracy_merged": "Finding, look-alikes as one",
        "modality_accuracy": "Modality",
    }
    head = ["Modality", *(f"{words}, {side}" for words in columns.values() for side in ("synthetic", "real"))]
    sides = ("synthetic", "real")

    def row(name: str, *keys: str) -> list[dict]:
        found = [
            accuracy_of(reach(judges, side, *keys), key, ("chance", "n") if key == "balanced_accuracy" else ())
            for key in columns
            for side in sides
        ]
        return [head_cell(name), *(figure_cell(figure, "percent") for figure in found)]

    modalities = keys_of(*(reach(judges, side, "modalities") for side in sides))
    rows = [row(name_of(modality), "modalities", modality) for modality in modalities] + [row("All")]
    reading = (
        "Balanced accuracy of the asked-for finding within its modality, and share of images taken for their own "
        "modality. Real images, beside, show how good the judges themselves are: a synthetic set can hardly pass "
        "them without showing findings plainer than they are. Chance is what guessing would give."
    )
    names = ", ".join(judges.get("names") or judges.get("each") or [])
    parts = [make_table(f"Mean of the judges{f' ({names})' if names else ''}", head, rows, reading)]

    if judges.get("each"):
        rows = [
            [
                head_cell(name),
                *(
                    figure_cell(accuracy_of(reach(judges, "each", name, side), key), "percent")
                    for key in columns
                    for side in sides
                ),
            ]
            for name in judges["each"]
        ]
        reading = "All modalities together. Judges that differ much make their mean less certain."
        parts.append(make_table("Each judge", ["Judge", *head[1:]], rows, reading, folded=True))

    rows, within = [], []
    for modality in modalities:
        found = [reach(judges, side, "modalities", modality, "findings") for side in sides]
        for finding in keys_of(*found):
            cells = [figure_cell(accuracy_of(reach(part, finding), "accuracy", ("n",)), "percent") for part in found]
            rows.append([head_cell(name_of(modality)), text_cell(finding), *cells])
        found = [reach(judges, side, "modalities", modality, "within_source") for side in sides]
        for source in keys_of(*found):
            figures = [accuracy_of(reach(part, source), "balanced_accuracy", ("chance", "n")) for part in found]
            cells = [figure_cell(figure, "percent") for figure in figures]
            within.append([head_cell(name_of(modality)), text_cell(source), *cells])
    if rows:
        reading = "Share of the images asked to show a finding in which the judges find it. A small n says little."
        parts.append(make_table("Each finding", ["Modality", "Finding", *titled(sides)], rows, reading, folded=True))
    if within:
        reading = "Balanced accuracy among the findings of one source, where telling sources apart does not help."
        parts.append(
            make_table("Within each source", ["Modality", "Source", *titled(sides)], within, reading, folded=True)
        )
    return {"id": "judges", "title": title, "parts": parts}


def _downstream(report: Mapping) -> dict | None:
    if not report.get("downstream"):
        return None
    downstream, title = report["downstream"], "Downstream: what a classifier learns from synthetic images"
    if "left_out" in downstream:
        return {"id": "downstream", "title": title, "parts": [left_out_part(downstream["left_out"])]}

    real, synthetic = reach(downstream, "real"), reach(downstream, "synthetic")
    modalities = keys_of(reach(real, "modalities"), reach(synthetic, "modalities"))

    rows = [
        training_row("Real alone", real, modalities),
        training_row("Synthetic alone", synthetic, modalities),
        [head_cell("Ratio"), *cells_with_modalities(reach(downstream, "cas_ratio"), modalities)],
    ]
    head = ["Trained on", "All", *map(name_of, modalities)]
    reading = (
        "Accuracy on unseen real images of a classifier trained on each set. The ratio is synthetic over real: 1 "
        "where synthetic images teach as much as the real ones do."
    )
    # `note`: what a reader has to know first, such as that it was measured of another model than the rest.
    parts = [make_table("Trained on one set", head, rows, reading, text=downstream.get("note", ""))]

    low_data = downstream.get("low_data") or {}
    if "left_out" in low_data:
        parts.append(left_out_part(low_data["left_out"], "Few real images"))
        low_data = {}
    for index, (name, setting) in enumerate(low_data.items()):
        words = name.replace("_", " ")
        setting_title = f"Few real images: {words}"
        if "left_out" in setting:
            parts.append(left_out_part(setting["left_out"], setting_title))
            continue
        points = setting.get("points", [])
        modalities = keys_of(*(reach(point, "modalities") for point in (setting["real"], *points)))
        rows = [training_row("Real alone", setting["real"], modalities)]
        for point in points:
            rows.append(training_row(f"+ {plain(point['percent'])} %", point, modalities))
            gain = figure_cell(reach(point, "gain"), "points")
            if not gain["why"]:
                rows[-1][1]["details"].append(f"gain {gain['text']} {gain['interval']}".strip())
        whole = reach(setting, "gain")
        name_of_gain = f"Gain at {plain(setting['gain_at'])} %" if "gain_at" in setting else "Gain"
        rows.append([head_cell(name_of_gain), *cells_with_modalities(whole, modalities, "points")])
        head = ["Synthetic images added", "All", *map(name_of, modalities)]
        reading = "Accuracy on unseen real images. The gain is over real alone, in points; it counts if its interval, "
        reading += "in brackets, leaves out 0."
        text = " ".join(filter(None, [setting.get("meaning", ""), _verdict(whole)]))
        parts.append(make_table(setting_title, head, rows, reading, text=text))
        if "left_out" not in setting["real"] and any("accuracy" in point for point in points):
            drawn = downstream_curve(setting, f"downstream-{index}")
            parts.append({"kind": "plots", "title": "", "plots": [plot_part(drawn, words)], "reading": ""})
    if downstream.get("settings"):
        parts.append(make_facts(downstream["settings"].items(), "Settings of the training", folded=True))
    return {"id": "downstream", "title": title, "parts": parts}


def _verdict(gain: Mapping) -> str:
    """What a gain means, in a sentence; nothing where there is none."""
    if not isinstance(gain.get("value"), int | float) or not gain.get("interval"):
        return ""
    if gain["interval"][0] <= 0:
        return "The synthetic images are not shown to help: the interval of the gain is not above 0."
    size = "at least" if gain["value"] >= WORTHWHILE_GAIN else "less than"
    return f"The synthetic images help, by {size} the {100 * WORTHWHILE_GAIN:g} points that were aimed at."


def _memorisation(report: Mapping, neighbours: Mapping, curves: Mapping) -> dict:
    whole, modalities = reach(report, "memorisation"), report["modalities"]
    found = {name: reach(report, "modalities", name, "memorisation") for name in modalities}
    spaces = keys_of(*found.values(), whole)
    head = ["Modality", "Copies", "Median, synthetic", "Median, val", "Limit"]
    reading = (
        "An image is called a copy if it lies nearer to some training image than all but the nearest 1 % of val "
        "images do. So 1 % are expected by chance, and more where val images are few (4 % with 30 of them); far more "
        "mean that training images are repeated. A median distance of synthetic images well below that of val images "
        "is a sign of the same."
    )
    # Where all is left out for one reason, one sentence says it.
    reasons = {part.get("left_out") for part in (whole, *found.values())}
    parts = [] if spaces else [left_out_part(reason) for reason in sorted(filter(None, reasons))]
    for space in spaces:
        rows = []
        for name, part in found.items():
            measured = reach(part, space)
            distances = [
                figure_cell(value_of(measured, "median")),
                figure_cell(value_of(measured, "median_val", ("n_val",))),
                figure_cell(value_of(measured, "limit")),
            ]
            rows.append([head_cell(name_of(name)), share_cell(measured), *distances])
        rows.append([head_cell("All"), share_cell(reach(whole, space)), *(text_cell("") for _ in head[2:])])
        parts.append(make_table(f"Distance in {SPACES.get(space, space)}", head, rows, reading))
        reading = "Read as the table above."

    plots = [
        plot_part(distance_curves(curve, f"distances-{index}"), name_of(name))
        for index, (name, curve) in enumerate(curves.items())
    ]
    if plots:
        reading = (
            "Share of images whose nearest training image is no farther than the distance below. Left of the limit "
            "lie the copies. A synthetic curve left of that of val means nearer to the training images than unseen "
            "images are."
        )
        parts.append({"kind": "plots", "title": "Distances", "plots": plots, "reading": reading})

    parts += [_neighbour_part(name, pairs) for name, pairs in neighbours.items() if pairs]
    parts += filter(None, (_pair_table(found, space) for space in spaces))
    title = "Memorisation: whether training images are repeated"
    return {"id": "memorisation", "title": title, "parts": parts}


def _neighbour_part(name: str, pairs: Sequence[Mapping]) -> dict:
    """Synthetic images of a modality beside the training images nearest to them."""
    return {
        "kind": "pairs",
        "title": f"Nearest training images: {name_of(name)}",
        "pairs": [
            {
                "synthetic": thumbnail(pair["synthetic"]),
                "train": None if pair["train"] is None else thumbnail(pair["train"]),
                "names": pair["names"],
                "distance": written(pair["distance"]),
                "copied": pair["copy"],
            }
            for pair in pairs
        ],
        "reading": "Left the synthetic image, right the training image nearest to it by the encoder.",
    }


def _pair_table(found: Mapping[str, Mapping], space: str) -> dict | None:
    """The nearest pairs of all modalities by name, in one space; None where there are none."""
    rows = []
    for name, part in found.items():
        measured = reach(part, space)
        copied = {(pair["synthetic"], pair["train"]): pair["distance"] for pair in measured.get("copied", [])}
        nearest = {(pair["synthetic"], pair["train"]): pair["distance"] for pair in measured.get("nearest", [])}
        for pair, distance in sorted((copied | nearest).items(), key=lambda item: item[1]):
            cells = [*pair, written(distance), "yes" * (pair in copied)]
            rows.append([head_cell(name_of(name)), *map(text_cell, cells)])
    head = ["Modality", "Synthetic", "Training image", "Distance", "Copy"]
    title, reading = f"Nearest pairs in {SPACES.get(space, space)}", "All copies, and the nearest of the rest."
    return make_table(title, head, rows, reading, folded=True) if rows else None


def _extraction(report: Mapping) -> dict | None:
    if not report.get("extraction"):
        return None
    extraction, title = report["extraction"], "Extraction: whether rare captions bring training images back"
    if "left_out" in extraction:
        return {"id": "extraction", "title": title, "parts": [left_out_part(extraction["left_out"])]}
    spaces = [key for key, part in extraction.items() if isinstance(part, Mapping)]
    rows = [[head_cell(SPACES.get(space, space).capitalize()), share_cell(extraction[space])] for space in spaces]
    reading = (
        "Several images are made of captions of few training images, which are remembered most easily. A copy is what "
        "it is under memorisation, by the encoder."
    )
    parts = [make_table("Copies of training images", ["Distance in", "Copies"], rows, reading)]
    prompts = extraction.get("prompts") or []
    if prompts:
        head = ["Modality", "Caption", "Training images", "Images made", "Copies", "Nearest distance"]
        rows = [
            [
                head_cell(name_of(prompt["modality"])),
                text_cell(prompt["text"], wide=True),
                *(text_cell(plain(prompt.get(key))) for key in ("train_images", "images", "copies")),
                text_cell(plain(prompt.get("distance"))),
            ]
            for prompt in prompts
        ]
        parts.append(make_table("Each caption", head, rows, "Distance: smaller is nearer to a copy.", folded=True))
    return {"id": "extraction", "title": title, "parts": parts}


def _sheets(sheets: Mapping) -> dict | None:
    parts = [
        {
            "kind": "sheet",
            "title": name_of(name),
            "images": [
                {
                    "image": thumbnail(item["image"]),
                    "caption": item["caption"],
                    "lines": [line for line in item.get("lines", []) if line],
                    "copied": item.get("copy", False),
                }
                for item in items
            ],
        }
        for name, items in sheets.items()
        if items
    ]
    return {"id": "images", "title": "Synthetic images", "parts": parts} if parts else None


def _conditions(report: Mapping) -> dict:
    made = reach(report, "made")
    facts = [(words, plain(made[key])) for key, words in (("minim", "minim"), ("device", "Device")) if key in made]
    if "minutes" in made:
        facts.append(("Time", f"{plain(made['minutes'])} minutes"))
    facts += [(name, plain(version)) for name, version in (made.get("versions") or {}).items()]
    parts = [make_facts(facts)]
    settings = report["sets"]["synthetic"].get("settings")
    if settings:
        parts.append(make_facts(settings.items(), "Settings of the synthetic images", folded=True))
    return {"id": "made", "title": "How this report was made", "parts": parts}
