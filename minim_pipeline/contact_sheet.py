"""Pictures side by side in one: for looking at."""

from collections.abc import Sequence

import torch
from diffusers.utils import make_image_grid
from PIL import Image


def contact_sheet(
    images: Sequence[Image.Image] | torch.Tensor, columns: int, side: int | None = None, blank: str = "black"
) -> Image.Image:
    """The images row after row, `columns` in each; what is left of the last row is `blank`.

    Args:
        images: all of one size; a tensor is uint8 [N, 3, H, W].
        side: of each in pixels; default: as they are.
    """
    if isinstance(images, torch.Tensor):
        images = [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()]
    size = (side, side) if side else images[0].size
    pictures = [image if image.size == size else image.resize(size, Image.Resampling.LANCZOS) for image in images]
    pictures += [Image.new("RGB", size, blank)] * (-len(pictures) % columns)
    return make_image_grid(pictures, len(pictures) // columns, columns)
