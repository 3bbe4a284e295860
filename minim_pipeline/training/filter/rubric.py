"""The rubric: what counts as quality 1, 2 or 3, and as the right finding, before people have rated anything.

Everything that a grade follows from is named and weighted here, and nowhere else:

- quality falls with damage to the picture (`DAMAGES`), of real and of generated images alike, and with samplers that
  stop too early or are pushed too hard (`SAMPLERS`);
- the finding's grade is 3 for what the caption says of a real image, 2 for a finding that looks alike, 1 for another;
  of a generated image a classifier says what it shows.

Every grade holds real images and the sampler's own output, so that the filter does not learn to tell them apart.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Damage:
    """A way in which pictures fail.

    `apply` makes images of images [N, 3, H, W] in [0, 1], strengths [N] in [0, 1] and a generator; `weight` says how
    often it is used, relative to the others.
    """

    name: str
    apply: Callable[[torch.Tensor, torch.Tensor, torch.Generator], torch.Tensor]
    weight: float


@dataclass(frozen=True)
class Sampler:
    """Settings of the pipeline's call, None for its own; the quality of what they draw, and their share."""

    num_inference_steps: int | None
    guidance_scale: float | None
    quality: int
    weight: float


# Three steps leave everything soft, two smear it; guidance 8 burns contrast in.
SAMPLERS = (
    Sampler(None, None, 3, 0.55),
    Sampler(None, 1.5, 3, 0.10),
    Sampler(8, None, 3, 0.05),
    Sampler(3, None, 2, 0.10),
    Sampler(None, 8.0, 2, 0.10),
    Sampler(2, None, 1, 0.10),
)

# Between strength 0 and 1 lie the damages of grade 2 and of grade 1; what lies between them has no clear grade.
STRENGTHS = {2: (0.2, 0.4), 1: (0.6, 1.0)}

# Of the images of a training step, the share that is damaged.
DAMAGED_SHARE = 0.4

# Of the captions of a training step: right, another finding's, another modality's.
CAPTION_SHARES = {"right": 0.5, "finding": 0.42, "modality": 0.08}


def _uniform(x: torch.Tensor, g: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.rand(len(x), *shape, device=x.device, generator=g)


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values[:, None, None, None]


def blur(x: torch.Tensor, strength: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """Out of focus: Gaussian, sigma 0.8 to 7 px at 256 px."""
    result = []
    for image, s in zip(x, strength.tolist(), strict=True):
        sigma = (0.8 + 6.2 * s**1.5) * x.shape[-1] / 256
        reach = max(1, math.ceil(2.5 * sigma))
        kernel = torch.exp(-(torch.arange(-reach, reach + 1, device=x.device) ** 2) / (2 * sigma**2))
        kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
        padded = F.pad(image[None], (reach,) * 4, mode="replicate")
        result.append(F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)[0])
    return torch.stack(result)


def noise(x: torch.Tensor, strength: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """Grain, fine or coarse: standard deviation 0.04 to 0.4."""
    fine = torch.randn(x.shape, device=x.device, generator=g).mean(1, keepdim=True) * math.sqrt(3)
    coarse = F.interpolate(fine[:, :, ::4, ::4], size=x.shape[-2:], mode="bilinear") * 1.5
    grain = torch.where(_wide(_uniform(x, g) < 0.5), fine, coarse)
    return x + _wide(0.04 + 0.36 * strength**1.5) * grain


def exposure(x: torch.Tensor, strength: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """Too dark or too bright."""
    gamma = (0.5 + 2.2 * strength) * torch.where(_uniform(x, g) < 0.5, 1.0, -1.0)
    return x.clamp(1e-4, 1) ** _wide(gamma.exp())


def contrast(x: torch.Tensor, strength: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """A veil over everything."""
    level = _wide(0.2 + 0.6 * _uniform(x, g))
    return x + (level - x) * _wide(0.3 + 0.65 * strength)


def illumination(x: torch.Tensor, strength: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """Light from one side only: a shadow over a part of the picture."""
    angle, size = 2 * math.pi * _uniform(x, g), x.shape[-1]
    place = torch.linspace(-1, 1, size, device=x.device)
    along = _wide(angle.cos()) * place[None, None, None] + _wide(angle.sin()) * place[None, None, :, None]
    dark = torch.sigmoid(4 * (along + 0.6 - 1.2 * _wide(strength)) * -1)
    return x * (1 - dark * _wide(0.5 + 0.5 * strength))


def resolution(x: torch.Tensor, strength: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """Blocks, as of a thumbnail that was enlarged."""
    result = []
    for image, s in zip(x, strength.tolist(), strict=True):
        small = max(8, round(x.shape[-1] / (2 + 10 * s)))
        shrunk = F.interpolate(image[None], size=(small, small), mode="bilinear", antialias=True)
        result.append(F.interpolate(shrunk, size=x.shape[-2:], mode="nearest")[0])
    return torch.stack(result)


def warp(x: torch.Tensor, strength: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """Anatomy bent out of shape."""
    field = torch.randn(len(x), 2, 8, 8, device=x.device, generator=g)
    field = F.interpolate(field, size=x.shape[-2:], mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    identity = torch.eye(2, 3, device=x.device).expand(len(x), 2, 3)
    grid = F.affine_grid(identity, list(x.shape), align_corners=False)
    moved = grid + _wide(0.03 + 0.17 * strength) * field
    return F.grid_sample(x, moved, mode="bilinear", padding_mode="reflection", align_corners=False)


def shuffle(x: torch.Tensor, strength: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """Anatomy in pieces: some of 16 tiles lie where they do not belong."""
    n, c, h, w = x.shape
    tiles = x.reshape(n, c, 4, h // 4, 4, w // 4).permute(0, 2, 4, 1, 3, 5).reshape(n, 16, c, h // 4, w // 4)
    result = tiles.clone()
    for i, s in enumerate(strength.tolist()):
        moved = torch.randperm(16, device=x.device, generator=g)[: 2 + round(10 * s)]
        result[i, moved] = tiles[i, moved.roll(1)]
    return result.reshape(n, 4, 4, c, h // 4, w // 4).permute(0, 3, 1, 4, 2, 5).reshape(n, c, h, w)


def occlusion(x: torch.Tensor, strength: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """Flat patches and bars over the picture."""
    size = x.shape[-1]
    rows, columns = torch.arange(size, device=x.device)[:, None], torch.arange(size, device=x.device)[None]
    result = x.clone()
    for i, s in enumerate(strength.tolist()):
        for _ in range(1 + round(3 * s)):
            a, b, c, d, level = torch.rand(5, device=x.device, generator=g).tolist()
            high, wide = ((0.08 + 0.3 * s) * (0.6 + v) * size for v in (c, d))
            inside = (rows - a * size).abs() < high / 2
            inside = inside & ((columns - b * size).abs() < wide / 2)
            result[i] = torch.where(inside, level, result[i])
    return result


def nothing(x: torch.Tensor, strength: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """No picture at all, flat or noise alone; if mild, half of the picture shines through."""
    level = _wide(_uniform(x, g))
    grain = torch.rand(x.shape, device=x.device, generator=g)
    empty = torch.where(_wide(_uniform(x, g) < 0.5), level.expand_as(x), grain)
    return torch.where(_wide(strength > 0.5), empty, 0.5 * x + 0.5 * empty)


DAMAGES = (
    Damage("blur", blur, 2.0),
    Damage("noise", noise, 1.0),
    Damage("exposure", exposure, 1.5),
    Damage("contrast", contrast, 1.0),
    Damage("illumination", illumination, 1.5),
    Damage("resolution", resolution, 0.5),
    Damage("warp", warp, 1.0),
    Damage("shuffle", shuffle, 0.75),
    Damage("occlusion", occlusion, 0.5),
    Damage("nothing", nothing, 0.25),
)


def damage(images: torch.Tensor, quality: int, g: torch.Generator) -> tuple[torch.Tensor, list[str]]:
    """Damages images [N, 3, H, W] in [0, 1] down to a quality of 1 or 2; the names of what was done to each.

    Half of those of quality 1 are damaged in two ways.
    """
    low, high = STRENGTHS[quality]
    weights = torch.tensor([d.weight for d in DAMAGES], device=images.device)
    result, names = images, [""] * len(images)
    for turn in range(2 if quality == 1 else 1):
        which = torch.multinomial(weights, len(images), replacement=True, generator=g)
        if turn:
            which[torch.rand(len(images), device=images.device, generator=g) < 0.5] = -1
        strength = low + (high - low) * torch.rand(len(images), device=images.device, generator=g)
        result = result.clone()
        for i, kind in enumerate(DAMAGES):
            index = (which == i).nonzero()[:, 0]
            if len(index):
                result[index] = kind.apply(result[index], strength[index], g).clamp(0, 1)
                for j in index.tolist():
                    names[j] = " and ".join(filter(None, [names[j], kind.name]))
    return result, names
