"""How near generated images come to the training images, measured by how near unseen real images do.

The rule: a sample is called a copy if it lies nearer to some training image than all but the nearest 1 % of val images
do. A generator that remembers nothing then has a share of about 1 %; one that copies has far more.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .images import to_unit


def pixel_features(images: torch.Tensor, size: int = 64) -> torch.Tensor:
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
def latent_features(images: torch.Tensor, vae) -> torch.Tensor:
    """The autoencoder's latents (posterior mode) averaged over 2 x 2: float32 [N, C * h/2 * w/2].

    The average is a low pass: the finest latents tell noise apart, in which a copy may differ. What all images share
    is still in it; `nearest_distances` takes it off.
    """
    x = to_unit(images).to(vae.device, vae.dtype) * 2 - 1
    return F.avg_pool2d(vae.encode(x).latent_dist.mode().float(), 2).flatten(1)


def nearest_distances(
    queries: torch.Tensor, references: torch.Tensor, mean: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine distance of each query [n, D] to the nearest reference [N, D], 0 to 2, and which it is: both [n].

    Args:
        mean: [D], taken off both first; None takes nothing off.
    """
    if mean is not None:
        queries, references = queries - mean, references - mean
    similarity = F.normalize(queries, dim=1) @ F.normalize(references, dim=1).T
    nearest, index = similarity.max(1)
    return 1 - nearest, index


def copy_share(samples: torch.Tensor, val: torch.Tensor, quantile: float = 0.01) -> tuple[float, float]:
    """Share of samples nearer to the training images than the nearest 1 % of val images, and that distance.

    Args:
        samples: distances to the nearest training image, [n].
        val: the same of unseen real images of the same kind, [m].
    """
    limit = torch.quantile(val.float(), quantile)
    return (samples < limit).float().mean().item(), limit.item()


def memorisation_report(
    samples: dict[str, torch.Tensor],
    val: dict[str, torch.Tensor],
    train: dict[str, torch.Tensor],
    extract: Callable[[torch.Tensor], torch.Tensor],
    may_mirror: dict[str, bool],
    remove_mean: bool = False,
    batch_size: int = 64,
) -> dict:
    """`copy_share` per modality and in all.

    Args:
        samples, val, train: modality id -> images [N, 3, H, W], uint8.
        extract: images -> features [N, D].
        may_mirror: modality id -> whether a mirrored copy counts too; it then does for samples and val alike.
        remove_mean: take the mean feature of the modality's training images off, so that distances are not all about
            what every image of the modality shares.

    Returns:
        `share` (of all samples), `copies`, `n`, and `modalities`: for each the same, `limit`, `n_val`, the medians of
        both distances, and of the nearest five samples (index of the sample, of the training image, distance).
    """

    def features(images):
        return torch.cat([extract(part).float().cpu() for part in images.split(batch_size)])

    def distances(images, references, mean, mirror):
        distance, index = nearest_distances(features(images), references, mean)
        if mirror:
            mirrored, mirrored_index = nearest_distances(features(images.flip(-1)), references, mean)
            index = torch.where(mirrored < distance, mirrored_index, index)
            distance = torch.minimum(distance, mirrored)
        return distance, index

    modalities, copies, total = {}, 0, 0
    for name, images in samples.items():
        references = features(train[name])
        mean = references.mean(0) if remove_mean else None

        mine, which = distances(images, references, mean, may_mirror[name])
        theirs, _ = distances(val[name], references, mean, may_mirror[name])
        share, limit = copy_share(mine, theirs)
        found = int((mine < limit).sum())
        copies, total = copies + found, total + len(mine)
        modalities[name] = {
            "share": round(share, 4),
            "copies": found,
            "n": len(mine),
            "n_val": len(theirs),
            "limit": round(limit, 5),
            "median": round(mine.median().item(), 5),
            "median_val": round(theirs.median().item(), 5),
            "nearest": [[int(i), int(which[i]), round(mine[i].item(), 5)] for i in mine.argsort()[:5]],
        }
    return {"share": round(copies / total, 4), "copies": copies, "n": total, "modalities": modalities}
