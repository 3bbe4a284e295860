"""What an autoencoder keeps of an image, and latents of unit variance."""

import math
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from ..contact_sheet import contact_sheet


def highest_octave(images: torch.Tensor) -> torch.Tensor:
    """Power of the grey values of images [B, 3, S, S] in the highest octave, a pixel: [B].

    By the cosine transform, which knows no jump from one border to the other as the Fourier transform does: the
    coefficients of which at least one index is in the upper half, a quarter of a cycle a pixel and above.
    """
    grey = images.float().mean(1)  # [B, S, S]
    size = grey.shape[-1]
    n = torch.arange(size, device=grey.device)
    basis = torch.cos(math.pi / size * (n + 0.5) * n[:, None]) * math.sqrt(2 / size)  # [S, S], DCT-II
    basis[0] /= math.sqrt(2)
    power = (basis @ grey @ basis.T).square()  # [B, S, S]
    return (power * (torch.maximum(n, n[:, None]) >= size // 2)).sum((-2, -1)) / size**2


def reconstruct(vae: AutoencoderKL, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Images uint8 [B, 3, H, W] as the autoencoder takes them, in [-1, 1], and what it makes of them."""
    x = images.to(vae.device).float() / 127.5 - 1
    return x, vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)


@torch.no_grad()
def reconstruction_figures(
    vae: AutoencoderKL, images: torch.Tensor, modalities: list[str], batch_size: int = 32
) -> dict[str, float]:
    """Mean PSNR in dB and ratio of the energy in the highest octave, of all images and per modality."""
    psnr, energy = [], []
    for part in images.split(batch_size):
        x, y = reconstruct(vae, part)
        psnr += (-10 * torch.log10(((y - x) / 2).square().mean((1, 2, 3)))).tolist()
        energy += torch.stack([highest_octave(y), highest_octave(x)], 1).tolist()
    ratios, energies, names = np.array(psnr), np.array(energy), np.array(modalities)
    figures = {"psnr": round(float(ratios.mean()), 3)}
    for name in dict.fromkeys(modalities):
        own = names == name
        figures[f"psnr_{name}"] = round(float(ratios[own].mean()), 3)
        figures[f"energy_{name}"] = round(float(energies[own, 0].sum() / energies[own, 1].sum()), 3)
    return figures


@torch.no_grad()
def save_pairs(vae: AutoencoderKL, images: torch.Tensor, path: Path) -> None:
    """A sheet with originals above reconstructions. It shows real images: for looking at, not for publishing."""
    pairs = torch.cat(reconstruct(vae, images))
    contact_sheet(((pairs + 1) * 127.5).round().byte(), columns=len(images)).save(path)


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, images: torch.Tensor, batch_size: int = 64) -> None:
    """Makes the latents of `images` zero-mean and of unit variance in every channel, without changing the images.

    The affine map is folded into the 1 x 1 convolutions on both sides of the latents, so that `scaling_factor` is 1
    and no code that uses the autoencoder has to know of it.
    """
    means, variances = [], []
    for part in images.split(batch_size):
        posterior = vae.encode(part.to(vae.device).float() / 127.5 - 1).latent_dist
        means.append(posterior.mean.double().transpose(0, 1).flatten(1))
        variances.append(posterior.var.double().transpose(0, 1).flatten(1))
    every_mean = torch.cat(means, 1)  # [C, pixels]
    mean = every_mean.mean(1).float()
    std = (every_mean.var(1) + torch.cat(variances, 1).mean(1)).sqrt().float()
    channels = len(mean)
    out, back = vae.quant_conv, vae.post_quant_conv  # [2C, 2C, 1, 1] and [C, C, 1, 1]
    out.weight[:channels] /= std[:, None, None, None]
    out.bias[:channels] = (out.bias[:channels] - mean) / std
    out.bias[channels:] -= 2 * std.log()  # the log variance
    back.bias += back.weight[:, :, 0, 0] @ mean
    back.weight *= std[None, :, None, None]
