"""What the page of a report shows beside figures: sheets of synthetic images, and the nearest training images."""

import torch

from .report import Copies, ImageSet


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
    sheets, pairs, curves = {}, {}, {}
    for modality in dict.fromkeys(synthetic.modalities):
        index = synthetic.of(modality)
        found = copies.get(modality, {}).get("encoder")

        def entry(place: int, index=index, found=found) -> dict:
            i = index[place]
            lines = [readings[i]] if readings else []
            if found is not None:
                lines.append(f"nearest {found.distances[place]:.3f}")
            is_copy = found is not None and bool(found.distances[place] < found.limit)
            caption = synthetic.rows[i]["Text"]
            return {"image": to_array(synthetic.images[i]), "caption": caption, "lines": lines, "copy": is_copy}

        chosen = torch.linspace(0, len(index) - 1, min(images, len(index))).round().long().tolist()
        sheets[str(modality)] = [entry(place) for place in chosen]
        if found is None or train is None:
            continue
        of_train = train.of(modality)
        pairs[str(modality)] = [
            {
                "synthetic": to_array(synthetic.images[index[place]]),
                "train": None if no_real_images else to_array(train.images[of_train[found.nearest[place]]]),
                "distance": found.distances[place].item(),
                "names": (*synthetic.names([index[place]]), *train.names([of_train[found.nearest[place]]])),
                "copy": bool(found.distances[place] < found.limit),
            }
            for place in found.distances.argsort()[:neighbours].tolist()
        ]
        curves[str(modality)] = {
            "synthetic": found.distances.tolist(),
            "val": found.val.tolist(),
            "limit": found.limit,
        }
    return {"sheets": sheets, "neighbours": pairs}, curves


def to_array(image: torch.Tensor):
    """uint8 [3, H, W] as numpy [H, W, 3]."""
    return image.permute(1, 2, 0).numpy()
