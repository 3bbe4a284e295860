"""Latents of a data set, encoded once in several augmented versions, and how near samples come to them."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from functools import cached_property, partial
from typing import cast

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from diffusers import AutoencoderKL
from tqdm.auto import tqdm

from ..data.image_loading import check_values, key_of, load_images
from ..data.image_pixels import Found
from ..data.image_reader import tell
from ..evaluation.memorisation import copy_share, mean_of, nearest_distances
from ..mapped import Computed, MappedTensor, Rows, ahead, map_parts
from .config import DataOptions
from .memory import hold
from .randomness import step_generator
from .rows import mirrored, tell_mirrored
from .run import Run


PIXELS_AT_ONCE = 2**22  # that are encoded together: 64 images of 256 px, 16 of 512
IMAGES_AT_ONCE = 128  # whose versions are looked at together for copies


class Latents:
    """Of the autoencoder's posterior, the mean and the standard deviation of each version of each image.

    As rows they are the means of the images themselves, scaled as the U-Net takes them: [N, C, h, w].

    Args:
        moments: half [N, versions, 2, C, h, w], mean and standard deviation; the first version of an image is the
            image itself.
    """

    def __init__(self, moments: Rows, scale: float, shift: float):
        self.moments, self.scale, self.shift = moments, scale, shift
        self.shape = torch.Size((len(moments), *moments.shape[3:]))

    @classmethod
    def encode(
        cls, run: Run, vae: AutoencoderKL, data: DataOptions, rows: list[dict], name: str, versions: int
    ) -> "Latents":
        """Encodes `rows` to files in the folder of the run, of which every process makes its share.

        A run that is stopped and started again goes on with the next file, and trains on the very same latents. These
        do not depend on the number of processes.

        Args:
            data: the CSV, and how its images are read.
            name: of the files.
            versions: of every image, the first unchanged.

        Raises:
            ValueError: the autoencoder is broken, or as `load_images`.
        """
        run.output.mkdir(parents=True, exist_ok=True)
        encoding = Encoding(run, vae, data, rows, versions)
        if versions > 1:
            tell_mirrored(f"{data.train_data} ({name})", rows, encoding.may_mirror)
        at_once, path = max(1, PIXELS_AT_ONCE // data.resolution**2), run.output / f"latents-{name}"
        moments, other = map_parts(path, encoding.key(), len(rows), at_once, encoding.parts)
        if other:
            print(f"{path.name} is of other images, rows or settings: encoded anew")
        changes: Counter[str] = sum(gather_object([encoding.changes]), Counter())
        if changes and run.is_main:
            tell(changes, len(rows), data.train_data, data.reading)
        return cls(moments, vae.config.scaling_factor, vae.config.shift_factor or 0.0)

    @property
    def on_disk(self) -> bool:
        return isinstance(self.moments, MappedTensor)

    def __len__(self) -> int:
        return len(self.moments)

    def __getitem__(self, index) -> torch.Tensor:
        return (self.moments[index][:, 0, 0].float() - self.shift) * self.scale

    def draw(self, index: torch.Tensor, version: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """A sample of the posterior of each: [B, C, h, w], scaled as the U-Net takes it."""
        place = self.moments.device
        moments = self.moments[index.to(place), version.to(place)]  # [B, 2, C, h, w]
        if generator.device.type == "cuda":
            moments = moments.to(generator.device, non_blocking=True)
        mean, std = moments.float().unbind(1)
        noise = torch.randn(mean.shape, device=generator.device, generator=generator)
        return (mean + std * noise - self.shift) * self.scale

    def join(self, other: "Latents") -> "Latents":
        """These, and behind them those of another data set with as many versions; both as `encode` gives them."""
        moments = cast(MappedTensor, self.moments).join(cast(MappedTensor, other.moments))
        return Latents(moments, self.scale, self.shift)

    def hold(self, device: torch.device) -> "Latents":
        """On the device, if it is another than the CPU and they fit; else where they are."""
        return Latents(hold(self.moments, device), self.scale, self.shift)


class Encoding:
    """How rows are encoded, and in `changes` what had to be done to their images, in words."""

    def __init__(self, run: Run, vae: AutoencoderKL, data: DataOptions, rows: list[dict], versions: int):
        self.run, self.vae, self.data, self.rows, self.versions = run, vae, data, rows, versions
        self.may_mirror = mirrored(rows, data.no_mirror)
        self.changes: Counter[str] = Counter()

    def key(self) -> dict:
        """All that the latents depend on."""
        digest = hashlib.sha256()
        for tensor in self.vae.state_dict().values():
            digest.update(tensor.cpu().numpy().tobytes())
        return {
            "versions": self.versions,
            "resolution": self.data.resolution,
            "seed": self.run.config.seed,
            "images": key_of(self.rows, self.data.train_data, self.data.reading),
            "mirrored": hashlib.sha256(bytes(self.may_mirror)).hexdigest(),
            "vae": digest.hexdigest(),
            "mixed_precision": self.run.config.mixed_precision,
        }

    @cached_property
    def found(self) -> dict[str, Found]:
        """By which all rows are scaled alike."""
        return check_values([(self.rows, self.data.train_data)], self.data.reading)

    def load(self, part: slice) -> torch.Tensor:
        data = self.data
        read = partial(load_images, changes=self.changes, reading=data.reading, found=self.found, progress=False)
        return read(self.rows[part], data.train_data, data.resolution)

    @torch.no_grad()
    def parts(self, parts: list[slice]) -> Iterator[torch.Tensor]:
        """The moments of parts of the rows, in order: half [n, versions, 2, C, h, w] on the CPU.

        Chance goes on from part to part, so what is drawn for those that are left out is drawn, too.
        """
        run, at = self.run, 0
        flips = torch.tensor(self.may_mirror, device=run.device)
        generator = step_generator(run.config.seed, 2**31, 0, run.device)
        bar = tqdm(parts, "encoding", disable=not run.accelerator.is_local_main_process)
        for part, images in zip(bar, ahead(parts, self.load), strict=True):
            size = parts[0].stop - parts[0].start
            while at < part.start:
                for _ in range(1, self.versions):
                    draw_changes(size, generator)
                at += size
            at = part.stop
            yield self.encode(images.to(run.device).float() / 255, flips[part], generator)

    def encode(self, x: torch.Tensor, flips: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The moments of images [n, 3, S, S] in [0, 1]."""
        versions, finite = [], torch.ones((), dtype=torch.bool, device=x.device)
        for version in range(self.versions):
            y = augment(x, flips, version, generator) if version else x
            with self.run.accelerator.autocast():
                posterior = self.vae.encode(y * 2 - 1).latent_dist
            finite &= posterior.mean.isfinite().all()
            versions.append(torch.stack([posterior.mean, posterior.std], 1).half())  # [n, 2, C, h, w]
        if not finite:
            raise ValueError("The autoencoder's latents are not finite: it is broken, or overflows.")
        return torch.stack(versions, 1).cpu()


def draw_changes(batch: int, generator: torch.Generator) -> list[torch.Tensor]:
    """What `augment` draws for a batch: of each image mirror, turn, zoom, shifts along both sides, and gamma."""
    ranges = (0, 1), (-0.07, 0.07), (0.9, 1.0), (-1, 1), (-1, 1), (-0.15, 0.15)
    device = generator.device
    return [torch.rand(batch, device=device, generator=generator) * (high - low) + low for low, high in ranges]


def augment(x: torch.Tensor, may_mirror: torch.Tensor, version: int, generator: torch.Generator) -> torch.Tensor:
    """Mild changes that leave the diagnosis alone; x is [B, 3, H, W] in [0, 1].

    Even versions are only shifted by whole pixels: resampling costs sharpness, and the model must not learn that all
    images are a little soft. Odd versions are turned by up to 4 degrees and enlarged by up to 10 %.
    """
    batch, device, size = len(x), x.device, x.shape[-1]
    mirror, turn, zoom, dx, dy, gamma = draw_changes(batch, generator)
    x = torch.where((may_mirror & (mirror < 0.5))[:, None, None, None], x.flip(-1), x)
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
    return x.clamp(min=1e-4) ** gamma.exp()[:, None, None, None]


def memorised_share(
    samples: dict[str, torch.Tensor],
    val: torch.Tensor | Latents,
    val_names: list[str],
    train: Latents,
    train_names: list[str],
    known: dict[str, tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> float:
    """Share of samples that lie nearer to a training image than the nearest 1 % of val images of their modality do.

    On latents [N, C, h, w] averaged over 2 x 2, where a copy stays near even if its noise differs. Samples of a
    modality without training images do not count; 0 if there are no others.

    Args:
        samples: by modality.
        val_names, train_names: the modality of each val and train image.
        known: by modality, the mean of the train images and the distances of val images to them, which are found once
            and kept there.
    """
    copies, total, known = 0.0, 0, {} if known is None else known

    def features(latents: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(latents.float(), 2).flatten(1)

    for name, latents in samples.items():
        learned = torch.tensor([i for i, n in enumerate(train_names) if n == name])
        if not len(learned):
            continue
        unseen, device = torch.tensor([i for i, n in enumerate(val_names) if n == name]), latents.device

        def reference(part: slice, learned=learned, device=device) -> torch.Tensor:
            """Of each image all versions, one after the other."""
            means = train.moments[learned[part].to(train.moments.device)][:, :, 0].flatten(0, 1).to(device)
            return features((means.float() - train.shift) * train.scale)

        def held_out(part: slice, unseen=unseen, device=device) -> torch.Tensor:
            return features(val[unseen[part]].to(device))

        references = Computed(len(learned), reference)
        if name not in known:
            mean = mean_of(references, IMAGES_AT_ONCE)
            known[name] = mean, nearest_distances(Computed(len(unseen), held_out), references, mean, IMAGES_AT_ONCE)[0]
        mean, of_unseen = known[name]
        share, _ = copy_share(nearest_distances(features(latents), references, mean, IMAGES_AT_ONCE)[0], of_unseen)
        copies += share * len(latents)
        total += len(latents)
    return round(copies / max(1, total), 4)
