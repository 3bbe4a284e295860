"""Draws many images for an evaluation, in memory: a list of captions in, one tensor out."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from ..files import atomic_path


@torch.no_grad()
def draw_images(
    pipe,
    prompts: Sequence[str],
    modalities: Sequence[str],
    seeds: Sequence[int],
    batch_size: int = 64,
    resolution: int | None = None,
    name: str = "generating",
    **settings,
) -> torch.Tensor:
    """One image for each prompt, modality and seed: uint8 [N, 3, H, W] on the CPU.

    Args:
        pipe: a MinimPipeline.
        resolution: side in pixels to which the images are brought; None leaves them as they are.
        name: what the progress bar is called.
        settings: further arguments of the pipeline's call, such as `num_inference_steps`.
    """
    images = []
    for start in tqdm(range(0, len(prompts), batch_size), name, mininterval=2):
        mine = range(start, min(start + batch_size, len(prompts)))
        # A compiled network is compiled anew for every batch size: the last batch is filled up.
        padded = [*mine, *[mine[-1]] * (min(batch_size, len(prompts)) - len(mine))]
        output = pipe(
            [prompts[i] for i in padded],
            modality=[modalities[i] for i in padded],
            seeds=[seeds[i] for i in padded],
            output_type="pt",
            use_filter=False,  # the seeds say which images are drawn, and what is measured is the generator
            **settings,
        )
        x = output.images[: len(mine)].float()
        if resolution is not None and x.shape[-2:] != (resolution, resolution):
            x = F.interpolate(x, size=(resolution, resolution), mode="bicubic", antialias=True).clamp(0, 1)
        images.append((x * 255).round().to(torch.uint8).cpu())
    return torch.cat(images)


def kept(file: Path, key: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What `make()` gives, a tensor: made once, kept in `file` (whole or not at all), and then read from there.

    Args:
        key: tells apart what is made with other settings.

    Raises:
        ValueError: the file holds something that was made under another key.
    """
    if file.is_file():
        with np.load(file) as stored:
            if str(stored["key"]) != key:
                raise ValueError(f"{file} was made with other settings: choose another folder, or the same settings.")
            return torch.from_numpy(stored["tensor"])
    tensor = make()
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(file) as temporary, open(temporary, "wb") as opened:
        np.savez(opened, key=key, tensor=tensor.cpu().numpy())
    return tensor
