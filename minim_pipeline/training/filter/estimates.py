"""What a sampler would have in hand at any noise level: the filter head is asked there, and so learns from it."""

import torch

from ... import MinimPipeline
from ...minim_filter.estimate import estimate_clean, noise_angles
from ..denoising import noise_scheduler


class NoisedEstimates:
    """Noisy latents of any level, and what the pipeline's U-Net, which is frozen, estimates of the clean ones."""

    def __init__(self, pipe: MinimPipeline, bf16: bool):
        self.unet, self.text_encoder, self.bf16 = pipe.unet, pipe.text_encoder, bf16
        self.prediction_type = pipe.scheduler.config.prediction_type
        self.alphas_cumprod = noise_scheduler(pipe.scheduler.config, pipe.device).alphas_cumprod

    def timesteps(self, count: int, g: torch.Generator) -> torch.Tensor:
        """int64 [count], each as probable as another."""
        return torch.randint(len(self.alphas_cumprod), (count,), device=self.alphas_cumprod.device, generator=g)

    @torch.no_grad()
    def __call__(
        self, latents: torch.Tensor, timesteps: torch.Tensor, ids: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Noisy latents and estimates of the clean ones, both [N, C, h, w], and angles [N].

        Args:
            latents, noise: [N, C, h, w].
            timesteps: int64 [N].
            ids: token ids [N, L] of the captions that the estimates are made for.
        """
        angle = noise_angles(self.alphas_cumprod, timesteps)
        noisy = angle.cos()[:, None, None, None] * latents + angle.sin()[:, None, None, None] * noise
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=self.bf16):
            text = self.text_encoder(ids).last_hidden_state
            prediction = self.unet(noisy, timesteps, text, return_dict=False)[0]
        return noisy, estimate_clean(noisy, prediction, angle, self.prediction_type), angle

    def of_half(
        self, latents: torch.Tensor, ids: torch.Tensor, finished: int, g: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As a call, of latents whose first `finished` stay as they are; noised are the others, to any level."""
        timesteps = self.timesteps(len(latents) - finished, g)
        noise = torch.randn(latents[finished:].shape, device=latents.device, generator=g)
        noisy, clean, angle = self(latents[finished:], timesteps, ids[finished:], noise)
        whole = latents[:finished]
        return torch.cat([whole, noisy]), torch.cat([whole, clean]), torch.cat([angle.new_zeros(finished), angle])
