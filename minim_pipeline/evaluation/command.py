"""`minim evaluate`, and `train/evaluate.py`: reads the sets, measures, and writes report.json and report.html.

torch and transformers are imported when everything that can be checked without them has been.
"""

import argparse
import io
import json
import math
import os
import platform
import time
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from .. import EMBEDDED_ENCODER, __version__
from ..data.duplicates import file_keys
from ..data.image_pixels import Found, told
from ..data.image_reader import Reading, add_reading_arguments, reading_of, tell
from ..data.sources import image_name, name_digits, read_csv, resolve_path
from ..data.splits import read_split
from ..data.table import read_table
from ..files import atomic_path
from ..generate.command import read_model_index, register_modalities


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of an evaluation; spelled with hyphens or, as in diffusers' examples, with underscores."""

    def add(group, name: str, **options) -> None:
        spellings = dict.fromkeys([name, "--" + name[2:].replace("-", "_")])
        group.add_argument(*spellings, **options)

    sets = parser.add_argument_group("sets of images", "CSV files in MINIM's format: path,Text,modality[,finding,...]")
    add(sets, "--real", type=Path, required=True, metavar="CSV", help="real images that the generator has not seen")
    add(sets, "--real-split", help="take only its rows of this `split`")
    add(sets, "--synthetic", type=Path, metavar="CSV", help="the images to measure; or --pipeline")
    add(sets, "--pipeline", metavar="PATH_OR_HUB_ID", help="draw them from the captions of --real with this model")
    add(sets, "--train", type=Path, metavar="CSV", help="what the generator learned from; without: no audit of copies")
    add(sets, "--train-split", help="take only its rows of this `split`")
    add(sets, "--modality", help="of all rows, where a CSV has no such column")
    add(sets, "--image-root", type=Path, metavar="FOLDER", help="look for the images of --real and --train here: by "
        "their whole path, or what is left of it without its first folders")  # fmt: skip
    add(sets, "--label-column", default="finding", help="column of the finding (default: finding)")
    add(
        sets,
        "--modalities-from",
        metavar="PATH_OR_HUB_ID",
        help="know the modalities that this model has defined, too, as --pipeline's are",
    )
    add(sets, "--skip-bad-rows", action="store_true", help="leave bad rows out instead of stopping")
    add(sets, "--resolution", type=int, default=256, help="side in pixels to which all are brought (default 256)")
    add_reading_arguments(sets)
    look = parser.add_argument_group("what looks at them")
    add(look, "--encoder", default=str(EMBEDDED_ENCODER), metavar="FOLDER", help="image-text encoder (default: ours)")
    add(
        look,
        "--extractor",
        action="append",
        default=[],
        metavar="PATH_OR_HUB_ID",
        help="also measure distances through this vision model of transformers, or TorchScript Inception (.pt); "
        "may be given several times",
    )
    add(look, "--judges", metavar="FOLDER", help="classifiers of the finding, of train/train_classifier.py")
    out = parser.add_argument_group("output")
    add(out, "--output-dir", type=Path, required=True, metavar="FOLDER", help="for report.json and report.html")
    add(out, "--no-real-images", action="store_true", help="no picture of a real image in report.html")
    add(out, "--sheet-images", type=int, default=24, help="images of a modality in report.html (default 24)")
    draw = parser.add_argument_group("drawing, with --pipeline")
    add(draw, "--num-images", type=int, default=1, help="images of each caption of --real (default 1)")
    add(draw, "--seed", type=int, default=0, help="image i has seed + i (default 0)")
    add(draw, "--num-inference-steps", type=int, help="default: the model's own")
    add(draw, "--guidance-scale", type=float, help="default: the model's own")
    add(draw, "--no-filter", action="store_true", help="leave the model's filter out: the generator alone is measured")
    add(draw, "--batch-size", type=int, help="images drawn together (default 4 on a CPU, else 64)")
    add(draw, "--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="to draw in")
    add(draw, "--device", help="e.g. cpu, cuda (default: a GPU if there is one)")
    add(
        draw,
        "--compile",
        action="store_true",
        help="torch.compile the model, where --extraction-captions and --downstream draw",
    )
    add(draw, "--extraction-captions", type=int, default=0, help="try to draw training images out of the model by "
        "repeating the rarest captions of --train, so many a modality (default 0: no attempt)")  # fmt: skip
    add(draw, "--extraction-images", type=int, default=8, help="images of each of them (default 8)")
    use = parser.add_argument_group("worth as training data, for a GPU")
    add(use, "--downstream", action="store_true", help="train classifiers with the synthetic images")
    add(use, "--low-data-share", type=float, default=0.1, help="share of --train for low data (default 0.1)")
    add(use, "--low-data-pipeline", metavar="PATH", help="a model trained on OUTPUT/low_data.csv: honest low data")
    add(
        use,
        "--percents",
        type=int,
        nargs="+",
        default=[100, 200, 500, 1000, 2000],
        help="synthetic images, %% of the real ones",
    )
    add(use, "--classifier-seeds", type=int, default=3, help="classifiers of each kind (default 3)")
    add(use, "--classifier-steps", type=int, default=1500, help="steps of each (default 1500)")
    add(use, "--classifier-resolution", type=int, default=128, help="what they see, in pixels (default 128)")


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for what cannot be done, before anything is."""
    if bool(args.synthetic) == bool(args.pipeline):
        raise ValueError("give either --synthetic, images that are there, or --pipeline, a model that draws them.")
    counts = ("resolution", "num_images", "extraction_images")
    counts += ("classifier_seeds", "classifier_steps", "classifier_resolution", "num_inference_steps", "batch_size")
    for name in counts:
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} has to be at least 1, got {getattr(args, name)}.")
    for name in ("sheet_images", "extraction_captions", "seed", "guidance_scale"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} has to be at least 0, got {value}.")
    if args.extraction_captions and not (args.pipeline and args.train):
        raise ValueError("--extraction-captions needs --pipeline to draw with and --train to compare with.")
    if args.downstream and not args.train:
        raise ValueError("--downstream needs --train, the real images to train on.")
    if args.no_filter and not args.pipeline:
        raise ValueError("--no-filter belongs to --pipeline: images that are there have been chosen already.")
    if args.low_data_pipeline and not (args.downstream and args.pipeline):
        raise ValueError("--low-data-pipeline belongs to --downstream with --pipeline.")
    if not 0 < args.low_data_share < 1:
        raise ValueError(f"--low-data-share has to be between 0 and 1, got {args.low_data_share}.")
    if any(percent < 100 or percent % 100 for percent in args.percents):
        raise ValueError(f"--percents have to be multiples of 100, got {' '.join(map(str, args.percents))}.")


def run(args: argparse.Namespace) -> dict:
    """Evaluates as `args` say and writes the report.

    Returns:
        The report, as `report.json` holds it.

    Raises:
        ValueError: arguments that do not fit, CSV files with bad rows, no modality in common.
        OSError: a model, a file or a folder is not there.
    """
    check(args)
    start = time.monotonic()
    missing = [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]
    if missing:
        raise ValueError(f"the page needs {' and '.join(missing)}: pip install 'minim-pipeline[evaluate]'.")

    def rows_of(path: Path, split: str | None, root: Path | None, modality: str | None) -> list[dict]:
        return read_split(path, split, image_root=root, skip_bad_rows=args.skip_bad_rows, modality=modality)

    # Before any row is read: it may be of a modality that only a model knows.
    for model in filter(None, (args.pipeline, args.low_data_pipeline, args.modalities_from)):
        register_modalities(model)
    real_rows = rows_of(args.real, args.real_split, args.image_root, args.modality)
    train_rows = rows_of(args.train, args.train_split, args.image_root, args.modality) if args.train else None
    # The synthetic images may be of more modalities than the real ones, if their CSV says so.
    named = args.synthetic is None or "modality" in read_table(args.synthetic)[0]
    synthetic_modality = None if named else args.modality
    synthetic_rows = rows_of(args.synthetic, None, None, synthetic_modality) if args.synthetic else None
    if train_rows:
        check_overlap(real_rows, args.real, train_rows, args.train)

    from accelerate import PartialState

    from ..data.image_loading import check_values
    from .judges import load_judges

    # Real images are scaled alike, whichever file names them; the synthetic ones have their own range.
    reading = reading_of(args)
    found = check_values(
        [(rows, path) for rows, path in ((real_rows, args.real), (train_rows, args.train)) if rows], reading
    )
    own_reading = replace(reading, modality=synthetic_modality, image_root=None)
    if synthetic_rows:
        check_values([(synthetic_rows, args.synthetic)], own_reading)

    # Whatever may be wrong with them shows before images are drawn, which takes long.
    # The main process measures alone, which may take longer than the others wait by default.
    state = PartialState(cpu=args.device == "cpu", timeout=timedelta(days=1))
    device = state.device
    extractors = load_extractors(args, device)
    own = extractors[0]
    judges = load_judges(args.judges, device) if args.judges else None

    load = partial(load_set, resolution=args.resolution)
    synthetic_csv = args.synthetic
    if args.pipeline:
        synthetic_csv, synthetic_rows = draw_synthetic(args, real_rows)
    real = load(real_rows, args.real, reading, found)
    synthetic = load(synthetic_rows, synthetic_csv, own_reading, None)
    train = load(train_rows, args.train, reading, found) if train_rows else None

    report = {"made": None, "sets": describe(args, real, synthetic, train), "conversions": []}
    for name, images in (("real", real), ("synthetic", synthetic), ("train", train)):
        report["conversions"] += conversions(name, images, own.encoder) if images else []
    report["extractors"] = [{"name": extractor.name, "digest": extractor.digest} for extractor in extractors]
    if state.is_main_process:  # the others go ahead to the classifiers
        measured, shown = measure(args, (real, synthetic, train), extractors, judges)
        report |= measured
        report["made"] = made(device, time.monotonic() - start)
        # Already now: training classifiers takes long, and may fail.
        write(report, *shown, args.output_dir)
    if args.downstream:
        report["downstream"] = run_downstream(args, state, real, synthetic, train)
        if state.is_main_process:
            report["made"] = made(device, time.monotonic() - start)
            write(report, *shown, args.output_dir)
    state.wait_for_everyone()
    return report


def load_extractors(args: argparse.Namespace, device) -> list:
    """The image-text encoder, and the others whose features are measured in; raises ValueError for two of one name."""
    from .extractors import load_extractor

    extractors = [load_extractor(model, device) for model in (args.encoder, *args.extractor)]
    if extractors[0].encoder is None:
        raise ValueError(f"--encoder has to be an image-text encoder of train_encoder.py, got {args.encoder}.")
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


def load_set(rows: list[dict], path: Path, reading: Reading, found: dict[str, Found] | None, resolution: int):
    """The `ImageSet` of rows of a CSV; how its images were changed is said."""
    from ..data.image_loading import load_images
    from .report import ImageSet

    changes = Counter()
    images = load_images(rows, path, resolution, changes=changes, reading=reading, found=found)
    tell(changes, len(rows), path, reading)
    return ImageSet(rows, images, changes)


def measure(args: argparse.Namespace, sets: tuple, extractors: list, judges) -> tuple[dict, tuple[dict, dict]]:
    """What `evaluate` and, if asked for, extraction find of the real, synthetic and train images; and pictures."""
    from .extraction import extract_training_images
    from .pictures import collect
    from .report import evaluate

    _, synthetic, train = sets
    encoder = extractors[0].encoder
    report, copies, readings = evaluate(*sets, encoder, extractors, judges, args.label_column)
    if args.extraction_captions:
        drawn = args.extraction_captions, args.extraction_images, batch_size(args)
        settings = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
        pipe = pipeline(args, args.pipeline)
        report["extraction"] = extract_training_images(pipe, train, encoder, copies, *drawn, **settings)
    return report, collect(synthetic, train, copies, readings, args.sheet_images, 6, args.no_real_images)


def check_overlap(real_rows: list[dict], real: Path, train_rows: list[dict], train: Path) -> None:
    """Raises ValueError if an image is on both sides, also under another name: all would be called new beside it."""
    paths = [resolve_path(row, train) for row in train_rows] + [resolve_path(row, real) for row in real_rows]
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
    for name, text in (("report.json", json.dumps(report, indent=2) + "\n"), ("report.html", page)):
        with atomic_path(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def describe(args: argparse.Namespace, real, synthetic, train) -> dict:
    """What was compared, without saying where it lies."""
    sets = {"real": {"file": args.real.name, "split": args.real_split, "n": len(real.rows)}, "train": None}
    if train:
        sets["train"] = {"file": args.train.name, "split": args.train_split, "n": len(train.rows)}
    made = {"file": args.synthetic.name if args.synthetic else "synthetic/data.csv", "n": len(synthetic.rows)}
    settings = {}
    for name in ("model", "revision", "steps", "guidance", "scheduler", "negative_prompt", "lora"):
        values = sorted({row[name] for row in synthetic.rows if row.get(name)})
        if values:
            settings[name] = ", ".join(values)
    if args.no_filter:
        settings["filter"] = "off"
    made |= {"model": settings.pop("model", None), "revision": settings.pop("revision", None), "settings": settings}
    return sets | {"synthetic": made}


def draw_synthetic(args: argparse.Namespace, real_rows: list[dict]) -> tuple[Path, list[dict]]:
    """Draws `--num-images` for every caption of the real images into OUTPUT/synthetic, or goes on with that.

    Returns:
        The CSV there, and its rows of the images asked for, with the other columns as the real rows have them now.
    """
    from ..generate.command import Item, generate
    from ..modalities import resolve_modality

    trained = register_modalities(args.pipeline).get("modalities") or None
    items, unknown = [], Counter()
    for row in real_rows:
        modality = resolve_modality(row["modality"])
        if trained is not None and modality.id not in trained:
            unknown[modality.name] += 1
            continue
        extra = {key: value for key, value in row.items() if key not in ("path", "Text", "modality", "seed", "split")}
        for _ in range(args.num_images):
            items.append(Item(len(items), row["Text"], modality, args.seed + len(items), extra))
    if not items:
        raise ValueError(f"{args.pipeline} has learned no modality of {args.real}: {', '.join(unknown)}.")
    folder = args.output_dir / "synthetic"
    generate(
        items,
        folder,
        args.pipeline,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        device=args.device,
        dtype=args.dtype,
        batch_size=batch_size(args),
        no_filter=args.no_filter,
    )
    digits = name_digits(folder, len(items))
    asked = {image_name(item.index, digits): item.extra for item in items}
    rows = read_csv(folder / "data.csv")
    return folder / "data.csv", [row | asked[row["path"]] for row in rows if row["path"] in asked]


def batch_size(args: argparse.Namespace) -> int:
    import torch

    return args.batch_size or (64 if torch.cuda.is_available() and args.device != "cpu" else 4)


def pipeline(args: argparse.Namespace, model: str):
    from accelerate import PartialState

    from ..generate.command import load_pipeline

    pipe = load_pipeline(model, device=str(PartialState().device), dtype=args.dtype)
    if args.compile:
        pipe.unet.compile()
        pipe.vae.decoder.compile()
    return pipe


def run_downstream(args: argparse.Namespace, state, real, synthetic, train) -> dict:
    """`downstream` with the images of the sets and, with `--pipeline`, with as many drawn ones as it needs."""
    from ..generate.command import model_identity
    from .classifier import Recipe
    from .downstream import Design, downstream, drawn_by, take_share, taken_from

    needed = {"real": real, "train": train} | ({} if args.pipeline else {"synthetic": synthetic})
    missing = [name for name, images in needed.items() if not images.has(args.label_column)]
    if missing:
        return {"left_out": f"not every {' and '.join(missing)} image has a value in {args.label_column!r}"}
    if args.pipeline:
        learned = read_model_index(args.pipeline).get("modalities") or list(train.modalities)
        train, real = train.only(learned), real.only(learned)
    low_rows = take_share(train.rows, args.low_data_share, args.label_column)
    folder = args.output_dir / "downstream"
    write_low_data(args.output_dir / "low_data.csv", low_rows, args.train, state)
    # A little larger than what the classifiers see, so that zooming in finds detail.
    size = min(args.resolution, args.classifier_resolution * 5 // 4 // 8 * 8)
    sources = {}
    models = {"data sharing": args.pipeline, "honest low data": args.low_data_pipeline}
    settings = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
    for setting, model in models.items():
        if model:
            kept = folder / setting.replace(" ", "-")
            identity = " ".join([*model_identity(model), args.dtype])
            pipe = pipeline(args, model)
            sources[setting] = drawn_by(pipe, state, kept, size, batch_size(args), identity, **settings)
    if not sources:
        sources["data sharing"] = taken_from(_shrink(synthetic.images, size), synthetic.rows, args.label_column)
    recipe = Recipe(
        max_train_steps=args.classifier_steps,
        resolution=args.classifier_resolution,
        bf16=state.device.type == "cuda",
    )
    design = Design(
        recipe=recipe, percents=args.percents, seeds=range(args.classifier_seeds), column=args.label_column
    )
    images = _shrink(train.images, size)
    return downstream((train.rows, images), (real.rows, real.images), low_rows, sources, folder, state, design)


def _shrink(images, size: int):
    """uint8 images [N, 3, H, W] at `size` px, all in the same way."""
    import torch
    import torch.nn.functional as F

    if images.shape[-1] == size:
        return images
    parts = [
        F.interpolate(part.float(), size=(size, size), mode="bicubic", antialias=True).round().clamp(0, 255)
        for part in images.split(256)
    ]
    return torch.cat([part.to(torch.uint8) for part in parts])


def write_low_data(path: Path, rows: list[dict], source: Path, state) -> None:
    """The rows of the low-data settings as a CSV to train a generator on, paths relative to it.

    Raises:
        ValueError: there is one with other rows, on which a generator may have been trained.
    """
    import csv

    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        place = os.path.relpath(resolve_path(row, source).resolve(), path.parent.resolve())
        writer.writerow(row | {"path": Path(place).as_posix()})
    if path.is_file() and path.read_text(encoding="utf-8") != text.getvalue():
        raise ValueError(f"{path} holds other rows than --train and --low-data-share give now: choose another folder.")
    state.wait_for_everyone()
    if state.is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_text(text.getvalue(), encoding="utf-8")
    state.wait_for_everyone()
