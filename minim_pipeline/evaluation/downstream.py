"""What synthetic images are worth as training data: classifiers of the finding, trained with them, read real images.

- All the real images of a train set, and as many synthetic ones in their stead: the ratio of the two accuracies is the
  classification accuracy score, CAS (arXiv 1905.10887), over the score of real images.
- A share of the real images (10 %), and with them 100 to 2000 % as many synthetic ones: MINIM's curve. There are two
  settings, and what they promise differs. "Data sharing": the generator has seen all real images, the classifier only
  its share, as where a hospital with few images is given a generator that was trained elsewhere. "Honest low data":
  the generator has seen no other images than the classifier's.

A classifier has the same number of steps whatever it learns from, and where it learns from real and synthetic images,
half of what it sees is real however many synthetic ones there are. Each condition is trained with several seeds. All
classifiers tell all findings of all modalities apart, and are judged within the modality.
"""

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from tqdm.auto import tqdm

from ..cache import cached_tensor
from ..captions import may_mirror
from ..mapped import Rows, select
from ..modalities import resolve_modality
from ..pipeline_minim import MinimPipeline
from .classifier import Recipe, make_classifier, train_classifier
from .judges import Class, Judges, claimed_classes, class_of, finds_asked
from .metrics import drawn_within, interval_of, places
from .sampling import draw_images


MEANING = {
    "data_sharing": "The generator was trained on all real images, the classifier has only its share of them.",
    "honest_low_data": "The generator's U-Net was trained on no other real images than the classifier's share.",
}


@dataclass(frozen=True)
class Labelled:
    """Images uint8 [N, 3, S, S] and the class of each, int64 [N]."""

    images: Rows
    labels: Tensor

    def __getitem__(self, index: slice | list[int]) -> "Labelled":
        return Labelled(select(self.images, index), self.labels[index])


# Given rows of real images and a number, so many synthetic images for each: round after round, in the rows' order.
Source = Callable[[list[dict], int], Rows]


class TooFewImages(ValueError):
    """A source has fewer images than were asked for."""


def take_share(rows: list[dict], share: float, column: str = "finding", seed: int = 0) -> list[dict]:
    """A share of `rows`, the same of every finding of every modality and at least one of each; in their order."""
    generator, groups = random.Random(seed), places(class_of(row, column) for row in rows).values()
    chosen = [i for index in groups for i in generator.sample(index, max(1, round(share * len(index))))]
    return [rows[i] for i in sorted(chosen)]


def drawn_by(
    pipe: MinimPipeline,
    state: PartialState,
    folder: Path,
    resolution: int,
    batch_size: int,
    identity: str,
    **settings: Any,
) -> Source:
    """Draws from the captions of the rows; image i has seed i. Processes share the work, and files keep it.

    Args:
        folder: where the images are cached, so that a run that was stopped goes on from there.
        identity: of the model, so that images of another one are not taken for its own.
        settings: of the pipeline's call.
    """

    def draw(rows: list[dict], copies: int) -> Tensor:
        total = len(rows) * copies
        prompts, modalities = [row["Text"] for row in rows] * copies, [row["modality"] for row in rows] * copies
        parts = np.array_split(np.arange(total), max(1, total // 128))

        def part(i: int) -> Tensor:
            seeds = parts[i].tolist()
            asked = [prompts[j] for j in seeds], [modalities[j] for j in seeds], seeds
            key = hashlib.sha256(json.dumps([identity, resolution, settings, asked]).encode()).hexdigest()
            file = folder / f"{total:06d}-{i:03d}.safetensors"
            return cached_tensor(file, key, lambda: draw_images(pipe, *asked, batch_size, resolution, **settings))

        for i in range(state.process_index, len(parts), state.num_processes):
            part(i)
        state.wait_for_everyone()
        return torch.cat([part(i) for i in range(len(parts))])

    return draw


def taken_from(images: Rows, rows: list[dict], column: str = "finding") -> Source:
    """Takes synthetic images that are there already, each at most once, by the finding of the rows."""
    stock = places(class_of(row, column) for row in rows)

    def take(wanted: list[dict], copies: int) -> Rows:
        left = {key: iter(index) for key, index in stock.items()}
        chosen = [next(left.get(class_of(row, column), iter(())), None) for row in wanted * copies]
        if None in chosen:
            short = class_of((wanted * copies)[chosen.index(None)], column)
            have = len(stock.get(short, []))
            raise TooFewImages(f"{have} synthetic images of {': '.join(short)}, more are needed for {100 * copies} %")
        return select(images, chosen)

    return take


@dataclass(frozen=True, kw_only=True)
class Design:
    """How classifiers are trained and compared.

    Args:
        recipe: how each is trained; its seed is replaced.
        percents: synthetic images added to those of the low-data settings, per cent of them; multiples of 100.
        column: of the finding.
        architecture, width: as of `make_classifier`.
        min_train, min_val: findings with fewer images are left out.
    """

    recipe: Recipe
    percents: Sequence[int]
    seeds: Sequence[int] = (0, 1, 2)
    column: str = "finding"
    architecture: str = "resnet"
    width: int = 32
    min_train: int = 20
    min_val: int = 9


class Classifiers:
    """The classifiers of all conditions and seeds; what each says of the val images is cached in `folder`."""

    def __init__(self, design: Design, classes: list[Class], val: Labelled, folder: Path, device: torch.device):
        self.design, self.classes, self.val, self.folder, self.device = design, classes, val, folder, device
        modalities = [resolve_modality(modality) for modality, _ in classes]
        # The caption is not learned: only a finding with a side forbids it.
        flip = [may_mirror(m, finding) for m, (_, finding) in zip(modalities, classes, strict=True)]
        self.flip = torch.tensor(flip, device=device)
        self.grey = torch.tensor([m.grey for m in modalities], device=device)

    def say(self, name: str, parts: list[Labelled], seed: int) -> Tensor:
        """Probabilities [n, classes] on the val images of a classifier that was trained on `parts`."""
        design, digest = self.design, hashlib.sha256()
        for tensor in [self.val.images, *(tensor for part in parts for tensor in (part.images, part.labels))]:
            for some in tensor.split(256):
                digest.update(some.contiguous().numpy().data)
        key = json.dumps([digest.hexdigest(), self.classes, design.architecture, design.width, asdict(design.recipe)])
        file = self.folder / f"{name.replace('_', '-')}-{seed}.safetensors"
        return cached_tensor(file, key, lambda: self.train(name, parts, seed))

    def train(self, name: str, parts: list[Labelled], seed: int) -> Tensor:
        torch.manual_seed(seed)
        model = make_classifier(self.design.architecture, len(self.classes), self.design.width)
        images = torch.cat([part.images[:] for part in parts]).to(self.device)
        labels = torch.cat([part.labels for part in parts]).to(self.device)
        origin = torch.cat([torch.full_like(part.labels, i) for i, part in enumerate(parts)]).to(self.device)
        recipe = replace(self.design.recipe, seed=seed)
        flags = self.flip[labels], self.grey[labels]
        title = f"{name.replace('_', ' ')}, seed {seed}"
        model = train_classifier(model, images, labels, *flags, recipe, title, origin)
        return Judges({"cnn": model}, self.classes, recipe.resolution).judge(self.val.images)

    def score(self, name: str, parts: list[Labelled]) -> "Score":
        asked = [self.classes[i] for i in self.val.labels.tolist()]
        modalities, findings = map(list, zip(*asked))
        said = [self.say(name, parts, seed) for seed in self.design.seeds]
        right = np.stack([finds_asked(each, self.classes, modalities, findings) for each in said])
        return Score(right, asked, sum(len(part.labels) for part in parts))


Conditions = dict[str, list[Labelled] | str]


def conditions_of(
    rows: list[dict],
    real: Labelled,
    low_rows: list[dict],
    low: Labelled,
    sources: dict[str, Source],
    percents: Sequence[int],
) -> Conditions:
    """By name what classifiers learn from, put together when their turn comes; or why it cannot be had."""
    conditions: Conditions = {"real": [real], "low": [low]}
    try:
        conditions["synthetic"] = [Labelled(next(iter(sources.values()))(rows, 1), real.labels)]
    except TooFewImages as error:
        conditions["synthetic"] = str(error)
    for setting, source in sources.items():
        # The largest first: the smaller ones are its beginning.
        most = None
        for percent in sorted(percents, reverse=True):
            name, copies = f"{setting}_{percent}", percent // 100
            try:
                if most is None:
                    most = Labelled(source(low_rows, copies), low.labels.repeat(copies))
                conditions[name] = [low, most[: len(low_rows) * copies]]
            except TooFewImages as error:
                conditions[name] = str(error)
    return conditions


def downstream(
    train: tuple[list[dict], Rows],
    val: tuple[list[dict], Rows],
    low_rows: list[dict],
    sources: dict[str, Source],
    folder: Path,
    state: PartialState,
    design: Design,
) -> dict:
    """Trains every classifier and compares what they read right on real val images.

    Args:
        train, val: rows and their images, uint8 [N, 3, S, S].
        low_rows: the rows of `train` that the low-data settings have.
        sources: "data_sharing" and, if there is one, "honest_low_data": where their synthetic images come from.
        folder: holds what each classifier said on the val images; a run that was stopped goes on from there.
        state: its processes share the classifiers.

    Returns:
        `real`, `synthetic`: accuracy (mean over modalities and seeds), a 95 % interval over seeds and val images,
            accuracies of the seeds, and the same per modality;
        `cas_ratio`: synthetic over real, with an interval of paired draws;
        `low_data`: for each setting `real`, `points` (accuracy and gain over real for each per cent), `gain` at the
            largest per cent; `settings`. What could not be had has `left_out` with the reason.
    """
    column = design.column
    classes = claimed_classes(train[0], val[0], design.min_train, design.min_val, column)
    if not classes:
        return {"left_out": f"no finding has {design.min_train} train and {design.min_val} val images"}

    def labelled(rows: list[dict], images: Rows) -> Labelled:
        known = [i for i, row in enumerate(rows) if class_of(row, column) in classes]
        return Labelled(select(images, known), torch.tensor([classes.index(class_of(rows[i], column)) for i in known]))

    rows, low_rows = ([row for row in some if class_of(row, column) in classes] for some in (train[0], low_rows))
    real, val_set = labelled(*train), labelled(*val)
    position = {id(row): i for i, row in enumerate(rows)}
    low = real[[position[id(row)] for row in low_rows]]
    conditions = conditions_of(rows, real, low_rows, low, sources, design.percents)
    possible = {name: parts for name, parts in conditions.items() if not isinstance(parts, str)}

    classifiers = Classifiers(design, classes, val_set, folder, state.device)
    jobs = [(name, parts, seed) for name, parts in possible.items() for seed in design.seeds]
    for job in tqdm(jobs[state.process_index :: state.num_processes], "classifiers"):
        classifiers.say(*job)
    state.wait_for_everyone()
    scores = {name: classifiers.score(name, parts) for name, parts in possible.items()}
    settings = {name: value for name, value in asdict(design.recipe).items() if name != "seed"} | {
        "architecture": design.architecture,
        "width": design.width,
        "seeds": list(design.seeds),
        "findings": len(classes),
        "share_of_real_images": round(len(low.labels) / len(real.labels), 3),
        "n_val": len(val_set.labels),
    }
    return {"settings": settings, **_report(scores, conditions, list(sources), sorted(design.percents))}


def _report(scores: dict[str, "Score"], conditions: Conditions, settings: list[str], percents: list[int]) -> dict:
    """What the conditions reached, beside each other."""

    def result(name: str) -> dict:
        return scores[name].report() if name in scores else {"left_out": conditions[name]}

    low_data = {}
    for setting in settings:
        names = {percent: f"{setting}_{percent}" for percent in percents}
        gains = {p: _compare(scores, name, "low", conditions, lambda a, b: a - b) for p, name in names.items()}
        low_data[setting] = {
            "meaning": MEANING.get(setting, ""),
            "real": result("low"),
            "points": [{"percent": p, **result(name), "gain": gains[p]} for p, name in names.items()],
            "gain": gains[max(names)],
            "gain_at": max(names),
        }
    return {
        "real": result("real"),
        "synthetic": result("synthetic"),
        "cas_ratio": _compare(scores, "synthetic", "real", conditions, lambda a, b: a / b),
        "low_data": low_data,
    }


class Score:
    """What the classifiers of one condition read right: bool [seeds, n], and the class of each image."""

    def __init__(self, right: np.ndarray, classes: Sequence[Class], n_train: int):
        self.right, self.classes, self.n_train = right, classes, n_train
        self.index = places(modality for modality, _ in classes)

    def of(self, name: str, draws: int = 0) -> np.ndarray:
        """Balanced accuracy of a modality, mean over seeds: [1], or for seeds and images drawn anew: [draws].

        The same ones are drawn for every condition, so that two of them can be compared draw by draw.
        """
        generator, index, count = np.random.default_rng(0), self.index[name], len(self.right)
        seeds = generator.integers(0, count, (draws, count)) if draws else np.arange(count)[None]
        right = self.right[seeds].mean(1)[:, index]  # [draws or 1, n]
        findings = [self.classes[i][1] for i in index]
        whole = [np.array(own)[None] for own in places(findings).values()]
        drawn = drawn_within(findings, draws, generator) if draws else whole
        return np.mean([np.take_along_axis(right, own, 1).mean(1) for own in drawn], 0)

    def total(self, draws: int = 0) -> np.ndarray:
        return np.mean([self.of(name, draws) for name in self.index], 0)

    def report(self) -> dict:
        each_seed = (Score(right[None], self.classes, self.n_train).total() for right in self.right)
        return _figure(self.total, "accuracy") | {
            "n_train": self.n_train,
            "seeds": [round(float(total[0]), 4) for total in each_seed],
            "modalities": {name: _figure(partial(self.of, name), "accuracy") for name in self.index},
        }


def _figure(of: Callable[[int], np.ndarray], key: str = "value") -> dict:
    """A figure and its interval, from what gives it without draws and for many."""
    return {key: round(float(of(0)[0]), 4), "interval": interval_of(of(1000))}


def _compare(scores: dict, first: str, second: str, conditions: dict, how: Callable) -> dict:
    """One condition against another, in all and per modality, with intervals of paired draws."""
    if first not in scores:
        return {"left_out": conditions[first]}
    a, b = scores[first], scores[second]

    def part(name: str, draws: int) -> np.ndarray:
        return how(a.of(name, draws), b.of(name, draws))

    each = {name: _figure(partial(part, name)) for name in a.index}
    return _figure(lambda draws: how(a.total(draws), b.total(draws))) | {"modalities": each}
