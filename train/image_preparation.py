"""Reads images for training, without the bars that whoever collected them put around them."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from minim_pipeline import resolve_modality
from minim_pipeline.data import resolve_path


def load_images(
    rows: list[dict], csv_path: str | Path, resolution: int, trim: bool = True, num_workers: int = 8
) -> torch.Tensor:
    """The images of `rows` as uint8 [N, 3, resolution, resolution]; `trim` takes letterboxes away."""

    def load(row: dict) -> torch.Tensor:
        with Image.open(resolve_path(row, csv_path)) as file:
            image = file.convert("RGB")
        # In an OCT what is flat and not black is the vitreous.
        if trim and resolve_modality(row["modality"]).id != "oct":
            image = Image.fromarray(trim_letterbox(np.asarray(image)))
        if image.size != (resolution, resolution):
            image = image.resize((resolution, resolution), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    with ThreadPoolExecutor(num_workers) as pool:
        return torch.stack(list(tqdm(pool.map(load, rows), "reading", len(rows), disable=None)))


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
