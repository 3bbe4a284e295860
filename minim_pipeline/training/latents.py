"""Latents of a data set, encoded once in several augmented versions, and how near samples come to them."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from ..data.image_loading import check_values, key_of, load_images
from ..data.image_reader import tell
from ..disk import count_bytes, whole_file
from ..evaluation.memorisation import copy_share, nearest_distances
from .config import DataOptions
from .memory import fits
from .randomness import step_generator
from .rows import mirrored, tell_mirrored
from .run import Run


PIXELS_AT_ONCE = 2**22  # that are encoded together: 64 images of 256 px, 16 of 512


class Latents:
    """Means and standard deviations of the autoencoder's posterior: both [N, versions, C, h, w], half precision.

    The first version of an image is the image itself.
    """

    def __init__(self, mean: torch.Tensor, std: torch.Tensor, scale: float, shift: float):
        self.mean, self.std, self.scale, self.shift = mean, std, scale, shift

    @classmethod
    def encode(
        cls, run: Run, vae: AutoencoderKL, data: DataOptions, rows: list[dict], name: str, versions: int
    ) -> "Latents":
        """Encodes `rows`; every process encodes its share and reads the others' from the folder of the run.

        A run that is resumed finds the latents on disk, and so trains on the very same ones.

        Args:
            data: the CSV, and how its images are read.
            name: of the files, beside the share that they hold.
            versions: of every image, the first unchanged.

        Raises:
            ValueError: the autoencoder is broken, or as `load_images`.
        """
        accelerator, world = run.accelerator, run.accelerator.num_processes
        run.output.mkdir(parents=True, exist_ok=True)
        may_mirror = mirrored(rows, data.no_mirror)
        if versions > 1:
            tell_mirrored(f"{data.train_data} ({name})", rows, may_mirror)
        digest = hashlib.sha256()
        for tensor in vae.state_dict().values():
            digest.update(tensor.cpu().numpy().tobytes())
        settings = {
            "versions": versions,
            "resolution": data.resolution,
            "seed": run.config.seed,
            "images": key_of(rows, data.train_data, data.reading),
            "mirrored": hashlib.sha256(bytes(may_mirror)).hexdigest(),
            "vae": digest.hexdigest(),
            "mixed_precision": run.config.mixed_precision,
        }
        key = {"key": json.dumps(settings)}
        files = [run.output / f"latents-{name}-{rank}-of-{world}.safetensors" for rank in range(world)]
        own = files[run.rank]
        changes: Counter[str] = Counter()
        if not (own.is_file() and safe_open(own, "pt").metadata() == key):
            if own.is_file():
                print(f"{own.name} is of other images, rows or settings: encoded anew")
            part = cls._encode_share(run, vae, data, rows, may_mirror, versions, changes)
            with whole_file(own, count_bytes(part)) as unfinished:
                save_file(dict(zip(("mean", "std"), part, strict=True)), unfinished, metadata=key)
        accelerator.wait_for_everyone()
        changes = sum(gather_object([changes]), Counter())
        if changes and run.is_main:
            tell(changes, len(rows), data.train_data, data.reading)
        mean, std = (hold_images(tensor, run.device) for tensor in cls._read(files, len(rows)))
        return cls(mean, std, vae.config.scaling_factor, vae.config.shift_factor or 0.0)

    @staticmethod
    def _read(files: list[Path], count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Means and standard deviations of `count` rows, of which each file holds every `len(files)`-th."""
        for rank, file in enumerate(files):
            part = load_file(file)
            if rank == 0:
                shape = (count, *part["mean"].shape[1:])
                mean, std = torch.empty(shape, dtype=torch.half), torch.empty(shape, dtype=torch.half)
            mean[rank :: len(files)], std[rank :: len(files)] = part["mean"], part["std"]
        return mean, std

    @staticmethod
    @torch.no_grad()
    def _encode_share(
        run: Run,
        vae: AutoencoderKL,
        data: DataOptions,
        every: list[dict],
        may_mirror: list[bool],
        versions: int,
        changes: Counter,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        share = slice(run.rank, None, run.accelerator.num_processes)
        rows = every[share]
        # Of all rows, so that the shares of all processes are scaled alike.
        found = check_values([(every, data.train_data)], data.reading)
        images = load_images(
            rows, data.train_data, data.resolution, changes=changes, found=found, reading=data.reading
        )
        flips = torch.tensor(may_mirror[share], device=run.device)
        generator = step_generator(run.config.seed, 2**31, run.rank, run.device)
        means, stds = [], []
        count = max(1, PIXELS_AT_ONCE // data.resolution**2)
        parts = tqdm(range(0, len(rows), count), desc="encoding", disable=not run.accelerator.is_local_main_process)
        for start in parts:
            x = images[start : start + count].to(run.device).float() / 255
            mean, std = [], []
            for version in range(versions):
                y = augment(x, flips[start : start + count], version, generator) if version else x
                with run.accelerator.autocast():
                    posterior = vae.encode(y * 2 - 1).latent_dist
                if not posterior.mean.isfinite().all():
                    raise ValueError("The autoencoder's latents are not finite: it is broken, or overflows.")
                mean.append(posterior.mean.half().cpu())
                std.append(posterior.std.half().cpu())
            means.append(torch.stack(mean, 1))
            stds.append(torch.stack(std, 1))
        return torch.cat(means).contiguous(), torch.cat(stds).contiguous()

    def draw(self, index: torch.Tensor, version: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """A sample of the posterior of each: [B, C, h, w], scaled as the U-Net takes it."""
        where = index.to(self.mean.device), version.to(self.mean.device)
        mean, std = (t[where].to(generator.device).float() for t in (self.mean, self.std))
        noise = torch.randn(mean.shape, device=generator.device, generator=generator)
        return (mean + std * noise - self.shift) * self.scale

    def join(self, other: "Latents") -> "Latents":
        """These, and behind them those of another data set with as many versions."""
        # One may have found room on the device where the other did not.
        device = self.mean.device if self.mean.device == other.mean.device else torch.device("cpu")
        pairs = (self.mean, other.mean), (self.std, other.std)
        mean, std = (torch.cat([part.to(device) for part in pair]) for pair in pairs)
        return Latents(mean, std, self.scale, self.shift)

    def plain(self) -> torch.Tensor:
        """The posterior's means of the images themselves, scaled: [N, C, h, w]."""
        return (self.mean[:, 0].float() - self.shift) * self.scale


def augment(x: torch.Tensor, may_mirror: torch.Tensor, version: int, generator: torch.Generator) -> torch.Tensor:
    """Mild changes that leave the diagnosis alone; x is [B, 3, H, W] in [0, 1].

    Even versions are only shifted by whole pixels: resampling costs sharpness, and the model must not learn that all
    images are a little soft. Odd versions are turned by up to 4 degrees and enlarged by up to 10 %.
    """
    batch, device, size = len(x), x.device, x.shape[-1]

    def uniform(low, high):
        return torch.rand(batch, device=device, generator=generator) * (high - low) + low

    mirror = may_mirror & (uniform(0, 1) < 0.5)
    x = torch.where(mirror[:, None, None, None], x.flip(-1), x)
    turn, zoom = uniform(-0.07, 0.07), uniform(0.9, 1.0)
    dx, dy = uniform(-1, 1), uniform(-1, 1)
    if version % 2:
        margin = 1 - zoom
        rows = (
            [zoom * turn.cos(), -zoom * turn.sin(), dx * margin],
            [zoom * turn.sin(), zoom * turn.cos(), dy * margin],
        )
        theta = torch.stack([torch.stack(row, 1) for row in rows], 1)  # [B, 2, 3]
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        x = F.grid_sample(x, grid, mode="bicubic", padding_mode="reflection", align_corners=False).clamp(0, 1)
    else:
        reach = size // 32
        padded = F.pad(x, (reach,) * 4, mode="replicate")
        top, left = (((d + 1) * reach).round().long()[:, None] + torch.arange(size, device=device) for d in (dy, dx))
        channels = torch.arange(3, device=device)[None, :, None, None]
        where = torch.arange(batch, device=device)[:, None, None, None]
        x = padded[where, channels, top[:, None, :, None], left[:, None, None, :]]
    return x.clamp(min=1e-4) ** uniform(-0.15, 0.15).exp()[:, None, None, None]


def memorised_share(
    samples: dict[str, torch.Tensor],
    val: torch.Tensor,
    val_names: list[str],
    train: Latents,
    train_names: list[str],
) -> float:
    """Share of samples that lie nearer to a training image than the nearest 1 % of val images of their modality do.

    On latents [N, C, h, w] averaged over 2 x 2, where a copy stays near even if its noise differs. Samples of a
    modality without training images do not count; 0 if there are no others.

    Args:
        samples: by modality.
        val_names, train_names: the modality of each val and train image.
    """
    copies, total = 0.0, 0

    def features(latents: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(latents.float(), 2).flatten(1)

    for name, latents in samples.items():
        learned = torch.tensor([i for i, n in enumerate(train_names) if n == name])
        if not len(learned):
            continue
        references = train.mean[learned.to(train.mean.device)].flatten(0, 1).to(latents.device)
        references = features((references.float() - train.shift) * train.scale)
        real = features(val[[i for i, n in enumerate(val_names) if n == name]].to(latents.device))
        mean = references.mean(0)
        drawn, held_out = (nearest_distances(x, references, mean)[0] for x in (features(latents), real))
        share, _ = copy_share(drawn, held_out)
        copies += share * len(latents)
        total += len(latents)
    return round(copies / max(1, total), 4)


def hold_images(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Keeps the images on the device if they fit, else where they are."""
    return images.to(device) if fits(images.nbytes, device) else images
