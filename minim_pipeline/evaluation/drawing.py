"""The synthetic images of an evaluation, where a model is named instead of them."""

from collections import Counter
from dataclasses import fields
from pathlib import Path

import torch
from accelerate import PartialState

from ..data.sources import image_name, name_digits, read_csv
from ..generate.options import GenerateOptions, SamplingOptions
from ..generate.plan import Item
from ..generate.write import generate
from ..loading import load_pipeline, register_modalities
from ..modalities import resolve_modality
from .options import DrawingOptions, EvaluateOptions


def draw_synthetic(options: EvaluateOptions, model: str, real_rows: list[dict]) -> tuple[Path, list[dict]]:
    """Draws `--num-images` for every caption of the real images into OUTPUT/synthetic, or goes on with that.

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
    folder = options.output_dir / "synthetic"
    shared = options.values(*(f.name for f in fields(SamplingOptions)))
    shared["batch_size"] = batch_size(options)
    generate(items, folder, GenerateOptions(model=model, **shared))
    digits = name_digits(folder, len(items))
    asked = {image_name(item.index, digits): item.extra for item in items}
    rows = read_csv(folder / "data.csv")
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
