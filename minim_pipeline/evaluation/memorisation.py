"""How near generated images come to the training images, measured by how near unseen real images do.

The rule: a sample is called a copy if it lies nearer to some training image than all but the nearest 1 % of val images
do. A generator that remembers nothing then has a share of about 1 %; one that copies has far more.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from ..mapped import Computed, Rows, blocks, derive, select
from .images import to_unit


ByModality = Mapping[str, Rows]  # modality id -> images [N, 3, H, W], uint8


def pixel_features(images: Tensor, size: int = 64) -> Tensor:
    """Grey values at `size` x `size` px without their mean, of unit length: a dot product of two is Pearson's r.

    Args:
        images: [N, 3, H, W], uint8 or float in [0, 1].

    Returns:
        float32 [N, size * size].
    """
    grey = to_unit(images).mean(1, keepdim=True)
    if grey.shape[-2:] != (size, size):
        grey = F.interpolate(grey, size=(size, size), mode="bilinear", antialias=True)
    grey = grey.flatten(1)
    return F.normalize(grey - grey.mean(1, keepdim=True), dim=1)


@torch.no_grad()
def latent_features(images: Tensor, vae) -> Tensor:
    """The autoencoder's latents (posterior mode) averaged over 2 x 2: float32 [N, C * h/2 * w/2].

    The average is a low pass: the finest latents tell noise apart, in which a copy may differ. What all images share
    is still in it; `nearest_distances` takes it off.
    """
    x = to_unit(images).to(vae.device, vae.dtype) * 2 - 1
    return F.avg_pool2d(vae.encode(x).latent_dist.mode().float(), 2).flatten(1)


def nearest_distances(
    queries: Rows | Computed, references: Rows | Computed, mean: Tensor | None = None, at_once: int = 1024
) -> tuple[Tensor, Tensor]:
    """Cosine distance of each query [n, D] to the nearest reference [N, D], 0 to 2, and which it is: both [n].

    Args:
        mean: [D], taken off both first; None takes nothing off.
        at_once: references that are laid beside 2,048 queries at a time.
    """

    def unit(x: Tensor) -> Tensor:
        return F.normalize(x if mean is None else x - mean, dim=1)

    found = []
    for query in map(unit, blocks(queries, 2048)):
        best, start = torch.full((len(query),), -torch.inf, device=query.device), 0
        index = torch.zeros(len(query), dtype=torch.int64, device=query.device)
        for reference in map(unit, blocks(references, at_once)):
            similarity, place = (query @ reference.T).max(1)
            nearer = similarity > best
            best, index = torch.where(nearer, similarity, best), torch.where(nearer, start + place, index)
            start += len(reference)
        found.append((1 - best, index))
    distances, indices = zip(*found, strict=True)
    return torch.cat(distances), torch.cat(indices)


def mean_of(rows: Rows | Computed, at_once: int = 1024) -> Tensor:
    """The mean of features [N, D], in their precision: [D]."""
    parts = [(part.double().sum(0), len(part), part.dtype) for part in blocks(rows, at_once)]
    total = torch.stack([part for part, _, _ in parts]).sum(0)
    return (total / sum(count for _, count, _ in parts)).to(parts[0][2])


def nearest_in_any_view(
    views: Sequence[Rows | Computed], references: Rows, mean: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`nearest_distances` of whichever view of a query comes nearest, for instance the image and its mirror image.

    Args:
        views: tensors [n, D], the same queries in the same order.
    """
    found = [nearest_distances(view, references, mean) for view in views]
    distances, indices = (torch.stack(part) for part in zip(*found))  # [views, n]
    distance, best = distances.min(0)
    return distance, indices.gather(0, best[None])[0]


def copy_share(samples: Tensor, val: Tensor, quantile: float = 0.01) -> tuple[float, float]:
    """Share of samples nearer to the training images than the nearest 1 % of val images, and that distance.

    Args:
        samples: distances to the nearest training image, [n].
        val: the same of unseen real images of the same kind, [m].
    """
    limit = torch.quantile(val.float(), quantile)
    return (samples < limit).float().mean().item(), limit.item()


@dataclass
class Copies:
    """The nearest training image of each sample of a modality, and how near val images come to one."""

    distances: Tensor  # [n], cosine
    nearest: Tensor  # [n], numbers among the training images
    val: Tensor  # [m]
    references: Rows  # [N, D], features of those training images

    @property
    def limit(self) -> float:
        return copy_share(self.distances, self.val)[1]

    def figures(self) -> dict:
        """`share` and number of `copies`, `n`, `n_val`, the `limit` below which a sample is a copy, both medians."""
        share, limit = copy_share(self.distances, self.val)
        return {
            "share": round(share, 4),
            "copies": int((self.distances < limit).sum()),
            "n": len(self.distances),
            "n_val": len(self.val),
            "limit": round(limit, 5),
            "median": round(self.distances.median().item(), 5),
            "median_val": round(self.val.median().item(), 5),
        }

    def report(self, samples: list[str], train: list[str], most: int = 50) -> dict:
        """Figures, and the copies by name, the nearest first; `nearest` names the five nearest, copies or not."""

        def named(i: int) -> dict:
            distance = round(self.distances[i].item(), 5)
            return {"synthetic": samples[i], "train": train[int(self.nearest[i])], "distance": distance}

        figures, order = self.figures(), self.distances.argsort().tolist()
        copied = order[: min(figures["copies"], most)]
        return figures | {"copied": [named(i) for i in copied], "nearest": [named(i) for i in order[:5]]}


def find_copies(
    samples: Sequence[Rows | Computed], val: Sequence[Rows | Computed], references: Rows, mean: Tensor | None = None
) -> Copies:
    """The nearest of the training images' features [N, D], in any view, as of `nearest_in_any_view`."""
    distances, nearest = nearest_in_any_view(samples, references, mean)
    return Copies(distances, nearest, nearest_in_any_view(val, references, mean)[0], references)


def total(modalities: Iterable[dict]) -> dict:
    """`share`, `copies` and `n` of all modalities together, from the figures of each."""
    modalities = list(modalities)
    copies, n = sum(m["copies"] for m in modalities), sum(m["n"] for m in modalities)
    return {"share": round(copies / n, 4), "copies": copies, "n": n}


def memorisation_report(
    samples: ByModality,
    val: ByModality,
    train: ByModality,
    extract: Callable[[Tensor], Tensor],
    may_mirror: dict[str, bool],
    remove_mean: bool = False,
    batch_size: int = 64,
    space: str = "features",
) -> dict:
    """`copy_share` per modality and in all.

    Args:
        samples, val, train: modality id -> images [N, 3, H, W], uint8.
        extract: images -> features [N, D].
        may_mirror: modality id -> whether a mirrored copy counts too; it then does for samples and val alike.
        remove_mean: take the mean feature of the modality's training images off, so that distances are not all about
            what every image of the modality shares.
        space: of the features; names files, where the training images lie on disk.

    Returns:
        `share` (of all samples), `copies`, `n`, and `modalities`: `Copies.figures` of each, and of its nearest five
        samples (index of the sample, of the training image, distance).
    """

    def of_part(x: Tensor) -> Tensor:
        return extract(x).float().cpu()

    def views(images: Rows, mirror: bool) -> list[Computed]:
        def features(rows: slice, mirrored: bool) -> Tensor:
            seen = select(images, rows).split(batch_size)
            return torch.cat([of_part(x.flip(-1) if mirrored else x) for x in seen])

        return [Computed(len(images), partial(features, mirrored=m)) for m in ((False, True) if mirror else (False,))]

    modalities = {}
    for name, images in samples.items():
        references = derive(train[name], f"{space}-{name}", batch_size, of_part)
        mean = mean_of(references) if remove_mean else None
        found = find_copies(views(images, may_mirror[name]), views(val[name], may_mirror[name]), references, mean)
        order = found.distances.argsort()[:5].tolist()
        nearest = [[i, int(found.nearest[i]), round(found.distances[i].item(), 5)] for i in order]
        modalities[name] = found.figures() | {"nearest": nearest}
    return {**total(modalities.values()), "modalities": modalities}


def copies_in_both_spaces(
    samples: ByModality, val: ByModality, train: ByModality, may_mirror: dict[str, bool], vae: AutoencoderKL
) -> dict[str, dict]:
    """`memorisation_report` in `latents` of the autoencoder, less their mean, and in `pixels`."""
    sets = samples, val, train
    latents = memorisation_report(*sets, lambda x: latent_features(x, vae), may_mirror, True, space="latents")
    pixels = memorisation_report(*sets, lambda x: pixel_features(x.to(vae.device)), may_mirror, space="pixels")
    return {"latents": latents, "pixels": pixels}


def format_memorisation(name: str, report: dict) -> str:
    """A table of `memorisation_report`, a line a modality; `name`: of the space that distances are measured in."""
    lines = [f"nearer than the nearest 1 % of val images, in {name}: {report['share']:.3f} of {report['n']}"]
    for modality, r in report["modalities"].items():
        lines.append(
            f"  {modality:10s} {r['share']:.3f} of {r['n']} (limit {r['limit']:.4f} of {r['n_val']} val; "
            f"median {r['median']:.4f}, val {r['median_val']:.4f})"
        )
    return "\n".join(lines)
