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

    accelerate launch train/train_autoencoder.py --train_data data.csv --output_dir runs/autoencoder \
        --mixed_precision bf16 --compile
"""

import argparse
import math
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel
from PIL import Image

from minim_pipeline import resolve_modality
from minim_pipeline.cli import say
from minim_pipeline.data.image_loading import load_images
from minim_pipeline.data.image_reader import reading_of
from minim_pipeline.disk import save_model
from minim_pipeline.training.arguments import check_numbers, check_shares
from minim_pipeline.training.checkpoints import find_checkpoint, is_finished, note_finished
from minim_pipeline.training.common import (
    Log,
    Schedule,
    add_common_arguments,
    check_common_arguments,
    hold_images,
    note_arguments,
    own_folder,
    read_splits,
    start_trackers,
    step_generator,
)
from minim_pipeline.training.hub import push_parts
from minim_pipeline.training.run import Run


PRESETS = {
    # The embedded model's: 5.1 M parameters, no attention (so that crops and whole images see the same network).
    "minim-256": dict(
        block_out_channels=(32, 64, 128, 128), layers_per_block=2, latent_channels=8, norm_num_groups=16
    ),
    "minim-256-4ch": dict(
        block_out_channels=(32, 64, 128, 128), layers_per_block=2, latent_channels=4, norm_num_groups=16
    ),
    # For tests: trains in seconds on a CPU.
    "tiny": dict(block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4),
}


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    model = parser.add_argument_group("model")
    model.add_argument(
        "--pretrained_model_name_or_path", help="Start from the `vae` of this pipeline (SD-1.x, minim)."
    )
    model.add_argument("--preset", choices=sorted(PRESETS), default="minim-256", help="Shape of a new autoencoder.")
    model.add_argument(
        "--freeze_encoder",
        action="store_true",
        help="Train the decoder only: latents, and what was trained on them, stay valid.",
    )
    loss = parser.add_argument_group("loss")
    loss.add_argument("--crop", type=int, default=128, help="Side of the random crops in pixels.")
    loss.add_argument("--kl_weight", type=float, default=0.02)
    loss.add_argument(
        "--target_energy", type=float, default=0.9, help="Energy in the highest octave, of the original's."
    )
    loss.add_argument("--sharpening", type=float, default=0.8, help="Its weight, lambda; 0: fidelity only.")
    loss.add_argument("--sharpen_from", type=float, default=0.3, help="Share of the run after which it is asked for.")
    args = parser.parse_args(argv)
    check_numbers(parser, args, from_zero=("seed", "lr_warmup_steps"))
    check_common_arguments(args)
    check_shares(args, "sharpen_from")
    if args.freeze_encoder and not args.pretrained_model_name_or_path:
        raise ValueError("--freeze_encoder needs --pretrained_model_name_or_path, whose encoder is kept.")
    if args.crop % 32 or not 32 <= args.crop <= args.resolution:
        raise ValueError(f"--crop has to be a multiple of 32 and at most --resolution, got {args.crop}.")
    if not 0 <= args.sharpening < 1:
        raise ValueError(f"--sharpening has to be in [0, 1): at 1 energy grows without end; got {args.sharpening}.")
    return args


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


def draw_batch(images, index, crop, generator, device, mirror: bool = True) -> torch.Tensor:
    """Random crops, half of them mirrored if `mirror`, with a mild change of gamma: [B, 3, crop, crop] in [-1, 1]."""
    batch, size = len(index), images.shape[-1]

    def uniform(low, high):
        return torch.rand(batch, device=generator.device, generator=generator) * (high - low) + low

    top = (uniform(0, 1) * (size - crop + 1)).long().to(images.device)
    left = (uniform(0, 1) * (size - crop + 1)).long().to(images.device)
    span = torch.arange(crop, device=images.device)
    rows, columns = (top[:, None] + span)[:, None, :, None], (left[:, None] + span)[:, None, None, :]
    channels = torch.arange(3, device=images.device)[None, :, None, None]
    x = images[index.to(images.device)[:, None, None, None], channels, rows, columns].to(device).float() / 255
    turned = (uniform(0, 1).to(device) < 0.5) & mirror
    x = torch.where(turned[:, None, None, None], x.flip(-1), x)
    gamma = uniform(-0.2, 0.2).exp().to(device)[:, None, None, None]
    return x.clamp(min=1e-4) ** gamma * 2 - 1


@torch.no_grad()
def validate(vae: AutoencoderKL, images: torch.Tensor, modalities: list[str], batch_size: int = 32) -> dict:
    """Mean PSNR in dB and ratio of the energy in the highest octave, of all images and per modality."""
    device = next(vae.parameters()).device
    psnr, energy = [], []
    for part in images.split(batch_size):
        x = part.to(device).float() / 127.5 - 1
        y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
        psnr += (-10 * torch.log10(((y - x) / 2).square().mean((1, 2, 3)))).tolist()
        energy += torch.stack([highest_octave(y), highest_octave(x)], 1).tolist()
    psnr, energy, modalities = np.array(psnr), np.array(energy), np.array(modalities)
    figures = {"psnr": round(float(psnr.mean()), 3)}
    for name in dict.fromkeys(modalities):
        mine = modalities == name
        figures[f"psnr_{name}"] = round(float(psnr[mine].mean()), 3)
        figures[f"energy_{name}"] = round(float(energy[mine, 0].sum() / energy[mine, 1].sum()), 3)
    return figures


def save_pairs(vae: AutoencoderKL, images: torch.Tensor, path: Path) -> None:
    """A sheet with originals above reconstructions. It shows real images: for looking at, not for publishing."""
    device = next(vae.parameters()).device
    with torch.no_grad():
        x = images.to(device).float() / 127.5 - 1
        y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
    sheet = torch.cat([torch.cat(list(x), 2), torch.cat(list(y), 2)], 1)  # [3, 2H, nW]
    Image.fromarray(((sheet + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()).save(path)


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, images: torch.Tensor, batch_size: int = 64) -> None:
    """Makes the latents of `images` zero-mean and of unit variance in every channel, without changing the images.

    The affine map is folded into the 1 x 1 convolutions on both sides of the latents, so that `scaling_factor` is 1
    and no code that uses the autoencoder has to know of it.
    """
    device = next(vae.parameters()).device
    means, variances = [], []
    for part in images.split(batch_size):
        posterior = vae.encode(part.to(device).float() / 127.5 - 1).latent_dist
        means.append(posterior.mean.double().transpose(0, 1).flatten(1))
        variances.append(posterior.var.double().transpose(0, 1).flatten(1))
    means, variances = torch.cat(means, 1), torch.cat(variances, 1)  # [C, pixels]
    mean = means.mean(1).float()
    std = (means.var(1) + variances.mean(1)).sqrt().float()
    channels = len(mean)
    out, back = vae.quant_conv, vae.post_quant_conv  # [2C, 2C, 1, 1] and [C, C, 1, 1]
    out.weight[:channels] /= std[:, None, None, None]
    out.bias[:channels] = (out.bias[:channels] - mean) / std
    out.bias[channels:] -= 2 * std.log()  # the log variance
    back.bias += back.weight[:, :, 0, 0] @ mean
    back.weight *= std[None, :, None, None]


def main(argv=None) -> None:
    args = parse_args(argv)
    with own_folder(args):
        train(args)


def train(args: argparse.Namespace) -> None:
    """Trains, validates and writes the autoencoder; `--output_dir` is this run's alone."""
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision, log_with=args.report_to, project_dir=args.output_dir
    )
    if is_finished(args):
        if accelerator.is_main_process:
            push_parts(args, "train_autoencoder", Path(args.output_dir) / "vae")
        return
    checkpoint = find_checkpoint(args)
    set_seed(args.seed)
    device, rank = accelerator.device, accelerator.process_index
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True

    train_rows, val_rows = read_splits(args)
    if not args.no_mirror:
        say(f"{args.train_data}: all {len(train_rows)} images may be mirrored: no caption is learned.")
    load = partial(load_images, trim=False, reading=reading_of(args))
    images = hold_images(load(train_rows, args.train_data, args.resolution), device)
    if val_rows:
        val_images = load(val_rows, args.train_data, args.resolution)
        val_names = [resolve_modality(row["modality"]).id for row in val_rows]

    if args.pretrained_model_name_or_path:
        vae = AutoencoderKL.from_pretrained(args.pretrained_model_name_or_path, subfolder="vae")
    else:
        vae = new_autoencoder(args.preset, args.resolution)
    if args.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    if args.freeze_encoder:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    trained = [p for p in vae.parameters() if p.requires_grad]
    ema = EMAModel(trained, decay=args.ema_decay, use_ema_warmup=True, foreach=True)
    ema.to(device)
    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        trained, args.learning_rate, betas=(0.9, 0.99), weight_decay=args.adam_weight_decay, fused=fused
    )
    reconstruct, optimizer = accelerator.prepare(Reconstruct(vae), optimizer)
    if args.compile:
        vae.encoder.compile(dynamic=False)
        vae.decoder.compile(dynamic=False)
    schedule = Schedule(args.max_train_steps, args.max_train_minutes)
    accelerator.register_for_checkpointing(ema, schedule)
    if checkpoint:
        accelerator.load_state(str(checkpoint))
        ema.to(device)
    if accelerator.is_main_process:
        note_arguments(args, checkpoint)
    start_trackers(accelerator, "minim-autoencoder", args)
    log = Log(accelerator, args.output_dir, schedule, args.train_batch_size * accelerator.num_processes)

    def evaluate() -> None:
        """Of the averaged weights, in full precision, by the main process."""
        if val_rows and accelerator.is_main_process:
            ema.store(trained)
            ema.copy_to(trained)
            vae.eval()
            with torch.compiler.set_stance("force_eager"):  # not worth compiling for
                log.write("val", **validate(vae, val_images, val_names))
                shown = torch.linspace(0, len(val_images) - 1, min(10, len(val_images))).long()
                save_pairs(vae, val_images[shown], Path(args.output_dir) / "pairs.png")
            ema.restore(trained)
            vae.train()
        accelerator.wait_for_everyone()

    batch = args.train_batch_size
    latents_shape = (batch, vae.config.latent_channels, args.crop // 8, args.crop // 8)
    vae.train()

    def train_step() -> dict[str, torch.Tensor]:
        generator = step_generator(args.seed, schedule.step, rank, device)
        index = torch.randint(len(images), (batch,), device=device, generator=generator)
        x = draw_batch(images, index, args.crop, generator, device, not args.no_mirror)
        noise = torch.randn(latents_shape, device=device, generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(args.learning_rate, args.lr_warmup_steps)

        y, kl = reconstruct(x, noise)
        mse = ((y - x) / 2).square().mean((1, 2, 3))
        wanted = args.target_energy * highest_octave(x)
        energy = torch.minimum(highest_octave(y), wanted)
        weight = args.sharpening if schedule.progress >= args.sharpen_from else 0.0
        # Divided by its own value the loss has the gradient of log(MSE); past 50 dB there is nothing to gain.
        fidelity = ((mse - weight * energy / 4) / (mse.detach() + 1e-5)).mean()
        loss = fidelity + args.kl_weight * kl
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(trained)
        short = (energy < wanted).float().mean()  # share of images that have less energy than is wanted
        shown = {"psnr": -4.343 * mse.detach().log().mean(), "kl": kl.detach(), "short": short}
        return {"loss": loss.detach(), **shown}

    with Run(accelerator, args, schedule, evaluate) as run:
        run.begin()
        while not schedule.done:
            shown = train_step()
            loss = shown.pop("loss")
            schedule.advance(accelerator)
            log.tick(**shown)
            if schedule.step % 200 == 0:
                log.write("train", **{k: round(float(v), 4) for k, v in shown.items()})
            run.end_step(loss)

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        ema.copy_to(trained)
        vae.eval()
        with torch.compiler.set_stance("force_eager"):
            # That of a Stable Diffusion keeps its latents, and so does one whose encoder is frozen.
            if vae.config.scaling_factor == 1.0 and not args.freeze_encoder:
                normalise_latents(vae, images)
            save_model(vae, Path(args.output_dir) / "vae")
            if val_rows:
                log.write("final", **validate(vae, val_images, val_names))
        note_finished(args, schedule)
        push_parts(args, "train_autoencoder", Path(args.output_dir) / "vae")
    accelerator.end_training()


if __name__ == "__main__":
    main()
