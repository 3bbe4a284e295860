"""What the synthetic images of an evaluation are worth as training data: the settings of `downstream`."""

import csv
import io
import os
from pathlib import Path

import torch
import torch.nn.functional as F

from ..data.sources import resolve_path
from ..files import atomic_path
from ..loading import model_identity, read_model_index
from .classifier import Recipe
from .downstream import Design, downstream, drawn_by, take_share, taken_from
from .drawing import batch_size, load_for_drawing
from .options import EvaluateOptions


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
        sources["data_sharing"] = taken_from(_shrink(synthetic.images, size), synthetic.rows, options.label_column)
    bf16, seeds = state.device.type == "cuda", range(options.classifier_seeds)
    recipe = Recipe(max_train_steps=options.classifier_steps, resolution=options.classifier_resolution, bf16=bf16)
    design = Design(recipe=recipe, percents=options.percents, seeds=seeds, column=options.label_column)
    images = _shrink(train.images, size)
    return downstream((train.rows, images), (real.rows, real.images), low_rows, sources, folder, state, design)


def _shrink(images, size: int):
    """uint8 images [N, 3, H, W] at `size` px, all in the same way."""
    if images.shape[-1] == size:
        return images
    parts = (F.interpolate(x.float(), size=(size, size), mode="bicubic", antialias=True) for x in images.split(256))
    return torch.cat([part.round().clamp(0, 255).to(torch.uint8) for part in parts])


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
