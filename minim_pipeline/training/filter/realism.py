"""Real images against generated ones: what the head's realism learns from, and how well it tells them apart.

The logit of a discriminator that is shown both alike often is the log ratio of their densities, by which Discriminator
Rejection Sampling chooses (arXiv 1810.06758), here at every noise level (DiffRS, arXiv 2405.17880). So that nothing
but the generator makes a difference, real images go the way of generated ones: a sample of the autoencoder's
posterior, as the U-Net learns them, is decoded to a picture of 8 bits, and versions of the picture are encoded again.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ... import MinimPipeline
from ...cache import cached_tensors
from ...data.image_loading import key_of
from ...data.mapped_images import IMAGES, map_images
from ...evaluation.judges import class_of
from ...evaluation.sampling import batches, bytes_of, decode_latents, draw_latents
from ...loading import model_identity
from ...mapped import Rows
from ...minim_filter import FilterHead
from ...tokens import tokenize
from ..rows import mirrored
from .config import FilterConfig
from .copies import share
from .data import Drawn, encode, versions
from .estimates import NoisedEstimates
from .report import LEVELS, rate, rate_at, separations, text_of


@dataclass
class Counterparts:
    """Latents of real and of generated pictures, the latter drawn for captions of such real ones."""

    latents: torch.Tensor  # half [R, C, h, w], scaled as the U-Net takes them
    real: torch.Tensor  # bool [R]
    label: torch.Tensor  # int64 [R], the class of the caption, index into the classes
    modality: torch.Tensor  # int64 [R], index into the modalities

    def weights(self) -> torch.Tensor:
        """How often each is drawn: both sides of every modality alike; one of which there is one side is left out."""
        side = 2 * self.modality + self.real
        count = torch.bincount(side, minlength=2 * int(self.modality.max()) + 2)
        return (count.view(-1, 2) > 0).all(1)[self.modality] / count[side]


def decoded_parts(
    pipe: MinimPipeline, latents: torch.Tensor, modalities: Sequence[str], bf16: bool
) -> Iterator[torch.Tensor]:
    """Pictures, uint8 [N, 3, H, W] on the CPU, of latents [N, C, h, w], in parts."""
    for b in batches(len(latents), 64):
        yield bytes_of(decode_latents(pipe, latents[b].to(pipe.device).float(), modalities[b], bf16))


def decode(pipe: MinimPipeline, latents: torch.Tensor, modalities: Sequence[str], bf16: bool) -> torch.Tensor:
    """`decoded_parts` in one."""
    return torch.cat(list(decoded_parts(pipe, latents, modalities, bf16)))


@torch.no_grad()
def posterior_samples(pipe: MinimPipeline, images: Rows, bf16: bool, seed: int) -> torch.Tensor:
    """Latents of images uint8 [N, 3, H, W], as the U-Net learns them: half [N, C, h, w] on the CPU."""
    g, latents = torch.Generator(pipe.device).manual_seed(seed), []
    with torch.autocast(pipe.device.type, torch.bfloat16, enabled=bf16):
        for x in images.split(64):
            posterior = pipe.vae.encode(x.to(pipe.device).float() / 127.5 - 1).latent_dist
            latents.append((posterior.sample(g) * pipe.vae.config.scaling_factor).half().cpu())
    return torch.cat(latents)


def through_autoencoder(pipe: MinimPipeline, rows: list[dict], images: Rows, bf16: bool, seed: int) -> torch.Tensor:
    """What the pipeline would deliver for latents of the images, which are those of the rows: uint8 [N, 3, H, W]."""
    return decode(pipe, posterior_samples(pipe, images, bf16, seed), [row["modality"] for row in rows], bf16)


def load_counterparts(
    config: FilterConfig,
    pipe: MinimPipeline,
    rows: list[dict],
    more: list[dict],
    classes: list[tuple[str, str]],
    drawn: Drawn,
) -> Counterparts:
    """Real images of `rows` and of `more`, and what good samplers drew for captions of `rows`, in several versions.

    Cached in `output_dir`, as the other materials.
    """
    names = list(dict.fromkeys(modality for modality, _ in classes))
    key = {name: getattr(config, name) for name in ("seed", "resolution", "latent_variants", "drawn_images", "bf16")}
    key |= {"model": model_identity(config.pretrained_model_name_or_path)}
    key |= {"rows": [key_of(some, config.train_data, config.reading) for some in (rows, more)]}
    key |= {"mirrored": mirrored(rows + more, config.no_mirror)}

    def side(own: list[dict], latents: torch.Tensor, real: bool) -> list[torch.Tensor]:
        n, parts, modalities = config.latent_variants, [], [row["modality"] for row in own]
        for b in batches(len(own), 2048):  # all pictures would fill the memory
            pictures = decode(pipe, latents[b], modalities[b], config.bf16)
            made = versions(own[b], pictures, n, config.seed + b.start, pipe.device, config.no_mirror)
            parts.append(encode(pipe, made, config.bf16))
        label = torch.tensor([classes.index(class_of(row)) for row in own]).repeat_interleave(n)
        modality = torch.tensor([names.index(class_of(row)[0]) for row in own]).repeat_interleave(n)
        return [torch.cat(parts), torch.full_like(label, real, dtype=torch.bool), label, modality]

    def make() -> dict[str, torch.Tensor]:
        every, good = rows + more, (drawn.quality == 3).nonzero()[:, 0].cpu()
        path = config.output / IMAGES / "realism"
        images = map_images(path, every, config.train_data, config.resolution, reading=config.reading)
        real = side(every, posterior_samples(pipe, images, config.bf16, config.seed), True)
        asked = [rows[i] for i in drawn.row[good].tolist()]
        generated = side(asked, drawn.trajectories.final[good], False)
        both = [torch.cat(pair) for pair in zip(real, generated, strict=True)]
        return vars(Counterparts(*both))

    tensors = cached_tensors(config.output / "realism.safetensors", key, make)
    return Counterparts(**{name: tensor.to(pipe.device) for name, tensor in tensors.items()})


def val_counterparts(
    pipe: MinimPipeline, rows: list[dict], images: Rows, config: FilterConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents [N, C, h, w] of val images, and of what the pipeline draws for their captions at its own settings."""
    texts, modalities = ([row[column] for row in rows] for column in ("Text", "modality"))
    seeds = [(config.seed + 2) * 10**9 + i for i in range(len(rows))]
    drawn = draw_latents(pipe, texts, modalities, seeds, config.draw_batch_size, bf16=config.bf16)
    real = posterior_samples(pipe, images, config.bf16, config.seed)
    pictures = (decoded_parts(pipe, latents, modalities, config.bf16) for latents in (real, drawn))
    of_real, of_drawn = (encode(pipe, parts, config.bf16) for parts in pictures)
    return of_real, of_drawn


def realism_report(
    head: FilterHead,
    estimates: NoisedEstimates,
    rows: list[dict],
    real: torch.Tensor,
    generated: torch.Tensor,
    seed: int,
) -> dict:
    """Real against generated pictures of the same captions, by the log ratio, at several noise levels sigma / alpha.

    By level, of which 0 is the finished image: `auroc` over all, `modalities`, and `n` pictures of each side.
    """
    ids = tokenize(estimates.tokenizer, [text_of(row) for row in rows])
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(seed))
    report = {}
    for level in LEVELS:
        high, low = (rate_at(head, estimates, level, x, ids, noise, "realism") for x in (real, generated))
        report[str(level)] = separations(high, low, [class_of(row)[0] for row in rows]) | {"n": len(rows)}
    return report


def realism_thresholds(
    head: FilterHead, pipe: MinimPipeline, rows: list[dict], images: Rows, passing: float, bf16: bool
) -> tuple[dict[str, float], dict[str, dict]]:
    """By modality the log ratio that a share `passing` of its real images reaches, or more; and what passes.

    Real images go through the autoencoder, as what is rated in use has; what passes of them as they are is told, too.

    Args:
        rows: of images that the head has not learned from.
        images: theirs, uint8 [N, 3, H, W].
    """
    latents = posterior_samples(pipe, images, bf16, seed=0)
    decoded = decoded_parts(pipe, latents, [row["modality"] for row in rows], bf16)
    through, plain = (rate(head, encode(pipe, x, bf16), "realism") for x in (decoded, images))
    modalities, thresholds, figures = [class_of(row)[0] for row in rows], {}, {}
    for name in dict.fromkeys(modalities):
        own = torch.tensor([m == name for m in modalities])
        rejected = math.floor((1 - passing) * int(own.sum()) + 1e-9)
        least = math.floor(through[own].sort().values[min(rejected, int(own.sum()) - 1)].item() * 1e4) / 1e4
        thresholds[name] = least
        figures[name] = {"n": int(own.sum()), "through_autoencoder": share(through[own] >= least)}
        figures[name]["as_they_are"] = share(plain[own] >= least)
    return thresholds, figures
