"""Reads images as training and evaluation see them: one size, and without bars that somebody put around them."""

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from .data import resolve_path
from .modalities import resolve_modality


def load_images(
    rows: list[dict],
    csv_path: str | Path,
    resolution: int,
    trim: bool = True,
    changes: Counter | None = None,
    image_root: str | Path | None = None,
) -> torch.Tensor:
    """The images of `rows` as uint8 [N, 3, resolution, resolution]; those of grey modalities with equal channels.

    Args:
        rows: as `read_csv` gives them.
        csv_path: the file they came from; `path` is relative to its folder, or to `image_root`.
        resolution: side in pixels; what is no square is stretched to one.
        trim: take letterboxes away (`trim_letterbox`); never from an OCT, where what is flat and not black is the
            vitreous.
        changes: counts what had to be done to the images, in words.
    """

    def load(row: dict) -> tuple[torch.Tensor, list[str]]:
        modality, done = resolve_modality(row["modality"]), []
        with Image.open(resolve_path(row, csv_path, image_root)) as file:
            if file.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip at 255
                done.append("16 bits a pixel scaled to 8")
                file = Image.fromarray((np.asarray(file).clip(0, 65535) / 257).round().astype(np.uint8))
            image = file.convert("RGB")
        if modality.grey:
            grey = image.convert("L").convert("RGB")
            if changes is not None and np.ptp(np.asarray(image), axis=2).max() > GREY_TOLERANCE:
                done.append(f"{modality.name} is grey: colour taken away")
            image = grey
        if trim and modality.id != "oct":
            pixels = np.asarray(image)
            trimmed = trim_letterbox(pixels)
            if trimmed is not pixels:
                done.append("letterbox taken away")
                image = Image.fromarray(trimmed)
        if image.size != (resolution, resolution):
            done.append(f"resized from {image.width} x {image.height} to {resolution} x {resolution} px")
            image = image.resize((resolution, resolution), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), done

    images = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for image, done in tqdm(pool.map(load, rows), "reading", len(rows), disable=None):
            images.append(image)
            if changes is not None:
                changes.update(done)
    return torch.stack(images)


# Channels of a grey picture differ by so much after lossy compression in colour.
GREY_TOLERANCE = 24


def trim_letterbox(image: np.ndarray, max_stretch: float = 1.15) -> np.ndarray:
    """Cuts flat bright bars off opposite borders and makes the rest square again.

    Most of COVID-CT and some of the other chest CTs were padded to a square with grey or white, and a generator would
    learn the bars as anatomy. Black is left alone: it is the air around a body. What remains is stretched by at most
    `max_stretch`; where that is not enough, its longer side is cropped evenly.

    Args:
        image: uint8 [H, W, 3].

    Returns:
        uint8 [S, S, 3], or `image` itself where there are no bars.
    """
    grey = image.mean(2)
    top, bottom = _bars(grey)
    left, right = _bars(grey.T)
    if not (top or left):
        return image
    content = image[top : len(grey) - bottom, left : grey.shape[1] - right]
    height, width = content.shape[:2]
    long = round(min(height, width) * max_stretch)
    y, x = max(0, height - long) // 2, max(0, width - long) // 2
    content = content[y : height - y, x : width - x]
    size = max(image.shape[:2])
    return np.asarray(Image.fromarray(content).resize((size, size), Image.Resampling.LANCZOS))


def _bars(lines: np.ndarray, darkest: float = 40, least: int = 4) -> tuple[int, int]:
    """How many lines of the grey image are a bar, at its beginning and at its end; (0, 0) unless both are."""
    bars = []
    for side in (lines, lines[::-1]):
        value = np.median(side[0])
        # Lossy compression leaves a ripple, strongest beside the content.
        flat = (side.std(1) < 3) & (np.abs(side - value).max(1) < 12)
        count = int(np.argmin(flat)) if not flat.all() else 0
        bars.append(count if value > darkest else 0)
    if min(bars) < least or sum(bars) > 0.6 * len(lines):
        return 0, 0
    # One line more on each side: the content's edge is blurred into the bar.
    return bars[0] + 1, bars[1] + 1
