"""`minim evaluate`: reads the sets, measures, and writes report.json and report.html.

torch and transformers are imported when everything that can be checked without them has been.
"""

import platform
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .. import __version__
from ..data.image_pixels import Found, told
from ..data.image_reader import Reading, tell
from ..data.looks import file_keys
from ..data.sources import read_columns, resolve_paths
from ..data.splits import read_split
from ..data.table import AS_USUAL
from ..files import atomic_path, write_report
from ..loading import register_modalities
from .options import EvaluateOptions, ExtractorOptions
from .page_parts import reach, value_of


def run(options: EvaluateOptions) -> dict:
    """Evaluates as `options` say and writes the report.

    Returns:
        The report, as `report.json` holds it.

    Raises:
        ValueError: CSV files with bad rows, no modality in common, an image on both sides.
        OSError: a model, a file or a folder is not there.
    """
    start = time.monotonic()
    missing = [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]
    if missing:
        raise ValueError(f"the page needs {' and '.join(missing)}: pip install 'minim-pipeline[evaluate]'.")
    files, rows, readings = read_rows(options)
    from accelerate import PartialState

    from ..data.image_loading import check_values
    from ..data.mapped_images import IMAGES
    from .classifier import check_architecture
    from .curve import draw_curve, has_filter
    from .drawing import batch_size, draw_synthetic, run_downstream
    from .judges import load_judges
    from .realism import RealismSettings, load_autoencoder

    # Real images are scaled alike, whichever file names them; the synthetic ones have their own range.
    found = check_values([(rows[name], files[name]) for name in ("real", "train") if name in rows], options.reading)
    if "synthetic" in rows:
        check_values([(rows["synthetic"], files["synthetic"])], readings["synthetic"])

    if options.pipeline and max(options.curve_candidates) > 1 and not has_filter(options.pipeline):
        asked = " ".join(map(str, options.curve_candidates))
        raise ValueError(f"--curve-candidates {asked}: {options.pipeline} has no filter to choose with.")
    # Whatever may be wrong with them shows before images are drawn, which takes long.
    # The main process measures alone, which may take longer than the others wait by default.
    state = PartialState(cpu=options.device == "cpu", timeout=timedelta(days=1))
    judges = load_judges(options.judges, state.device) if options.judges else None
    extractors = load_extractors(options, state.device, judges)
    if options.downstream:
        check_architecture(options.classifier_architecture)
    autoencoder = load_autoencoder(options, state.device)
    settings = RealismSettings(extractors, autoencoder, options.c2st_steps, batch_size(options), state.device)
    points = []
    if options.pipeline:
        files["synthetic"], rows["synthetic"] = draw_synthetic(options, options.pipeline, rows["real"])
        points = draw_curve(options, options.pipeline, rows["real"])
    with scratch(options.output_dir / IMAGES, state) as folder:
        load = partial(load_set, folder, options.resolution)
        real, synthetic, train = (
            load(name, rows[name], files[name], readings[name], found if name != "synthetic" else None)
            if name in rows
            else None
            for name in ("real", "synthetic", "train")
        )
        report: dict[str, Any] = {"made": None, "sets": describe(options, real, synthetic, train), "conversions": []}
        for name, images in (("real", real), ("synthetic", synthetic), ("train", train)):
            report["conversions"] += conversions(name, images, extractors[0].encoder) if images else []
        report["extractors"] = [{"name": extractor.name, "digest": extractor.digest} for extractor in extractors]
        if state.is_main_process:  # the others go ahead to the classifiers
            measured, shown = measure(options, (real, synthetic, train), settings, judges, points, load)
            report |= measured
            report["made"] = made(state.device, time.monotonic() - start)
            # Already now: training classifiers takes long, and may fail.
            write(report, *shown, options.output_dir)
        if options.downstream and options.train:
            report["downstream"] = run_downstream(options, options.train, state, (real, synthetic, train))
            if state.is_main_process:
                report["made"] = made(state.device, time.monotonic() - start)
                write(report, *shown, options.output_dir)
        state.wait_for_everyone()
    return report


def read_rows(options: EvaluateOptions) -> tuple[dict[str, Path], dict[str, list[dict]], dict[str, Reading]]:
    """By the name of a set, real, train or synthetic: its table, if there is one, its rows, and how they are read."""
    # Before any row is read: it may be of a modality that only a model knows.
    for model in filter(None, (options.pipeline, options.low_data_pipeline, options.modalities_from)):
        register_modalities(model)
    # The synthetic images may be of more modalities than the real ones, if their CSV says so.
    named = options.synthetic is None or "modality" in read_columns(options.synthetic)
    own = replace(options.reading, modality=None if named else options.modality, image_root=None, columns=AS_USUAL)
    readings = {"real": options.reading, "train": options.reading, "synthetic": own}
    given = {"real": options.real, "train": options.train, "synthetic": options.synthetic}
    files = {name: path for name, path in given.items() if path}
    splits, rows = {"real": options.real_split, "train": options.train_split}, {}
    for name, path in files.items():
        where = {option: getattr(readings[name], option) for option in ("image_root", "modality", "columns")}
        rows[name] = read_split(path, splits.get(name), skip_bad_rows=options.skip_bad_rows, **where)
    if "train" in files:
        check_overlap(rows["real"], files["real"], rows["train"], files["train"])
    return files, rows, readings


def load_extractors(options: ExtractorOptions, device, judges=None) -> list:
    """The image-text encoder, and the others whose features are measured in; raises ValueError for two of one name."""
    from .extractors import judge_extractors, load_extractor

    extractors = [load_extractor(options.encoder, device)]
    for model in options.extractor:
        extractors += judge_extractors(judges) if model == "judges" else [load_extractor(model, device)]
    if extractors[0].encoder is None:
        raise ValueError(f"--encoder has to be an image-text encoder of train_encoder.py, got {options.encoder}.")
    names = [extractor.name for extractor in extractors]
    if len(set(names)) < len(names):
        raise ValueError(f"every extractor needs a name of its own, got {', '.join(names)}: rename a folder.")
    return extractors


def conversions(name: str, images, encoder) -> list[str]:
    """What was changed of a set's images when they were read, and which of its captions the encoder cuts, in words."""
    found = told(images.changes.items(), len(images.rows), f"{name} images")
    cut = encoder.cut(images.rows)
    if cut:
        loses = f"longer than the encoder reads, such as {cut[0][0]!r}, which loses {cut[0][1]!r}"
        found.append(f"{len(cut)} of {len(images.rows)} {name} captions: {loses}")
    return found


@contextmanager
def scratch(folder: Path, state) -> Iterator[Path]:
    """A folder of all processes for what is as large as the sets; it is removed at the end."""
    if state.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    state.wait_for_everyone()
    try:
        yield folder
    finally:
        if state.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)


def load_set(
    folder: Path,
    resolution: int,
    name: str,
    rows: list[dict],
    path: Path,
    reading: Reading,
    found: dict[str, Found] | None = None,
    alone: bool = False,
):
    """The `ImageSet` of rows of a CSV, its images in files of that name in a folder; how they were changed is said."""
    from ..data.mapped_images import map_images
    from .report import ImageSet

    changes: Counter[str] = Counter()
    images = map_images(
        folder / name, rows, path, resolution, changes=changes, reading=reading, found=found, alone=alone
    )
    tell(changes, len(rows), path, reading)
    return ImageSet(rows, images, changes)


def measure(
    options: EvaluateOptions, sets: tuple, settings, judges, points: list, load: Callable
) -> tuple[dict, tuple[dict, dict]]:
    """All that the main process finds of the real, synthetic and train images, and of the curve's points; pictures.

    `load` is `load_set`, given where images lie and their size.
    """
    from tqdm.auto import tqdm

    from .curve import measure_point
    from .drawing import batch_size, load_for_drawing
    from .extraction import extract_training_images
    from .pictures import collect
    from .realism import realism
    from .report import evaluate

    real, synthetic, train = sets
    extractors, encoder = settings.extractors, settings.extractors[0].encoder
    report, copies, readings, features = evaluate(
        real, synthetic, train, encoder, extractors, judges, options.label_column
    )
    known = {"real": real, "synthetic": synthetic} | ({"train": train} if train else {})
    for modality, part in tqdm(report["modalities"].items(), "telling apart"):
        part["realism"] = realism(known, modality, features, settings)
    del known["synthetic"]
    curve = []
    for point in tqdm(points, "curve", disable=not points):
        images = load("curve", point.rows, point.path, options.reading_elsewhere(), alone=True)
        curve.append(measure_point(point, images, features, known, extractors, judges, report["labels"]))
    if curve:
        report["curve"] = {"real": value_of(reach(report, "judges", "real"), "balanced_accuracy"), "points": curve}
    if options.extraction_captions and options.pipeline:
        drawn = options.extraction_captions, options.extraction_images, batch_size(options)
        drawing: Any = options.values("num_inference_steps", "guidance_scale")
        pipe = load_for_drawing(options, options.pipeline)
        report["extraction"] = extract_training_images(pipe, train, encoder, copies, *drawn, **drawing)
    return report, collect(synthetic, train, copies, readings, options.sheet_images, 6, options.no_real_images)


def check_overlap(real_rows: list[dict], real: Path, train_rows: list[dict], train: Path) -> None:
    """Raises ValueError if an image is on both sides, also under another name: all would be called new beside it."""
    paths = resolve_paths(train_rows, train) + resolve_paths(real_rows, real)
    keys = file_keys(paths)
    trained = set(keys[: len(train_rows)])
    both = [row["path"] for row, key in zip(real_rows, keys[len(train_rows) :], strict=True) if key in trained]
    if both:
        raise ValueError(
            f"{len(both)} images are in --real and in --train, such as {both[0]}: real images have to be ones that "
            "the model never saw (--real-split and --train-split choose rows)."
        )


def made(device, seconds: float) -> dict:
    """By what the report was made, and how long it took."""
    import torch

    packages = ("torch", "diffusers", "transformers", "torchmetrics")
    found = {name: version(name) for name in packages if find_spec(name) is not None}
    return {
        "minim": __version__,
        "versions": {"python": platform.python_version(), **found},
        "device": torch.cuda.get_device_name(0) if device.type == "cuda" else "cpu",
        "minutes": round(seconds / 60, 2),
    }


def write(report: dict, pictures: dict, curves: dict, folder: Path) -> None:
    """Writes `report.json` and `report.html`; the page is made before anything is written."""
    from .page import render

    page = render(report, pictures, curves)
    folder.mkdir(parents=True, exist_ok=True)
    write_report(folder / "report.json", report)
    with atomic_path(folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")


def describe(options: EvaluateOptions, real, synthetic, train) -> dict:
    """What was compared, without saying where it lies."""
    sets = {"real": {"file": options.real.name, "split": options.real_split, "n": len(real.rows)}, "train": None}
    if train and options.train:
        sets["train"] = {"file": options.train.name, "split": options.train_split, "n": len(train.rows)}
    made = {"file": options.synthetic.name if options.synthetic else "synthetic/data.csv", "n": len(synthetic.rows)}
    settings = {}
    for name in ("model", "revision", "steps", "guidance", "scheduler", "negative_prompt", "lora"):
        values = sorted({row[name] for row in synthetic.rows if row.get(name)})
        if values:
            settings[name] = ", ".join(values)
    if options.no_filter:
        settings["filter"] = "off"
    made |= {"model": settings.pop("model", None), "revision": settings.pop("revision", None), "settings": settings}
    return sets | {"synthetic": made}
