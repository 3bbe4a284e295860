"""Which images a model is measured by: the same prompts and seeds every time, equally many of each finding."""

from collections.abc import Iterable
from typing import Any

import torch

from ..pipeline_minim import MinimPipeline
from .sampling import draw_images


def plan(
    classes: Iterable[tuple[str, str]],
    learned: dict[str, list[str]],
    captions: dict,
    phrasing: str,
    count: int,
    seed: int,
) -> list[dict]:
    """What to generate: `count` images a finding that judges and model both know, phrasings in turn.

    Raises:
        ValueError: `captions` has no such phrasings of one of these findings.
    """
    planned: list[dict] = []
    for modality, finding in classes:
        if finding not in learned.get(modality, []):
            continue
        texts = captions.get(modality, {}).get(finding, {}).get(phrasing)
        if not texts:
            raise ValueError(f"The captions have no {phrasing!r} phrasings of {finding!r} of {modality!r}.")
        planned += [
            {
                "modality": modality,
                "finding": finding,
                "prompt": texts[i % len(texts)],
                "seed": seed + len(planned) + i,
            }
            for i in range(count)
        ]
    return planned


def draw_planned(
    pipe: MinimPipeline, planned: list[dict], batch_size: int, name: str = "generating", **settings: Any
) -> torch.Tensor:
    """The planned images, uint8 [N, 3, H, W]; `settings`: of the pipeline's call."""
    prompts, modalities, seeds = ([p[key] for p in planned] for key in ("prompt", "modality", "seed"))
    return draw_images(pipe, prompts, modalities, seeds, batch_size, name=name, **settings)


def by_modality(images: torch.Tensor, names: list[str]) -> dict[str, torch.Tensor]:
    """Of each modality in `names`, the images [N, ...] (or their features) that are its."""
    return {name: images[[i for i, n in enumerate(names) if n == name]] for name in dict.fromkeys(names)}
