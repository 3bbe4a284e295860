"""Draws many images for an evaluation, in memory: a list of captions in, one tensor out."""

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from ..modalities import resolve_modality
from ..pipeline_minim import MinimPipeline


Parts = TypeVar("Parts")


def joined(parts: list[Parts]) -> Parts:
    """One dataclass of tensors out of many, as batches bring them; what the first has not, none has."""
    there = [name for name, value in vars(parts[0]).items() if value is not None]
    return type(parts[0])(**{name: torch.cat([getattr(part, name) for part in parts]) for name in there})


@torch.no_grad()
def draw_images(
    pipe: MinimPipeline,
    prompts: Sequence[str],
    modalities: Sequence[str],
    seeds: Sequence[int],
    batch_size: int = 64,
    resolution: int | None = None,
    name: str = "generating",
    **settings: Any,
) -> torch.Tensor:
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
        if resolution is not None and x.shape[-2:] != (resolution, resolution):
            x = F.interpolate(x, size=(resolution, resolution), mode="bicubic", antialias=True).clamp(0, 1)
        images.append((x * 255).round().to(torch.uint8).cpu())
    return torch.cat(images)


def batches(count: int, size: int, name: str | None = None) -> Iterator[slice]:
    """`count` things in turn, at most `size` of them together; with a progress bar, if that has a name."""
    for start in tqdm(range(0, count, size), name, mininterval=2, disable=name is None):
        yield slice(start, min(start + size, count))


@torch.no_grad()
def draw_batch(
    pipe: MinimPipeline,
    prompts: Sequence[str],
    modalities: Sequence[str],
    seeds: Sequence[int],
    bf16: bool = False,
    **settings: Any,
) -> torch.Tensor:
    """Finished latents [N, C, h, w] of one batch, without the filter.

    Args:
        bf16: autocast, on a GPU.
        settings: further arguments of the pipeline's call, such as `num_inference_steps`.
    """
    call = {"modality": list(modalities), "seeds": list(seeds), "output_type": "latent", **settings}
    with torch.autocast(pipe.device.type, torch.bfloat16, enabled=bf16):
        return pipe(list(prompts), **call).images


def draw_latents(
    pipe: MinimPipeline,
    prompts: Sequence[str],
    modalities: Sequence[str],
    seeds: Sequence[int],
    batch_size: int,
    **settings: Any,
) -> torch.Tensor:
    """As `draw_batch`, of any number: fp32 [N, C, h, w] on the CPU."""
    parts = (
        draw_batch(pipe, prompts[batch], modalities[batch], seeds[batch], **settings).float().cpu()
        for batch in batches(len(prompts), batch_size, "drawing")
    )
    return torch.cat(list(parts))


@torch.no_grad()
def decode_latents(
    pipe: MinimPipeline, latents: torch.Tensor, modalities: Sequence[str], bf16: bool = False
) -> torch.Tensor:
    """Pictures [N, 3, H, W] in about [-1, 1] of latents; `bytes_of` makes files' values of them."""
    with torch.autocast(pipe.device.type, torch.bfloat16, enabled=bf16):
        return pipe.decode_latents(latents, [resolve_modality(name) for name in modalities])


def bytes_of(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 on the CPU, of pictures in [-1, 1]."""
    return ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
