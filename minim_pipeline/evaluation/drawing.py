"""The synthetic images of an evaluation: those it measures, where a model is named for them, and those that teach.

What synthetic images are worth as training data: `downstream`, whose settings follow here from the options.
"""

import csv
import io
import os
from collections import Counter
from dataclasses import fields
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import PartialState

from ..data.sources import image_name, name_digits, read_dataset, resolve_path
from ..files import atomic_path
from ..generate.options import GenerateOptions, SamplingOptions
from ..generate.plan import Item
from ..generate.write import generate
from ..loading import load_pipeline, model_identity, read_model_index, register_modalities
from ..mapped import Rows, derive
from ..modalities import resolve_modality
from .classifier import recipe_of
from .downstream import Design, downstream, drawn_by, take_share, taken_from
from .options import DrawingOptions, EvaluateOptions


def draw_synthetic(
    options: EvaluateOptions,
    model: str,
    real_rows: list[dict],
    folder: Path | None = None,
    num_candidates: int | None = None,
) -> tuple[Path, list[dict]]:
    """Draws `--num-images` for every caption of the real images into a folder, or goes on with that.

    Args:
        folder: default OUTPUT/synthetic.
        num_candidates: of which the model's filter chooses; default: the model's.

    Returns:
        The CSV there, and its rows of the images asked for, with the other columns as the real rows have them now.
    """
    trained = register_modalities(model).get("modalities") or None
    items: list[Item] = []
    unknown: Counter[str] = Counter()
    for row in real_rows:
        modality = resolve_modality(row["modality"])
        if trained is not None and modality.id not in trained:
            unknown[modality.name] += 1
            continue
        extra = {key: value for key, value in row.items() if key not in ("path", "Text", "modality", "seed", "split")}
        for _ in range(options.num_images):
            items.append(Item(len(items), row["Text"], modality, options.seed + len(items), extra))
    if not items:
        raise ValueError(f"{model} has learned no modality of {options.real}: {', '.join(unknown)}.")
    folder = folder or options.output_dir / "synthetic"
    shared = options.values(*(f.name for f in fields(SamplingOptions)))
    shared["batch_size"] = batch_size(options)
    generate(items, folder, GenerateOptions(model=model, num_candidates=num_candidates, **shared))
    digits = name_digits(folder, len(items))
    asked = {image_name(item.index, digits): item.extra for item in items}
    rows = read_dataset(folder / "data.csv")
    return folder / "data.csv", [row | asked[row["path"]] for row in rows if row["path"] in asked]


def batch_size(options: DrawingOptions) -> int:
    return options.batch_size or (64 if torch.cuda.is_available() and options.device != "cpu" else 4)


def load_for_drawing(options: DrawingOptions, model: str):
    """The pipeline of `model` on this process's device, compiled if that was asked for."""
    pipe = load_pipeline(model, device=str(PartialState().device), dtype=options.dtype)
    if options.compile:
        pipe.unet.compile()
        pipe.vae.decoder.compile()
    return pipe


def run_downstream(options: EvaluateOptions, train_csv: Path, state, sets: tuple) -> dict:
    """`downstream` with the images of the sets and, with `--pipeline`, with as many drawn ones as it needs."""
    real, synthetic, train = sets
    needed = {"real": real, "train": train} | ({} if options.pipeline else {"synthetic": synthetic})
    missing = [name for name, images in needed.items() if not images.has(options.label_column)]
    if missing:
        return {"left_out": f"not every {' and '.join(missing)} image has a value in {options.label_column!r}"}
    if options.pipeline:
        learned = read_model_index(options.pipeline).get("modalities") or list(train.modalities)
        train, real = train.only(learned), real.only(learned)
    low_rows = take_share(train.rows, options.low_data_share, options.label_column)
    folder = options.output_dir / "downstream"
    write_low_data(options.output_dir / "low_data.csv", low_rows, train_csv, state)
    # A little larger than what the classifiers see, so that zooming in finds detail.
    size = min(options.resolution, options.classifier_resolution * 5 // 4 // 8 * 8)
    sources = {}
    models = {"data_sharing": options.pipeline, "honest_low_data": options.low_data_pipeline}
    settings = options.values("num_inference_steps", "guidance_scale")
    for setting, model in models.items():
        if model:
            images_folder = folder / setting.replace("_", "-")
            identity = " ".join([*model_identity(model), options.dtype])
            pipe = load_for_drawing(options, model)
            sources[setting] = drawn_by(pipe, state, images_folder, size, batch_size(options), identity, **settings)
    if not sources:
        sources["data_sharing"] = taken_from(
            _shrink(synthetic.images, size, "synthetic"), synthetic.rows, options.label_column
        )
    bf16, seeds = state.device.type == "cuda", range(options.classifier_seeds)
    kind, column = options.classifier_architecture, options.label_column
    steps, resolution = options.classifier_steps, options.classifier_resolution
    recipe = recipe_of(kind, max_train_steps=steps, resolution=resolution, bf16=bf16)
    design = Design(recipe=recipe, percents=options.percents, seeds=seeds, column=column, architecture=kind)
    images = _shrink(train.images, size, "train")
    return downstream((train.rows, images), (real.rows, real.images), low_rows, sources, folder, state, design)


def _shrink(images: Rows, size: int, name: str) -> Rows:
    """uint8 images [N, 3, H, W] at `size` px, all in the same way, by all processes together."""

    def shrunk(part: torch.Tensor) -> torch.Tensor:
        x = F.interpolate(part.float(), size=(size, size), mode="bicubic", antialias=True)
        return x.round().clamp(0, 255).to(torch.uint8)

    return images if images.shape[-1] == size else derive(images, f"shrunk-{name}", 64, shrunk, alone=False)


def write_low_data(path: Path, rows: list[dict], source: Path, state) -> None:
    """The rows of the low-data settings as a CSV to train a generator on, paths relative to it.

    Raises:
        ValueError: there is one with other rows, on which a generator may have been trained.
    """
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
