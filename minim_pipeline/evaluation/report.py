"""The report of a set of synthetic images against real ones: features in, `report.json`'s dict out.

Each figure is `{"value", "interval", "n", ...}`, or `{"left_out": reason}` where there are too few images, no labels
or no package for it: the others still come. Figures are per modality, since one that mixes modalities mostly says how
many there are of each.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..mapped import Computed, Rows, derive, select
from ..modalities import resolve_modality
from .encoder import ImageTextEncoder
from .extractors import Extractor
from .judges import Judges, accuracy_report
from .memorisation import Copies, find_copies, pixel_features, total
from .metrics import (
    bootstrap_interval,
    frechet_distance,
    frechet_floor,
    image_image_retrieval,
    image_text_retrieval,
    inception_score,
    kernel_distance,
    kernel_distances_of_parts,
    ms_ssim_of_pairs,
    places,
)
from .neighbourhoods import neighbourhoods_of_parts, precision_recall_density_coverage


UNIT = (0.0, 1.0)
NO_TRAIN = "no training images were given"
OWN: None = None  # in place of an extractor's name: the encoder's features, whatever other extractors are called


@dataclass
class ImageSet:
    """Images of one kind, real or synthetic, and what is known of each.

    Args:
        rows: as `read_dataset` gives them: `path`, `Text`, `modality`, and perhaps a label.
        images: uint8 [N, 3, S, S], as `load_images` or `map_images` gives them.
        changes: what `load_images` had to do to them.
    """

    rows: list[dict]
    images: Rows
    changes: Counter = field(default_factory=Counter)

    def __post_init__(self):
        self.modalities = np.array([resolve_modality(row["modality"]).id for row in self.rows])

    def of(self, modality: str) -> np.ndarray:
        """Numbers of the images of a modality."""
        return np.flatnonzero(self.modalities == modality)

    def only(self, modalities: Sequence[str]) -> "ImageSet":
        """The images of these modalities."""
        index = np.flatnonzero(np.isin(self.modalities, list(modalities)))
        return ImageSet([self.rows[i] for i in index], select(self.images, index), self.changes)

    def column(self, name: str, numbers) -> list[str]:
        return [self.rows[i].get(name, "") for i in numbers]

    def names(self, numbers) -> list[str]:
        """Paths as the CSV has them; of those that tell where a machine keeps its files only the last part."""
        paths = map(PurePath, self.column("path", numbers))
        return [path.name if path.is_absolute() or ".." in path.parts else path.as_posix() for path in paths]

    def has(self, column: str) -> bool:
        """Whether every row has a value in this column."""
        return all(row.get(column) for row in self.rows)


def figure(compute: Callable[[], dict]) -> dict:
    """What `compute` gives, or why it cannot."""
    try:
        return {key: _rounded(value) for key, value in compute().items()}
    except (ValueError, ModuleNotFoundError) as error:
        return {"left_out": str(error)}


def interval(function: Callable, *arrays: Tensor, **options) -> dict:
    """`{"interval": ...}` of `bootstrap_interval`, or nothing for no draws or where half of the images are too few."""
    if options.get("draws") == 0:
        return {}
    try:
        return {"interval": bootstrap_interval(function, *arrays, **options)}
    except ValueError:
        return {}


def _rounded(value):
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def fidelity(real: Tensor, synthetic: Tensor, train: Tensor | None, draws: int = 200) -> dict:
    """Distances and neighbourhoods of features [N, D], [M, D]; beside them those of other real images, if there are.

    The Fréchet distance depends on n, so it and its floor take equally many images on each side. Intervals are of
    `draws` halves; 0 leaves them out.
    """
    n = min(len(real), len(synthetic))
    generator = torch.Generator().manual_seed(0)
    some_real, some_synthetic = (x[torch.randperm(len(x), generator=generator)[:n]] for x in (real, synthetic))
    above = (0.0, torch.inf)

    def floor() -> dict:
        if train is None:
            return {"value": frechet_floor(real, n), "n": n}
        return {"value": frechet_floor(train, n, real), "n": n}

    def kernel_floor() -> dict:
        if train is None:
            raise ValueError("it needs other real images: give --train")
        return {"value": kernel_distance(train, real), "n": len(real), "n_train": len(train)}

    def frechet() -> dict:
        found = {"value": frechet_distance(some_real, some_synthetic), "n": n}
        return found | interval(frechet_distance, some_real, some_synthetic, draws=draws, bounds=above)

    def kernel() -> dict:
        found = {"value": kernel_distance(real, synthetic), "n": len(synthetic), "n_real": len(real)}
        return found | interval(kernel_distance, real, synthetic, draws=draws, of_parts=kernel_distances_of_parts)

    distance, least = figure(frechet), figure(floor)
    report = {"frechet_distance": distance, "frechet_floor": least, "frechet_over_floor": over_floor(distance, least)}
    report |= {"kernel_distance": figure(kernel), "kernel_floor": figure(kernel_floor)}
    bounds = {"precision": UNIT, "recall": UNIT, "density": above, "coverage": UNIT}
    try:
        values = precision_recall_density_coverage(real, synthetic)
    except ValueError as error:
        return report | {name: {"left_out": str(error)} for name in bounds}
    options = {"draws": draws, "bounds": bounds, "of_parts": neighbourhoods_of_parts}
    each = interval(precision_recall_density_coverage, real, synthetic, **options).get("interval")
    for name, value in values.items():
        found = {"value": value, "n": len(synthetic)} | ({"interval": each[name]} if each else {})
        report[name] = {key: _rounded(v) for key, v in found.items()}
    return report


def over_floor(distance: dict, floor: dict) -> dict:
    """How many times as far as other real images the generated ones lie: a figure made of two."""
    for part in (distance, floor):
        if "left_out" in part:
            return part
    if not floor["value"]:
        return {"left_out": "the floor is 0: the real images do not differ"}
    found = {"value": distance["value"] / floor["value"], "n": distance["n"], "floor": floor["value"]}
    if "interval" in distance:
        found["interval"] = [bound / floor["value"] for bound in distance["interval"]]
    return {key: _rounded(value) for key, value in found.items()}


def diversity(images: Rows, prompts: list[str], grey: bool, probabilities: Tensor | None) -> dict:
    """MS-SSIM among images uint8 [N, 3, H, W] of one prompt, and the Inception-style score of [N, classes]."""

    def ms_ssim() -> dict:
        generator = torch.Generator().manual_seed(0)
        values = ms_ssim_of_pairs(images, prompts, generator=generator, channels=1 if grey else 3)
        repeated = sum(count > 1 for count in Counter(prompts).values())
        report = {"value": values.mean().item(), "pairs": len(values), "prompts": repeated, "n": len(images)}
        return report | interval(lambda v: v.mean().item(), values, bounds=UNIT)

    def score() -> dict:
        if probabilities is None:
            raise ValueError("it needs classifiers of the finding: give --judges")
        n, classes = probabilities.shape
        report = {"value": inception_score(probabilities), "n": n, "classes": classes}
        return report | interval(inception_score, probabilities, bounds=(1.0, float(classes)))

    return {"ms_ssim": figure(ms_ssim), "inception_score": figure(score)}


def retrieval_figure(compute: Callable[[], dict]) -> dict:
    """A rate of retrieval as a figure: `value`, `interval`, `chance`, `pool`, `n`, `top`."""

    def both() -> dict:
        found = compute()
        hits = found.pop("hits").double()
        found["value"] = found.pop("rate")
        return found | interval(lambda h: h.mean().item(), hits, bounds=UNIT)

    return figure(both)


def evaluate(
    real: ImageSet,
    synthetic: ImageSet,
    train: ImageSet | None,
    encoder: ImageTextEncoder,
    extractors: list[Extractor],
    judges: Judges | None = None,
    label_column: str = "finding",
) -> tuple[dict, dict[str, dict[str, Copies]], list[str] | None, dict[tuple[str | None, str], Tensor]]:
    """Everything but realism, extraction and downstream use.

    Args:
        real: images that neither generator nor judges have learned from.
        synthetic: what is measured.
        train: what the generator has learned from; None leaves copies and floors out.
        encoder: for retrieval and copies.
        extractors: for distances and neighbourhoods; the figures of each stand beside one another.
        judges: classifiers of the finding; None leaves out what needs them.
        label_column: of the finding.

    Returns:
        The report; the distances to the training images, modality -> "encoder" or "pixels" -> Copies; what the judges
        read in each synthetic image; and the features, as `look` gives them.
    """
    sets = {"real": real, "synthetic": synthetic} | ({"train": train} if train else {})
    report: dict[str, Any] = {"labels": _labels(sets, label_column)}
    have = {name: dict.fromkeys(map(str, sets[name].modalities)) for name in ("synthetic", "real")}
    shared = [name for name in have["synthetic"] if name in have["real"]]
    only = {name: "no real images" for name in have["synthetic"] if name not in shared}
    only |= {name: "no synthetic images" for name in have["real"] if name not in shared}
    if not shared:
        raise ValueError(f"real and synthetic images share no modality: {only}")

    features, embeddings, said = look(sets, encoder, extractors, judges)
    texts = {
        name: encoder.encode_texts([row["Text"] for row in images.rows], [row["modality"] for row in images.rows])
        for name, images in (("real", real), ("synthetic", synthetic))
    }
    probabilities = {name: torch.stack(list(each.values())).mean(0) for name, each in said.items()}

    report["modalities"] = {}
    copies: dict[str, dict[str, Copies]] = {}
    for modality in tqdm(shared, "comparing"):
        index = {name: images.of(modality) for name, images in sets.items()}
        part: dict[str, Any] = {"n": {name: len(numbers) for name, numbers in index.items()}, "fidelity": {}}
        for extractor in extractors:
            each = {name: features[extractor.name, name][index[name]] for name in sets if len(index[name])}
            part["fidelity"][extractor.name] = fidelity(each["real"], each["synthetic"], each.get("train"))
        part["diversity"], part["retrieval"] = {}, {}
        columns = [i for i, (m, _) in enumerate(judges.classes) if m == modality] if judges else []
        for name, suffix in (("synthetic", ""), ("real", "_real")):
            numbers, captions = index[name], sets[name].column("Text", index[name])
            p = probabilities[name][numbers][:, columns] if columns else None
            p = p / p.sum(1, keepdim=True) if p is not None else None
            found = diversity(select(sets[name].images, numbers), captions, resolve_modality(modality).grey, p)
            part["diversity"] |= {key + suffix: value for key, value in found.items()}
            pair = embeddings[name][numbers], texts[name][numbers]
            part["retrieval"]["image_text" + suffix] = retrieval_figure(partial(image_text_retrieval, *pair, captions))
        part["retrieval"] |= _image_retrieval(
            features[OWN, "synthetic"][index["synthetic"]],
            features[OWN, "real"][index["real"]],
            synthetic.column(label_column, index["synthetic"]),
            real.column(label_column, index["real"]),
            report["labels"].get("left_out"),
        )
        part["memorisation"], found = _memorisation(sets, index, features)
        if found:
            copies[modality] = found
        report["modalities"][modality] = part

    report["modalities_left_out"] = only
    report["memorisation"] = {"left_out": NO_TRAIN}
    if copies:
        each_modality = [report["modalities"][modality]["memorisation"] for modality in copies]
        report["memorisation"] = {key: total(m[key] for m in each_modality) for key in ("encoder", "pixels")}
    report["judges"] = judged(judges, sets, said, label_column, report["labels"].get("left_out"))
    report["acceptance"] = acceptance(synthetic, label_column if "column" in report["labels"] else None)
    return report, copies, _readings(judges, synthetic, probabilities), features


def _labels(sets: dict[str, ImageSet], column: str) -> dict:
    """The column that every real and synthetic image has a value in, or why it is none."""
    if unlabelled := [name for name in ("real", "synthetic") if not sets[name].has(column)]:
        return {"left_out": f"not every {' and '.join(unlabelled)} image has a value in the column {column!r}"}
    return {"column": column}


def _memorisation(
    sets: dict[str, ImageSet], index: dict[str, np.ndarray], features: dict[tuple[str | None, str], Tensor]
) -> tuple[dict, dict[str, Copies]]:
    """Of one modality, whose images `index` has: the report of copies, and the distances if there are any."""
    if "train" not in sets or not len(index["train"]):
        given = "there are no training images of this modality" if "train" in sets else NO_TRAIN
        return {key: {"left_out": given} for key in ("encoder", "pixels")}, {}
    some = {name: (features[OWN, name][i], select(sets[name].images, i)) for name, i in index.items()}

    def both_ways(name: str) -> list[Computed]:
        images = some[name][1]

        def pixels(part: slice, mirror: bool) -> Tensor:
            seen = select(images, part).split(64)
            return torch.cat([pixel_features(x.flip(-1) if mirror else x) for x in seen])

        return [Computed(len(images), partial(pixels, mirror=mirror)) for mirror in (False, True)]

    copies = {
        # The encoder is blind to mirroring, small shifts and brightness.
        "encoder": find_copies([some["synthetic"][0]], [some["real"][0]], some["train"][0]),
        "pixels": find_copies(
            both_ways("synthetic"), both_ways("real"), derive(some["train"][1], "pixels", 64, pixel_features)
        ),
    }
    synthetic, train = (sets[name].names(index[name]) for name in ("synthetic", "train"))
    return {key: found.report(synthetic, train) for key, found in copies.items()}, copies


def look(
    sets: dict[str, ImageSet], encoder: ImageTextEncoder, extractors: list[Extractor], judges: Judges | None
) -> tuple[dict, dict, dict]:
    """What every network says of the images, each looking once.

    Returns:
        Features [N, D] by (extractor's name or `OWN`, set), the encoder's embeddings [N, P] by set, and
        probabilities [N, classes] by set and judge, of the real and the synthetic set.
    """
    others = [extractor for extractor in extractors if extractor.encoder is not encoder]
    features: dict[tuple[str | None, str], Tensor] = {}
    embeddings, said = {}, {}
    passes = len(sets) * (1 + len(others)) + (2 if judges else 0)
    with tqdm(total=passes, desc="looking at images", unit="pass") as bar:
        for name, images in sets.items():
            features[OWN, name], embeddings[name] = encoder.encode_images(images.images)
            bar.update()
            for extractor in extractors:
                own = extractor.encoder is encoder
                features[extractor.name, name] = features[OWN, name] if own else extractor.extract(images.images)
                bar.update(not own)
        if judges:
            for name in ("real", "synthetic"):
                said[name] = judges.judge_each(sets[name].images)
                bar.update()
    return features, embeddings, said


def _image_retrieval(synthetic, real, labels, real_labels, left_out: str | None) -> dict:
    """IIR of synthetic images, and of real ones among the others of their kind, as what could be reached."""
    if left_out:
        return {key: {"left_out": left_out} for key in ("image_image", "image_image_real")}

    def halves() -> dict:
        order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
        one, other = order[: len(order) // 2], order[len(order) // 2 :]
        labels_one, labels_other = ([real_labels[i] for i in x] for x in (one, other))
        return image_image_retrieval(real[one], real[other], labels_one, labels_other)

    return {
        "image_image": retrieval_figure(lambda: image_image_retrieval(synthetic, real, labels, real_labels)),
        "image_image_real": retrieval_figure(halves),
    }


def judged(judges: Judges | None, sets: dict[str, ImageSet], said: dict, column: str, left_out: str | None) -> dict:
    """What the judges read of the findings that they know; each of them, and their mean."""
    if judges is None:
        return {"left_out": "no classifiers of the finding were given (--judges)"}
    if left_out:
        return {"left_out": left_out}
    known = {}
    for name in said:
        pairs = zip(sets[name].modalities, sets[name].column(column, range(len(sets[name].rows))))
        known[name] = [i for i, pair in enumerate(pairs) if pair in judges.classes]
        if not known[name]:
            return {"left_out": f"the classifiers know no finding of the {name} images"}

    def read(name: str, probabilities: Tensor) -> dict:
        numbers = known[name]
        asked = list(sets[name].modalities[numbers]), sets[name].column(column, numbers)
        sources = sets[name].column("source", numbers) if sets[name].has("source") else None
        return accuracy_report(probabilities[numbers], judges.classes, *asked, sources, judges.families)

    report: dict[str, Any] = {"names": list(judges.models), "each": {}}
    for judge in judges.models:
        report["each"][judge] = {name: read(name, said[name][judge]) for name in said}
    return report | {name: read(name, torch.stack(list(each.values())).mean(0)) for name, each in said.items()}


def acceptance(images: ImageSet, column: str | None) -> dict:
    """Which share of the images the filter accepted that drew them, as `minim generate` says in `accepted`.

    Args:
        column: of the finding; None leaves out the shares of findings.

    Returns:
        `value`: the mean over modalities of the mean over findings, and `modalities`, each with `value`, `n`, and
        `findings`; or `left_out`.
    """
    if not images.has("accepted"):
        return {"left_out": "no filter chose among the images"}
    accepted, found = np.array([row["accepted"] == "true" for row in images.rows]), {}
    for modality in dict.fromkeys(images.modalities.tolist()):
        index = images.of(modality)
        names = images.column(column, index) if column else [""] * len(index)
        shares = {name: {"value": accepted[index[own]].mean(), "n": len(own)} for name, own in places(names).items()}
        mean = np.mean([share["value"] for share in shares.values()])
        found[modality] = {"value": mean, "n": len(index)} | ({"findings": shares} if column else {})
    return _rounded({"value": np.mean([part["value"] for part in found.values()]), "modalities": found})


def _readings(judges: Judges | None, synthetic: ImageSet, probabilities: dict) -> list[str] | None:
    """What the judges take each synthetic image for, within its modality, such as "glioma 0.93"; or nothing."""
    if judges is None:
        return None
    readings = []
    for modality, p in zip(synthetic.modalities, probabilities["synthetic"]):
        known = [i for i, (name, _) in enumerate(judges.classes) if name == modality]
        best = max(known, key=lambda i: p[i], default=None)
        readings.append("" if best is None else f"{judges.classes[best][1]} {p[best] / p[known].sum():.2f}")
    return readings
