"""How real generated images of one modality look: the two-sample test, raw and through an autoencoder, and sharpness.

A decoder leaves traces that nobody sees and every classifier finds. Where both sides have gone through the same
autoencoder, it is what the images show that tells them apart.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from ..mapped import Rows, derive, select
from ..modalities import resolve_modality
from .extractors import Extractor
from .images import to_unit
from .metrics import gradient_magnitude
from .options import EvaluateOptions
from .report import NO_TRAIN, UNIT, ImageSet, figure, interval
from .sampling import bytes_of
from .two_sample import Fit, held_out_scores, mean_auroc, network, network_name, ridge


NO_AUTOENCODER = "it needs an autoencoder: give --pipeline or --autoencoder"


@dataclass(frozen=True)
class RealismSettings:
    """How realism is measured.

    Args:
        extractors: whose features the ridge regression learns from.
        autoencoder: through which both sides go; None leaves out what needs it.
        steps: of a network that is fine-tuned to tell the images apart; 0 for none.
        batch_size: images that go through the autoencoder together.
        device: where networks are fine-tuned.
    """

    extractors: list[Extractor]
    autoencoder: AutoencoderKL | None = None
    steps: int = 0
    batch_size: int = 4
    device: torch.device | str = "cpu"


def load_autoencoder(options: EvaluateOptions, device: torch.device | str) -> AutoencoderKL | None:
    """That of `--autoencoder`, or of `--pipeline`, or None where neither is given; raises OSError if there is none."""
    if options.autoencoder:
        vae = AutoencoderKL.from_pretrained(options.autoencoder)
    elif options.pipeline:
        vae = AutoencoderKL.from_pretrained(options.pipeline, subfolder="vae")
    else:
        return None
    return vae.to(device, torch.float32).eval()


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: Tensor, grey: bool) -> Tensor:
    """Images uint8 [N, 3, H, W] once through an autoencoder: the same, with equal channels where `grey`."""
    x = vae.decode(vae.encode(to_unit(images).to(vae.device) * 2 - 1).latent_dist.mode()).sample
    return bytes_of(x.mean(1, keepdim=True).expand_as(x) if grey else x)


def realism(
    sets: Mapping[str, ImageSet], modality: str, features: Mapping[tuple, Tensor], settings: RealismSettings
) -> dict:
    """Figures of one modality.

    Args:
        sets: `real`, `synthetic` and perhaps `train`.
        features: [N, D] by (extractor's name, set), of all images of the set.

    Returns:
        `sharpness`: mean gradient of the generated images over that of real ones, decoded ones where there is an
        autoencoder; `two_sample`: of each extractor `raw`, `raw_floor`, `decoded`, `decoded_floor`, AUROCs of a ridge
        regression; `two_sample_trained`, where there are steps: the same of a network.
    """
    index = {name: images.of(modality) for name, images in sets.items()}
    n = min(len(index["real"]), len(index["synthetic"]))
    chosen = {name: some(numbers, n) for name, numbers in index.items() if len(numbers)}
    images = {name: select(sets[name].images, numbers) for name, numbers in chosen.items()}
    groups = {name: groups_of(sets[name], numbers) for name, numbers in chosen.items()}
    reconstructed: dict[str, Rows] = {}
    if settings.autoencoder is not None:
        through = partial(reconstruct, settings.autoencoder, grey=resolve_modality(modality).grey)
        reconstructed = {
            name: derive(x, f"decoded-{modality}-{name}", settings.batch_size, through) for name, x in images.items()
        }

    def tests(raw: Mapping[str, Rows], reconstructed: Mapping[str, Rows], fit: Fit, **said) -> dict:
        found = {}
        for view, items in (("raw", raw), ("decoded", reconstructed)):
            found[view] = figure(partial(_test, items, groups, "synthetic", fit, said))
            found[f"{view}_floor"] = figure(partial(_test, items, groups, "train", fit, said))
        return found

    report: dict = {"sharpness": figure(partial(_sharpness, images, reconstructed)), "two_sample": {}}
    for extractor in settings.extractors:
        raw = {name: features[extractor.name, name][numbers] for name, numbers in chosen.items()}
        decoded = {name: extractor.extract(x) for name, x in reconstructed.items()}
        report["two_sample"][extractor.name] = tests(raw, decoded, ridge)
    if settings.steps:
        fit = network(settings.steps, settings.device)
        report["two_sample_trained"] = tests(images, reconstructed, fit, network=network_name(), steps=settings.steps)
    return report


def some(numbers: np.ndarray, count: int) -> np.ndarray:
    """`count` of them, or all where there are no more, in random order: the first of them are a sample, too."""
    return np.random.default_rng(0).permutation(numbers)[:count]


def groups_of(images: ImageSet, numbers: np.ndarray) -> list:
    """The column `group` of these images, or each by itself where one of them has none."""
    groups = images.column("group", numbers)
    return groups if all(groups) else list(map(int, numbers))


def _test(items: Mapping[str, Rows], groups: Mapping[str, list], other: str, fit: Fit, said: dict) -> dict:
    """The AUROC with which `fit` tells the real items from the `other` ones, of which as many are taken."""
    if "real" not in items:
        raise ValueError(NO_AUTOENCODER)
    if other not in items:
        raise ValueError(NO_TRAIN)
    n = min(len(items["real"]), len(items[other]))
    real, others = (select(items[name], slice(n)) for name in ("real", other))
    scores = held_out_scores(real, others, (groups["real"][:n], groups[other][:n]), fit)
    return {"value": mean_auroc(*scores)} | interval(mean_auroc, *scores, bounds=UNIT) | {"n": n, **said}


def _sharpness(raw: Mapping[str, Rows], reconstructed: Mapping[str, Rows]) -> dict:
    real, generated = gradient_magnitude(reconstructed.get("real", raw["real"])), gradient_magnitude(raw["synthetic"])
    if not real.any():
        raise ValueError("the real images have no edges to compare with")

    def ratio(real: Tensor, generated: Tensor) -> float:
        return (generated.mean() / real.mean()).item()

    found = {"value": ratio(real, generated)} | interval(ratio, real, generated, bounds=(0.0, torch.inf))
    return found | {"n": len(generated), "real": "decoded" if reconstructed else "raw"}
