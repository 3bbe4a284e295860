"""Seeds: where the noise of each image comes from, and the number that draws it again."""

from collections.abc import Sequence

import torch


Generators = torch.Generator | list[torch.Generator] | None  # one for all images, one for each, or none


def redrawing_seed(generator: torch.Generator | None) -> int | None:
    """The int64 that makes `generator` anew, or None if it has been drawn from or is no CPU generator."""
    if generator is None or generator.device.type != "cpu":
        return None
    fresh = torch.Generator("cpu").manual_seed(generator.initial_seed())
    if not torch.equal(fresh.get_state(), generator.get_state()):
        return None
    return (generator.initial_seed() + 2**63) % 2**64 - 2**63  # torch tells a seed of -1 as 2**64 - 1


def draw_seeds(wanted: list[int], candidates: int, generator: Generators) -> list[int]:
    """One int64 for each candidate of each wanted image, from the image's generator, or the one for all."""
    seeds = []
    for i in wanted:
        source = generator[i] if isinstance(generator, list) else generator
        device = "cpu" if source is None else source.device
        seeds += torch.randint(2**63 - 1, (candidates,), generator=source, device=device).tolist()
    return seeds


def prepare_generators(
    num_images: int, generator: Generators = None, seeds: list[int] | None = None, latents: torch.Tensor | None = None
) -> tuple[Generators, Sequence[int | None]]:
    """Where the noise comes from, and for each image the seed that draws it again, if there is one.

    Each seed makes a CPU generator of its own, so that an image depends neither on the rest of the batch nor on the
    device. With neither `generator` nor `latents`, seeds are drawn from torch's global generator.
    """
    if seeds is None and generator is None and latents is None:
        seeds = torch.randint(2**63 - 1, (num_images,)).tolist()
    if seeds is not None:
        seeds = [int(seed) for seed in seeds]
        return [torch.Generator("cpu").manual_seed(seed) for seed in seeds], seeds

    generators = generator if isinstance(generator, list) else [generator]
    if latents is not None or len(set(map(id, generators))) != num_images:
        return generator, [None] * num_images
    return generator, [redrawing_seed(g) for g in generators]
