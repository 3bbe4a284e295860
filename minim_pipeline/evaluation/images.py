"""Images as the networks of the evaluation take them."""

import torch
import torch.nn.functional as F
from torch import Tensor


def to_unit(images: Tensor) -> Tensor:
    """uint8 images as float32 in [0, 1]; float images as they are, in float32."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def to_input(images: Tensor, size: int) -> Tensor:
    """What the networks see of images [N, 3, H, W], uint8 or float in [0, 1]: float32, resized, about -2 to 2."""
    x = to_unit(images)
    if x.shape[-2:] != (size, size):
        x = F.interpolate(x, size=(size, size), mode="bilinear", antialias=True)
    return (x - 0.5) * 4
