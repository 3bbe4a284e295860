"""Latents of a data set, encoded once in several augmented versions, and how near samples come to them."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from minim_pipeline import resolve_modality
from minim_pipeline.data.image_loading import check_values, key_of, load_images
from minim_pipeline.data.image_reader import reading_of, tell
from minim_pipeline.disk import count_bytes, whole_file
from minim_pipeline.evaluation.memorisation import copy_share, nearest_distances
from minim_pipeline.training.common import hold_images, step_generator
from minim_pipeline.training.rows import mirrored, tell_mirrored


class Latents:
    """Means and standard deviations of the autoencoder's posterior: both [N, versions, C, h, w], half precision.

    The first version of an image is the image itself.
    """

    def __init__(self, mean: torch.Tensor, std: torch.Tensor, scale: float, shift: float):
        self.mean, self.std, self.scale, self.shift = mean, std, scale, shift

    @classmethod
    def encode(cls, args, accelerator: Accelerator, vae: AutoencoderKL, rows, name: str, versions: int) -> "Latents":
        """Encodes `rows`; every process encodes its share and reads the others' from `output_dir`.

        A run that is resumed finds the latents on disk, and so trains on the very same ones.
        """
        folder, world = Path(args.output_dir), accelerator.num_processes
        folder.mkdir(parents=True, exist_ok=True)
        key = {"versions": versions, "resolution": args.resolution, "seed": args.seed}
        key["images"] = key_of(rows, args.train_data, reading_of(args))
        may_mirror = mirrored(rows, args.no_mirror)
        if versions > 1:
            tell_mirrored(f"{args.train_data} ({name})", rows, may_mirror)
        key["mirrored"] = hashlib.sha256(bytes(may_mirror)).hexdigest()
        digest = hashlib.sha256()
        for tensor in vae.state_dict().values():
            digest.update(tensor.cpu().numpy().tobytes())
        key["vae"], key["mixed_precision"] = digest.hexdigest(), args.mixed_precision
        key = {"key": json.dumps(key)}

        def file(rank):
            return folder / f"latents-{name}-{rank}-of-{world}.safetensors"

        mine, changes = file(accelerator.process_index), Counter()
        if not (mine.is_file() and safe_open(mine, "pt").metadata() == key):
            if mine.is_file():
                print(f"{mine.name} is of other images, rows or settings: encoded anew")
            part = cls._encode(args, accelerator, vae, rows, may_mirror, versions, changes)
            with whole_file(mine, count_bytes(part)) as unfinished:
                save_file(dict(zip(("mean", "std"), part, strict=True)), unfinished, metadata=key)
        accelerator.wait_for_everyone()
        changes = sum(gather_object([changes]), Counter())
        if changes and accelerator.is_main_process:
            tell(changes, len(rows), args.train_data, reading_of(args))
        mean = std = None
        for rank in range(world):
            with safe_open(file(rank), "pt") as stored:
                if mean is None:
                    shape = (len(rows), *stored.get_slice("mean").get_shape()[1:])
                    mean, std = torch.empty(shape, dtype=torch.half), torch.empty(shape, dtype=torch.half)
                mean[rank::world], std[rank::world] = stored.get_tensor("mean"), stored.get_tensor("std")
        held = [hold_images(t, accelerator.device) for t in (mean, std)]
        return cls(*held, vae.config.scaling_factor, vae.config.shift_factor or 0.0)

    @staticmethod
    @torch.no_grad()
    def _encode(args, accelerator, vae, every, may_mirror, versions, changes) -> tuple[torch.Tensor, torch.Tensor]:
        device, reading = accelerator.device, reading_of(args)
        share = slice(accelerator.process_index, None, accelerator.num_processes)
        rows = every[share]
        # Of all rows, so that the shares of all processes are scaled alike.
        found = check_values([(every, args.train_data)], reading)
        images = load_images(rows, args.train_data, args.resolution, changes=changes, found=found, reading=reading)
        may_mirror = torch.tensor(may_mirror[share], device=device)
        generator = step_generator(args.seed, 2**31, accelerator.process_index, device)
        means, stds = [], []
        parts = tqdm(range(0, len(rows), 16), desc="encoding", disable=not accelerator.is_local_main_process)
        for start in parts:
            x = images[start : start + 16].to(device).float() / 255
            mean, std = [], []
            for version in range(versions):
                y = augment(x, may_mirror[start : start + 16], version, generator) if version else x
                with accelerator.autocast():
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
        grid = F.affine_grid(theta, x.shape, align_corners=False)
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
    samples: dict[str, torch.Tensor], val: torch.Tensor, val_names, train: Latents, train_rows
) -> float:
    """Share of samples that lie nearer to a training image than the nearest 1 % of val images of their modality do.

    On latents [N, C, h, w] averaged over 2 x 2, where a copy stays near even if its noise differs. Samples of a
    modality without training images do not count; 0 if there are no others.
    """
    copies = total = 0
    names = [resolve_modality(row["modality"]).id for row in train_rows]

    def features(latents):
        return F.avg_pool2d(latents.float(), 2).flatten(1)

    for name, latents in samples.items():
        mine = torch.tensor([i for i, n in enumerate(names) if n == name])
        if not len(mine):
            continue
        references = train.mean[mine.to(train.mean.device)].flatten(0, 1).to(latents.device)
        references = features((references.float() - train.shift) * train.scale)
        real = features(val[[i for i, n in enumerate(val_names) if n == name]].to(latents.device))
        mean = references.mean(0)
        distances = [nearest_distances(queries, references, mean)[0] for queries in (features(latents), real)]
        share, _ = copy_share(*distances)
        copies += share * len(latents)
        total += len(latents)
    return round(copies / max(1, total), 4)
