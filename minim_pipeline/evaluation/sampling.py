"""Draws many images for an evaluation, in memory: a list of captions in, one tensor out.

What a model is measured by is planned: the same prompts and seeds every time, equally many of each finding.
"""

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from ..mapped import MappedTensor, select
from ..modalities import resolve_modality
from ..pipeline_minim import MinimPipeline
from .metrics import places


Parts = TypeVar("Parts")
Some = TypeVar("Some", Tensor, MappedTensor)
Texts = Sequence[str]


def joined(parts: list[Parts]) -> Parts:
    """One dataclass of tensors out of many, as batches bring them; what the first has not, none has."""
    there = [name for name, value in vars(parts[0]).items() if value is not None]
    return type(parts[0])(**{name: torch.cat([getattr(part, name) for part in parts]) for name in there})


@torch.no_grad()
def draw_images(
    pipe: MinimPipeline,
    prompts: Texts,
    modalities: Texts,
    seeds: Sequence[int],
    batch_size: int = 64,
    resolution: int | None = None,
    name: str = "generating",
    **settings: Any,
) -> Tensor:
    """One image for each prompt, modality and seed: uint8 [N, 3, H, W] on the CPU.

    Args:
        resolution: side in pixels to which the images are brought; None leaves them as they are.
        name: what the progress bar is called.
        settings: further arguments of the pipeline's call, such as `num_inference_steps`.
    """
    images = []
    for batch in batches(len(prompts), batch_size, name):
        index = range(batch.start, batch.stop)
        # A compiled network is compiled anew for every batch size: the last batch is filled up.
        padded = [*index, *[index[-1]] * (min(batch_size, len(prompts)) - len(index))]
        output = pipe(
            [prompts[i] for i in padded],
            modality=[modalities[i] for i in padded],
            seeds=[seeds[i] for i in padded],
            output_type="pt",
            use_filter=False,  # the seeds say which images are drawn, and what is measured is the generator
            **settings,
        )
        x = output.images[: len(index)].float()
        images.append((_resized(x, resolution).clamp(0, 1) * 255).round().to(torch.uint8).cpu())
    return torch.cat(images)


def _resized(x: Tensor, resolution: int | None) -> Tensor:
    if resolution is None or x.shape[-2:] == (resolution, resolution):
        return x
    return F.interpolate(x, size=(resolution, resolution), mode="bicubic", antialias=True)


def batches(count: int, size: int, name: str | None = None) -> Iterator[slice]:
    """`count` things in turn, at most `size` of them together; with a progress bar, if that has a name."""
    for start in tqdm(range(0, count, size), name, mininterval=2, disable=name is None):
        yield slice(start, min(start + size, count))


@torch.no_grad()
def draw_batch(
    pipe: MinimPipeline, prompts: Texts, modalities: Texts, seeds: Sequence[int], bf16: bool = False, **settings: Any
) -> Tensor:
    """Finished latents [N, C, h, w] of one batch, without the filter.

    Args:
        bf16: autocast, on a GPU.
        settings: further arguments of the pipeline's call, such as `num_inference_steps`.
    """
    call = {"modality": list(modalities), "seeds": list(seeds), "output_type": "latent", **settings}
    with torch.autocast(pipe.device.type, torch.bfloat16, enabled=bf16):
        return pipe(list(prompts), **call).images


def draw_latents(
    pipe: MinimPipeline, prompts: Texts, modalities: Texts, seeds: Sequence[int], batch_size: int, **settings: Any
) -> Tensor:
    """As `draw_batch`, of any number: fp32 [N, C, h, w] on the CPU."""
    parts = (
        draw_batch(pipe, prompts[batch], modalities[batch], seeds[batch], **settings).float().cpu()
        for batch in batches(len(prompts), batch_size, "drawing")
    )
    return torch.cat(list(parts))


@torch.no_grad()
def decode_latents(pipe: MinimPipeline, latents: Tensor, modalities: Texts, bf16: bool = False) -> Tensor:
    """Pictures [N, 3, H, W] in about [-1, 1] of latents; `bytes_of` makes files' values of them."""
    with torch.autocast(pipe.device.type, torch.bfloat16, enabled=bf16):
        return pipe.decode_latents(latents, [resolve_modality(name) for name in modalities])


def bytes_of(pictures: Tensor) -> Tensor:
    """uint8 on the CPU, of pictures in [-1, 1]."""
    return ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


@torch.no_grad()
def reconstruct(
    pipe: MinimPipeline, images: Tensor, modalities: Texts, batch_size: int = 64, resolution: int | None = None
) -> Tensor:
    """Images uint8 [N, 3, H, W] through the autoencoder, as the pipeline delivers them: likewise, on the CPU.

    Args:
        resolution: as of `draw_images`.
    """
    made = []
    for batch in batches(len(images), batch_size):
        latents = pipe.encode_images(images[batch].to(pipe.device) / 127.5 - 1)
        made.append(bytes_of(_resized(decode_latents(pipe, latents, modalities[batch]), resolution)))
    return torch.cat(made)


def plan(
    classes: list[tuple[str, str]], learned: dict[str, list[str]], captions: dict, phrasing: str, count: int, seed: int
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
        first = seed + len(planned)
        for i in range(count):
            prompt = texts[i % len(texts)]
            planned.append({"modality": modality, "finding": finding, "prompt": prompt, "seed": first + i})
    return planned


def draw_planned(
    pipe: MinimPipeline, planned: list[dict], batch_size: int, name: str = "generating", **settings: Any
) -> Tensor:
    """The planned images, uint8 [N, 3, H, W]; `settings`: of the pipeline's call."""
    prompts, modalities, seeds = ([p[key] for p in planned] for key in ("prompt", "modality", "seed"))
    return draw_images(pipe, prompts, modalities, seeds, batch_size, name=name, **settings)


def by_modality(images: Some, names: list[str]) -> dict[str, Some]:
    """Of each modality in `names`, the images [N, ...] (or their features) that are its, where they lie."""
    return {name: select(images, index) for name, index in places(names).items()}
