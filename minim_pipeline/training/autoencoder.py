"""Trains the autoencoder: images of 256 px to latents of 32 x 32 and back.

Nothing that a latent diffusion model makes is sharper than its autoencoder, and a medical image lives by its fine
detail. Three things are asked for at once:

- fidelity: the mean over images of log(MSE), which is PSNR itself (as the PSNR loss of NAFNet, arXiv 2204.04676);
- smoothness of the latents: a KL term (arXiv 1312.6114). With log(MSE) beside it, its weight has a meaning: at the
  optimum the noise of the latents causes `kl_weight / 2` of the squared error;
- sharpness: the reconstruction of least squared error is a conditional mean, and so too smooth: in the highest octave
  it holds as little as a fifth of the image's energy. Of all reconstructions with a given energy there, the one of
  least squared error is the mean with its highest octave scaled up, the stationary point of MSE - lambda * energy. So
  energy is rewarded, but in every image only up to `--target_energy` of its own: what the latents know well, as thin
  bright lines, is not made sharper than it is. It costs a few tenths of a dB. A discriminator's texture, which is not
  the image's, costs more.

Random crops of 128 px train four times as many images. On whole images the group norms see other statistics, which
PSNR hardly feels and sharpness does: a second run, `--freeze_encoder --crop 256`, ends the decoder's training on them.
"""

import math
import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel

from .. import resolve_modality
from ..cli import say
from ..contact_sheet import contact_sheet
from ..data.mapped_images import IMAGES, map_images
from ..disk import save_model
from ..mapped import Rows
from .config import Count, DataOptions, RunOptions, Share, Weight, option
from .hub import push_parts
from .memory import hold
from .rows import read_splits
from .run import Run


_MINIM = dict(block_out_channels=(32, 64, 128, 128), layers_per_block=2, norm_num_groups=16)
PRESETS = {
    # The embedded model's: 5.1 M parameters, no attention (so that crops and whole images see the same network).
    "minim-256": dict(_MINIM, latent_channels=8),
    "minim-256-4ch": dict(_MINIM, latent_channels=4),
    # For tests: trains in seconds on a CPU.
    "tiny": dict(block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4),
}


@dataclass(kw_only=True)
class AutoencoderConfig(DataOptions, RunOptions):
    """Options of the autoencoder's training."""

    pretrained_model_name_or_path: str | None = option(None, "Start from the `vae` of this pipeline (SD-1.x, minim).")
    preset: Literal["minim-256", "minim-256-4ch", "tiny"] = option("minim-256", "Shape of a new autoencoder.")
    freeze_encoder: bool = option(False, "Train the decoder only: latents, and what was trained on them, stay valid.")
    crop: Count = option(128, "Side of the random crops in pixels.")
    kl_weight: Weight = 0.02
    target_energy: Weight = option(0.9, "Energy in the highest octave, of the original's.")
    sharpening: Weight = option(0.8, "Its weight, lambda; 0: fidelity only.")
    sharpen_from: Share = option(0.3, "Share of the run after which it is asked for.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.freeze_encoder and not self.pretrained_model_name_or_path:
            raise ValueError("--freeze_encoder needs --pretrained_model_name_or_path, whose encoder is kept.")
        if self.crop % 32 or not 32 <= self.crop <= self.resolution:
            raise ValueError(f"--crop has to be a multiple of 32 and at most --resolution, got {self.crop}.")
        if not self.sharpening < 1:
            raise ValueError(
                f"--sharpening has to be in [0, 1): at 1 energy grows without end; got {self.sharpening}."
            )


def new_autoencoder(preset: str, resolution: int) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=resolution,
        scaling_factor=1.0,
        mid_block_add_attention=False,
        force_upcast=False,
        **PRESETS[preset],
    )


class Reconstruct(nn.Module):
    """Encoder, noise, decoder in one forward, which is what is compiled and distributed."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, x: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        frozen = not self.vae.encoder.conv_in.weight.requires_grad
        with torch.no_grad() if frozen else nullcontext():
            posterior = self.vae.encode(x).latent_dist  # x [B, 3, H, W] in [-1, 1]
        mean, std = posterior.mean.float(), posterior.std.float()  # [B, C, H/8, W/8]
        y = self.vae.decode((mean + std * noise).to(x.dtype)).sample
        kl = 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).mean()
        return y.float(), kl


def draw_batch(images, index, crop, generator, device, mirror: bool = True) -> torch.Tensor:
    """Random crops, half of them mirrored if `mirror`, with a mild change of gamma: [B, 3, crop, crop] in [-1, 1]."""
    batch, size = len(index), images.shape[-1]

    def uniform(low, high):
        return torch.rand(batch, device=generator.device, generator=generator) * (high - low) + low

    top = (uniform(0, 1) * (size - crop + 1)).long().to(device)
    left = (uniform(0, 1) * (size - crop + 1)).long().to(device)
    span = torch.arange(crop, device=device)
    rows, columns = (top[:, None] + span)[:, None, :, None], (left[:, None] + span)[:, None, None, :]
    channels = torch.arange(3, device=device)[None, :, None, None]
    whole = images[index.to(images.device)].to(device)  # [B, 3, size, size]
    x = whole[torch.arange(batch, device=device)[:, None, None, None], channels, rows, columns].float() / 255
    turned = (uniform(0, 1).to(device) < 0.5) & mirror
    x = torch.where(turned[:, None, None, None], x.flip(-1), x)
    gamma = uniform(-0.2, 0.2).exp().to(device)[:, None, None, None]
    return x.clamp(min=1e-4) ** gamma * 2 - 1


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
    vae: AutoencoderKL, images: Rows, modalities: list[str], batch_size: int = 32
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
def normalise_latents(vae: AutoencoderKL, images: Rows, batch_size: int = 64) -> None:
    """Makes the latents of `images` zero-mean and of unit variance in every channel, without changing the images.

    The affine map is folded into the 1 x 1 convolutions on both sides of the latents, so that `scaling_factor` is 1
    and no code that uses the autoencoder has to know of it.
    """
    # Of the posterior's means their mean and the squares from it, and the sum of variances: [C] each.
    centre, spread, variance = torch.zeros(3, vae.config.latent_channels, dtype=torch.float64, device=vae.device)
    count = 0
    for part in images.split(batch_size):
        posterior = vae.encode(part.to(vae.device).float() / 127.5 - 1).latent_dist
        x = posterior.mean.double().transpose(0, 1).flatten(1)  # [C, pixels]
        # As Chan, Golub and LeVeque (1979) put the parts together.
        apart, share = x.mean(1) - centre, x.shape[1] / (count + x.shape[1])
        centre = centre + apart * share
        spread = spread + x.var(1, unbiased=False) * x.shape[1] + apart.square() * count * share
        variance = variance + posterior.var.double().sum((0, 2, 3))
        count += x.shape[1]
    mean = centre.float()
    std = (spread / (count - 1) + variance / count).sqrt().float()
    channels = len(mean)
    out, back = vae.quant_conv, vae.post_quant_conv  # [2C, 2C, 1, 1] and [C, C, 1, 1]
    out.weight[:channels] /= std[:, None, None, None]
    out.bias[:channels] = (out.bias[:channels] - mean) / std
    out.bias[channels:] -= 2 * std.log()  # the log variance
    back.bias += back.weight[:, :, 0, 0] @ mean
    back.weight *= std[None, :, None, None]


class Trainer:
    """The autoencoder and its optimizer in a run: set up, a step, a validation, the end."""

    def __init__(self, config: AutoencoderConfig, run: Run):
        self.config, self.run = config, run
        torch.backends.cudnn.benchmark = True
        self.read_images()
        if config.pretrained_model_name_or_path:
            self.vae = AutoencoderKL.from_pretrained(config.pretrained_model_name_or_path, subfolder="vae")
        else:
            self.vae = new_autoencoder(config.preset, config.resolution)
        if config.gradient_checkpointing:
            self.vae.enable_gradient_checkpointing()
        if config.freeze_encoder:
            self.vae.encoder.requires_grad_(False)
            self.vae.quant_conv.requires_grad_(False)
        self.weights = [p for p in self.vae.parameters() if p.requires_grad]
        self.ema = EMAModel(self.weights, decay=config.ema_decay, use_ema_warmup=True, foreach=True)
        self.ema.to(run.device)
        decay, fused = config.adam_weight_decay, run.device.type == "cuda"
        optimizer = torch.optim.AdamW(self.weights, config.learning_rate, (0.9, 0.99), weight_decay=decay, fused=fused)
        self.reconstruct, self.optimizer = run.accelerator.prepare(Reconstruct(self.vae), optimizer)
        if config.compile:
            self.vae.encoder.compile(dynamic=False)
            self.vae.decoder.compile(dynamic=False)
        run.begin(self.ema)
        self.vae.train()

    def read_images(self) -> None:
        config = self.config
        train_rows, self.val_rows = read_splits(config)
        if not config.no_mirror:
            say(f"{config.train_data}: all {len(train_rows)} images may be mirrored: no caption is learned.")
        load = partial(map_images, trim=False, reading=config.reading)
        train, val = (config.output / IMAGES / name for name in ("train", "val"))
        self.images = hold(load(train, train_rows, config.train_data, config.resolution), self.run.device)
        if self.val_rows:
            self.val_images = load(val, self.val_rows, config.train_data, config.resolution)
            self.val_names = [resolve_modality(row["modality"]).id for row in self.val_rows]

    def step(self) -> dict[str, torch.Tensor]:
        config, run, device = self.config, self.run, self.run.device
        generator, batch = run.generator(), config.train_batch_size
        index = torch.randint(len(self.images), (batch,), device=device, generator=generator)
        x = draw_batch(self.images, index, config.crop, generator, device, not config.no_mirror)  # [B, 3, crop, crop]
        shape = (batch, self.vae.config.latent_channels, config.crop // 8, config.crop // 8)
        noise = torch.randn(shape, device=device, generator=generator)
        run.schedule.set_learning_rates(self.optimizer, [config.learning_rate], config.lr_warmup_steps)

        y, kl = self.reconstruct(x, noise)
        mse = ((y - x) / 2).square().mean((1, 2, 3))  # [B]
        wanted = config.target_energy * highest_octave(x)  # [B]
        energy = torch.minimum(highest_octave(y), wanted)
        weight = config.sharpening if run.schedule.progress >= config.sharpen_from else 0.0
        # Divided by its own value the loss has the gradient of log(MSE); past 50 dB there is nothing to gain.
        fidelity = ((mse - weight * energy / 4) / (mse.detach() + 1e-5)).mean()
        loss = fidelity + config.kl_weight * kl
        run.accelerator.backward(loss)
        run.accelerator.clip_grad_norm_(self.weights, config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.weights)
        short = (energy < wanted).float().mean()  # share of images that have less energy than is wanted
        psnr = -4.343 * mse.detach().log().mean()
        return {"loss": loss.detach(), "psnr": psnr, "kl": kl.detach(), "short": short}

    def validate(self) -> None:
        """Of the averaged weights, in full precision, by the main process."""
        if self.val_rows and self.run.is_main:
            self.ema.store(self.weights)
            self.ema.copy_to(self.weights)
            self.vae.eval()
            with torch.compiler.set_stance("force_eager"):  # not worth compiling for
                self.run.log.write("val", **reconstruction_figures(self.vae, self.val_images, self.val_names))
                chosen = torch.linspace(0, len(self.val_images) - 1, min(10, len(self.val_images))).long()
                save_pairs(self.vae, self.val_images[chosen], self.run.output / "pairs.png")
            self.ema.restore(self.weights)
            self.vae.train()
        self.run.accelerator.wait_for_everyone()

    def finish(self) -> None:
        """Writes the averaged weights, by the main process."""
        if self.run.is_main:
            self.ema.copy_to(self.weights)
            self.vae.eval()
            with torch.compiler.set_stance("force_eager"):
                # That of a Stable Diffusion keeps its latents, and so does one whose encoder is frozen.
                if self.vae.config.scaling_factor == 1.0 and not self.config.freeze_encoder:
                    normalise_latents(self.vae, self.images)
                save_model(self.vae, self.run.output / "vae")
                if self.val_rows:
                    figures = reconstruction_figures(self.vae, self.val_images, self.val_names)
                    self.run.log.write("final", **figures)
            shutil.rmtree(self.run.output / IMAGES)
        self.run.finish()


def train(config: AutoencoderConfig) -> None:
    """Trains the autoencoder, and writes it to `vae/` in `--output_dir`; raises as `Run.open`."""
    with Run.open(config, "minim-autoencoder") as run:
        if not run.finished:
            trainer = Trainer(config, run)
            run.train(trainer.step, trainer.validate)
            trainer.finish()
        if run.is_main:
            push_parts(config, "train_autoencoder", config.output / "vae")
