"""Flaws of generated images that show without a judge: unequal channels, letterboxes, specks."""

import numpy as np
import torch
import torch.nn.functional as F

from ..data.image_loading import trim_letterbox
from ..modalities import MODALITIES
from .images import to_unit


def specks(images: torch.Tensor, threshold: float = 0.25) -> float:
    """Share of pixels that differ by more than `threshold` of the range from the median of their 3 x 3 neighbours."""
    total = 0.0
    for part in images.split(16):
        grey = to_unit(part).mean(1, keepdim=True)  # [B, 1, H, W]
        median = F.unfold(F.pad(grey, (1,) * 4, mode="replicate"), 3).median(1).values  # [B, H*W]
        total += ((grey.flatten(1) - median).abs() > threshold).float().mean(1).sum().item()
    return total / len(images)


def checks(images: torch.Tensor, real: torch.Tensor, modality: str) -> dict:
    """Flaws that show without a judge; specks beside those of real images, whose texture may look like them."""
    boxed = [trim_letterbox(image) is not image for image in images.permute(0, 2, 3, 1).numpy()]
    equal = bool((images == images[:, :1]).all())
    return {
        "equal_channels": equal if MODALITIES[modality].grey else None,
        "letterboxes": round(float(np.mean(boxed)), 4),
        "specks": round(specks(images), 6),
        "specks_real": round(specks(real), 6),
        "n": len(images),
    }
