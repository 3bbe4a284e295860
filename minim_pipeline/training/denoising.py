"""What a U-Net is trained for: noise levels, the target and its weight, and what its answer says of the image."""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from transformers import CLIPTextModel

from ..minim_filter.estimate import estimate_clean, noise_angles


if TYPE_CHECKING:
    from .latents import Latents


class Denoise(nn.Module):
    """Text encoder and U-Net in one forward, which is what is distributed."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Of latents [B, C, h, w] and timesteps [B]; `text` is token ids [B, L], or their hidden states already."""
        if not text.is_floating_point():
            text = self.text_encoder(text).last_hidden_state  # [B, L, D]
        return self.unet(noisy, timesteps, text, return_dict=False)[0]  # [B, C, h, w]


def noise_scheduler(config: dict, device: torch.device | str) -> DDPMScheduler:
    """The noise schedule of a pipeline's scheduler, to train with on the device."""
    scheduler = DDPMScheduler.from_config(config)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(device)
    return scheduler


def log_normal_timesteps(
    scheduler: DDPMScheduler, uniform: torch.Tensor, median: float, std: float, generator: torch.Generator
) -> torch.Tensor:
    """Timesteps [B] at which ln(sigma/alpha) is normally distributed, as in EDM's training (arXiv 2206.00364).

    A tenth of them stay those of `uniform` [B], so that no noise level, pure noise in particular, is left out.
    """
    alpha = scheduler.alphas_cumprod.to(uniform.device)
    levels = ((1 - alpha) / alpha.clamp(min=1e-12)).log() / 2  # rising with the timestep
    drawn = math.log(median) + std * torch.randn(len(uniform), device=uniform.device, generator=generator)
    nearest = torch.searchsorted(levels, drawn).clamp(max=len(levels) - 1)
    stays = torch.rand(len(uniform), device=uniform.device, generator=generator) < 0.1
    return torch.where(stays, uniform, nearest)


def loss_weights(scheduler: DDPMScheduler, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
    """min-SNR weights, arXiv 2303.09556, section 3.4: [B].

    For v-prediction min(SNR, gamma) / (SNR + 1) would be 0 where the SNR is, so that with zero terminal SNR the first
    step of sampling would never be trained. With SNR + 1 in both places it is 1 there.
    """
    if not gamma:
        return torch.ones_like(timesteps, dtype=torch.float32)
    snr = compute_snr(scheduler, timesteps)
    if scheduler.config.prediction_type == "v_prediction":
        return (snr + 1).clamp(max=gamma) / (snr + 1)
    return snr.clamp(max=gamma) / snr.clamp(min=1e-8)


def squared_error(
    scheduler: DDPMScheduler,
    prediction: torch.Tensor,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
) -> torch.Tensor:
    """Mean square [B] of what a prediction [B, C, h, w] misses: the velocity, or the noise (arXiv 2202.00512)."""
    target = noise
    if scheduler.config.prediction_type == "v_prediction":
        target = scheduler.get_velocity(latents, noise, timesteps)
    return (prediction - target).square().mean((1, 2, 3))


def clean_estimate(
    scheduler: DDPMScheduler, noisy: torch.Tensor, prediction: torch.Tensor, timesteps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The clean latents [B, C, h, w] that a prediction stands for, and arctan(sigma / alpha) [B]: a filter head's."""
    angle = noise_angles(scheduler.alphas_cumprod, timesteps)
    return estimate_clean(noisy, prediction, angle, scheduler.config.prediction_type), angle


@torch.no_grad()
def validation_errors(
    model: Denoise, scheduler: DDPMScheduler, latents: "torch.Tensor | Latents", ids: torch.Tensor, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `squared_error` [N] of each image and its timestep [N]; noise and timesteps are always the same.

    Args:
        latents: [N, C, h, w], scaled as the U-Net takes them; read in parts.
        ids: of their captions, [N, L].
    """
    device = next(model.parameters()).device
    generator, again = (torch.Generator("cpu").manual_seed(seed) for _ in range(2))
    parts = torch.arange(len(latents)).split(64)
    for part in parts:  # the noise, which is drawn again where it is needed: all of it would fill the memory
        torch.randn((len(part), *latents.shape[1:]), generator=generator)
    # Evenly over the timesteps: all of them are visited in every thousandth.
    steps = torch.linspace(0, scheduler.config.num_train_timesteps - 1, len(latents)).round().long()
    steps = steps[torch.randperm(len(steps), generator=generator)]
    errors = []
    for part in parts:
        x, t = latents[part].cpu().float(), steps[part]
        e = torch.randn(x.shape, generator=again)
        noisy = scheduler.add_noise(x, e, t).to(device)
        prediction = model(noisy, t.to(device), ids[part].to(device)).float().cpu()
        errors.append(squared_error(scheduler, prediction, x, e, t))
    return torch.cat(errors), steps
