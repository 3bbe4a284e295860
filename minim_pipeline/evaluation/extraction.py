"""An attempt to draw training images out of a model: rare captions, repeated (after Carlini et al., arXiv 2301.13188).

A caption that one training image alone has is where a generator most likely answers with that image.
"""

import random
from collections import Counter
from typing import Any

import torch

from .encoder import ImageTextEncoder
from .memorisation import Copies, nearest_distances
from .report import ImageSet
from .sampling import draw_images


def rare_captions(train: ImageSet, modality: str, count: int, seed: int = 0) -> list[tuple[str, int]]:
    """Captions of a modality that the fewest training images have, and how many; chance decides among equals."""
    numbers = Counter(train.column("Text", train.of(modality)))
    captions = sorted(numbers)
    random.Random(seed).shuffle(captions)
    return [(caption, numbers[caption]) for caption in sorted(captions, key=lambda caption: numbers[caption])[:count]]


def extract_training_images(
    pipe,
    train: ImageSet,
    encoder: ImageTextEncoder,
    copies: dict[str, dict[str, Copies]],
    captions: int,
    images: int,
    batch_size: int,
    seed: int = 0,
    **settings,
) -> dict:
    """Draws `images` images for each of the `captions` rarest captions of every modality, and counts copies.

    Args:
        copies: as `evaluate` gives them, with the training images' features; its limits tell what a copy is.
        seed: image i has seed + i.
        settings: of the pipeline's call.

    Returns:
        `encoder`: `share`, `copies`, `n` and `captions`; `prompts`: of every caption `modality`, `text`, how many
        `train_images` have it, `images` drawn, `copies` among them, the least `distance` to any training image, and
        the least to one with this caption (`own_distance`).
    """
    prompts: list[dict[str, Any]] = [
        {"modality": modality, "text": text, "train_images": number, "images": images}
        for modality in copies
        for text, number in rare_captions(train, modality, captions)
    ]
    if not prompts:
        return {"left_out": "there are no training images of the modalities that were drawn"}
    asked = [prompt for prompt in prompts for _ in range(images)]
    texts, modalities = [prompt["text"] for prompt in asked], [prompt["modality"] for prompt in asked]
    seeds = range(seed, seed + len(asked))
    drawn = draw_images(pipe, texts, modalities, seeds, batch_size, name="rare captions", **settings)
    features = encoder.encode_images(drawn)[0].split(images)
    for prompt, drawn_features in zip(prompts, features):
        name = prompt["modality"]
        known = copies[name]["encoder"]
        distance, _ = nearest_distances(drawn_features, known.references)
        own = torch.tensor([text == prompt["text"] for text in train.column("Text", train.of(name))])
        prompt["copies"] = int((distance < known.limit).sum())
        prompt["distance"] = round(distance.min().item(), 5)
        prompt["own_distance"] = round(nearest_distances(drawn_features, known.references[own])[0].min().item(), 5)
    found = sum(prompt["copies"] for prompt in prompts)
    return {
        "encoder": {"share": round(found / len(asked), 4), "copies": found, "n": len(asked), "captions": len(prompts)},
        "prompts": prompts,
    }
