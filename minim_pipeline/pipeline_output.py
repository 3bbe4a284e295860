"""What the pipeline gives back."""

from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput


@dataclass
class MinimPipelineOutput(BaseOutput):
    """What a call returns; every list has one entry an image, in the order of `images`.

    Args:
        images: `len(prompt) * num_images_per_prompt` images, all of the first prompt first: `list[PIL.Image.Image]`,
            `np.ndarray` (N, H, W, 3) in [0, 1], `torch.Tensor` (N, 3, H, W) in [0, 1], or latents (N, C, H/8, W/8).
        scores: the filter's expected rating of the finished picture, 1.0 to 3.0, as [`~MinimPipeline.score`] gives
            it; `None` where no filter ran.
        accepted: whether the filter accepts the picture, as `score` does; `None` where no filter ran.
        seeds: the int64 that draws the image again as `seeds=[seed]`; `None` where no single number does, because the
            noise came from `latents`, from one generator for several images, or from a generator already in use.
        candidates: how many were drawn for the image.
        rejected: how many of them were dropped on the way or not accepted, by reason: `"quality"`, `"finding"`,
            `"copy"` (of a training image) and, where the filter rates it, `"realism"` (does not look like a real
            one); `None` where no filter ran.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    scores: list[float | None]
    accepted: list[bool | None]
    seeds: list[int | None]
    candidates: list[int]
    rejected: list[dict[str, int] | None]


@dataclass
class MinimScores(BaseOutput):
    """The filter's ratings of images, lists of one entry an image.

    Args:
        scores: expected rating, 1.0 to 3.0, of quality and finding together.
        accepted: whether score, finding and realism reach the thresholds of the modality, and the image is no copy.
        reasons: why it is not accepted, `"quality"`, `"finding"`, `"copy"` or `"realism"`; `None` if it is.
        quality: expected rating, 1.0 to 3.0, of the picture.
        finding: likewise, of whether it shows what the prompt says.
        realism: log ratio of the densities of real and of generated images: below 0, it rather looks like a generated
            one. No part of the score. `None`, and no entry of a tuple, if the filter does not rate it.
    """

    scores: list[float]
    accepted: list[bool]
    reasons: list[str | None]
    quality: list[float]
    finding: list[float]
    realism: list[float] | None = None
