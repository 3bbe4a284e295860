"""Fingerprints that tell copies of training images: the code behind them, and how many copies they miss."""

from collections.abc import Iterable

import torch
from torch import nn

from ... import FilterHead, MinimPipeline
from ...mapped import Rows
from ...minim_filter.fingerprints import distances, pack
from .data import encode


SHIFT, POSES = 4, 6


@torch.no_grad()
def pooled_features(
    head: FilterHead, pipe: MinimPipeline, images: Rows | Iterable[torch.Tensor], bf16: bool
) -> torch.Tensor:
    """What the head's code is read from, [N, F] on the CPU, of images uint8 [N, 3, H, W], or parts."""
    pooled = []
    hook = head.norm.register_forward_hook(lambda norm, given, made: pooled.append(made.cpu()))
    try:
        for part in encode(pipe, images, bf16).split(128):
            x = part.to(head.device).float()
            head.encode_image(x, x, x.new_zeros(len(x)))
    finally:
        hook.remove()
    return torch.cat(pooled)


def fit_code(features: torch.Tensor, bits: int, directions: int = 160, ridge: float = 0.3, seed: int = 0) -> nn.Linear:
    """A linear code that is alike for versions of an image and unlike for other images, in closed form.

    Fisher's linear discriminant with every image as a class (Fisher, 1936), its directions brought to one scale and
    turned at random, so that every bit says as much as another (as in ITQ, Gong and Lazebnik, 2011).

    Args:
        features: [N, versions, F].
        bits: a multiple of 8.
        directions: of the discriminant, at most `bits`.
        ridge: of the covariance within images, in mean variances.
    """
    features = features.double()
    mean = features.mean((0, 1))
    apart = (features - features.mean(1, keepdim=True)).flatten(0, 1)
    within = apart.T @ apart / len(apart)
    within += ridge * within.diagonal().mean() * torch.eye(len(within), dtype=within.dtype)
    centres = features.mean(1) - mean
    whiten = torch.linalg.inv(torch.linalg.cholesky(within))
    values, vectors = torch.linalg.eigh(whiten @ (centres.T @ centres / len(centres)) @ whiten.T)
    directions = min(directions, bits, len(values))
    chosen = whiten.T @ vectors[:, -directions:] / values[-directions:].clamp(min=1e-9).sqrt()  # [F, directions]
    g = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(bits, bits, generator=g, dtype=torch.float64))[0][:directions]
    weight, bias = (chosen @ turn).T, -(mean @ chosen @ turn)
    # Signs alone count, and of few images that hardly differ the numbers are too large for half precision.
    scale = max(1.0, weight.abs().max().item() / 1e4, bias.abs().max().item() / 1e4)
    code = nn.Linear(len(mean), bits)
    code.weight.data = (weight / scale).float().contiguous()
    code.bias.data = (bias / scale).float()
    return code.half().float()  # as it will be saved


def poses(images: torch.Tensor) -> torch.Tensor:
    """Ways in which an image may be copied that its code tells from it: uint8 [N, POSES, 3, H, W] of [N, 3, H, W].

    As it is, mirrored, and shifted by four pixels along both diagonals, half of what a latent's place stands for.
    """
    rows, columns = (torch.arange(side) for side in images.shape[-2:])

    def shifted(down: int, right: int) -> torch.Tensor:  # what comes in repeats the edge
        y, x = ((places - by).clamp(0, len(places) - 1) for places, by in ((rows, down), (columns, right)))
        return images[:, :, y][..., x]

    shifts = [shifted(down, right) for down in (-SHIFT, SHIFT) for right in (-SHIFT, SHIFT)]
    return torch.stack([images, images.flip(-1), *shifts], 1)


def plant(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Copies as a generator might make them, by name: uint8 [N, 3, H, W]."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)) * 255 * 0.02
    return {
        "brighter_by_12_percent": (images.float() * 1.12).clamp(0, 255).to(torch.uint8),
        "noise_of_2_percent": (images.float() + noise).clamp(0, 255).to(torch.uint8),
        "shifted_by_4_px": images.roll((4, 4), (2, 3)),
        "shifted_by_3_and_6_px": images.roll((3, -6), (2, 3)),
        "mirrored": images.flip(-1),
    }


def copy_limit(strangers: torch.Tensor, false_alarms: float) -> int:
    """The largest distance within which at most this share of distances int64 [N] lies; -1 if there is none."""
    limits = [d for d in range(int(strangers.max()) + 1) if (strangers <= d).double().mean().item() <= false_alarms]
    return max(limits, default=-1)


def veto_report(
    code: nn.Linear,
    known: torch.Tensor,
    val: torch.Tensor,
    val_modalities: list[str],
    planted: dict[str, torch.Tensor],
    planted_modalities: list[str],
    false_alarms: float,
) -> tuple[dict[str, int], dict]:
    """Limits by modality, within which a share `false_alarms` of `val` lies, and how many copies they miss.

    Args:
        known: fingerprints of the training images.
        val: features [N, F] of images that are no copies, but for what a data set repeats.
        planted: features [M, F] of copies, by name; of images that neither head nor code has learned from.
    """
    with torch.no_grad():
        strangers = distances(code(val), known)
        copies = {name: distances(code(x), known) for name, x in planted.items()}
    limits, missed = {}, {}
    for modality in dict.fromkeys(val_modalities):
        own = torch.tensor([m == modality for m in val_modalities])
        limits[modality] = copy_limit(strangers[own], false_alarms)
    limit_of_val = torch.tensor([limits[m] for m in val_modalities])
    beyond = {name: d > torch.tensor([limits.get(m, -1) for m in planted_modalities]) for name, d in copies.items()}
    for modality in limits:
        own = torch.tensor([m == modality for m in planted_modalities])
        missed[modality] = {name: share(far[own]) for name, far in beyond.items() if own.any()}
    report = {
        "n": len(planted_modalities),
        "bytes": known.numel(),
        "false_alarms_val": share(strangers <= limit_of_val),
        "missed": {name: share(far) for name, far in beyond.items()},
        "missed_by_modality": missed,
        "median_distance": {"val": strangers.median().item()} | {n: d.median().item() for n, d in copies.items()},
    }
    return limits, report


def share(flags: torch.Tensor) -> float:
    """How many of bool [N] are true."""
    return round(flags.double().mean().item(), 4)


def fingerprints(code: nn.Linear, features: torch.Tensor) -> torch.Tensor:
    """uint8 [N, bits / 8] of features [N, F]."""
    with torch.no_grad():
        return pack(code(features))
