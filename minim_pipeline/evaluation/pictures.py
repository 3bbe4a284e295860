"""What the page of a report shows beside figures: sheets of synthetic images, and the nearest training images."""

import torch
from torch import Tensor

from .memorisation import Copies
from .report import ImageSet


def collect(
    synthetic: ImageSet,
    train: ImageSet | None,
    copies: dict[str, dict[str, Copies]],
    readings: list[str] | None,
    images: int = 24,
    neighbours: int = 6,
    no_real_images: bool = False,
) -> tuple[dict, dict]:
    """Pictures and curves as `page.render` takes them.

    Args:
        copies: as `evaluate` gives them.
        readings: what the judges read in each synthetic image, in words.
        images: how many of a modality a sheet shows, evenly from all of them: nothing is picked.
        neighbours: how many of the nearest pairs are shown of a modality.
        no_real_images: leave the training images out.
    """
    sheets: dict[str, list[dict]] = {}
    pairs: dict[str, list[dict]] = {}
    curves: dict[str, dict] = {}
    for modality in map(str, dict.fromkeys(synthetic.modalities)):
        index, found = synthetic.of(modality), copies.get(modality, {}).get("encoder")

        def entry(place: int, index=index, found=found) -> dict:
            i, lines = index[place], [readings[index[place]]] if readings else []
            if found is not None:
                lines.append(f"nearest {found.distances[place]:.3f}")
            shown = {"image": to_array(synthetic.images[i]), "caption": synthetic.rows[i]["Text"], "lines": lines}
            return shown | {"copy": found is not None and bool(found.distances[place] < found.limit)}

        chosen = torch.linspace(0, len(index) - 1, min(images, len(index))).round().long().tolist()
        sheets[modality] = [entry(place) for place in chosen]
        if found is None or train is None:
            continue
        of_train, pairs[modality] = train.of(modality)[found.nearest.numpy()], []
        for place in found.distances.argsort()[:neighbours].tolist():
            i, j, distance = index[place], of_train[place], found.distances[place]
            pair = {"synthetic": to_array(synthetic.images[i]), "names": (*synthetic.names([i]), *train.names([j]))}
            pair["train"] = None if no_real_images else to_array(train.images[j])
            pairs[modality].append(pair | {"distance": distance.item(), "copy": bool(distance < found.limit)})
        curves[modality] = {"synthetic": found.distances.tolist(), "val": found.val.tolist(), "limit": found.limit}
    return {"sheets": sheets, "neighbours": pairs}, curves


def to_array(image: Tensor):
    """uint8 [3, H, W] as numpy [H, W, 3]."""
    return image.permute(1, 2, 0).numpy()
