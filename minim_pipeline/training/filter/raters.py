"""People's ratings: read from a CSV, with what each rater adds to or takes from what the others would give."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ... import resolve_modality
from ...data.sources import read_dataset
from ...evaluation.agreement import rater_agreement, weighted_kappa
from ...finite import FiniteLoss


# Of the normal distribution that biases are taken to come from, in units of the head's score.
PRIOR_WIDTH = 1.0
# A bias has to move as far as the head's score does, in few steps: its learning rate, in those of the head.
BIAS_RATE = 50.0


def read_ratings(path: str | Path, check_images: bool = True) -> list[dict]:
    """People's grades of images; every bad row is told, with its number, before any work is done.

    Columns: `path,Text,modality,rating`, optionally `rater`, `part` and `group`. Rows without a rater share one; an
    image without a group is one of its own. An image in two groups would be learned from in the fold that it tests.
    With `check_images=False` images need not be there.
    """
    groups: dict[str, str] = {}

    def check(row: dict) -> None:
        resolve_modality(row["modality"])
        if row["rating"] not in ("1", "2", "3"):
            raise ValueError(f"rating has to be 1, 2 or 3, got {row['rating']!r}")
        group = row.get("group") or row["path"]
        if groups.setdefault(row["path"], group) != group:
            raise ValueError(f"{row['path']} is in group {group!r}, and in {groups[row['path']]!r} above")

    rows = read_dataset(path, require=("path", "Text", "modality", "rating"), check_images=check_images, check=check)
    return [row | {"rater": row.get("rater") or "", "group": row.get("group") or row["path"]} for row in rows]


def learned_from(row: dict, part: str) -> bool:
    """Whether a head that learns from `part` ("all": every part) takes this rating: never of a val image.

    Ratings that come without parts, as from a rating page, are taken.
    """
    return row.get("split") != "val" and (part == "all" or (row.get("part") or part) == part)


class Raters(nn.Module):
    """A bias for each rater: what is added to the head's score before the cuts of the cumulative link.

    Their mean is zero, so that the head speaks for the average rater.
    """

    def __init__(self, names: list[str]):
        super().__init__()
        self.names = sorted(set(names))
        self.raw = nn.Parameter(torch.zeros(len(self.names)))

    @property
    def bias(self) -> torch.Tensor:
        """[raters], in the order of `names`."""
        return self.raw - self.raw.mean()

    def index(self, names: list[str]) -> torch.Tensor:
        return torch.tensor([self.names.index(name) for name in names])

    def forward(self, rater: torch.Tensor) -> torch.Tensor:
        """Biases (N,) of raters int64 (N,); 0 where that is -1."""
        return torch.where(rater >= 0, self.bias[rater.clamp(min=0)], 0.0)

    def penalty(self, ratings: int) -> torch.Tensor:
        """The prior's negative log density, a rating's share of it."""
        return (self.bias / PRIOR_WIDTH).square().sum() / 2 / max(1, ratings)


def learn_from_raters(
    parameters: Iterable[nn.Parameter],
    raters: Raters,
    loss: Callable[[int], torch.Tensor],
    steps: int,
    learning_rate: float,
    max_grad_norm: float,
) -> None:
    """Steps of AdamW on parameters of a head and biases of raters, at a rate that falls by half a cosine.

    `loss` gives that of a step, from 0 on; raises ValueError if one is not finite.
    """
    learning, finite = list(parameters), FiniteLoss()
    groups: list[dict[str, Any]] = [{"params": learning}, {"params": raters.parameters(), "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, weight_decay=0.05)
    for step in range(steps):
        for group, scale in zip(optimizer.param_groups, (1.0, BIAS_RATE), strict=True):
            group["lr"] = learning_rate * scale * 0.5 * (1 + math.cos(math.pi * step / steps))
        value = loss(step)
        value.backward()
        nn.utils.clip_grad_norm_(learning, max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        finite.add(value, step + 1)
    finite.check()


def raters_report(ratings: list[dict], raters: Raters, guesses: torch.Tensor | None) -> dict:
    """Biases, agreement between raters, and of the head with them.

    `guesses` is the quality [N] by heads that have not learned from the images, if there are any.
    """
    counts = {name: sum(row["rater"] == name for row in ratings) for name in raters.names}
    biases = dict(zip(raters.names, raters.bias.tolist(), strict=True))
    report = {"raters": {name: {"bias": round(biases[name], 4), "n": counts[name]} for name in raters.names}}
    report["agreement"] = {"between_raters": rater_agreement(ratings)}
    if guesses is not None:
        by_head = guesses.round().long().tolist()
        report["agreement"]["head"] = {}
        for name in ["all", *raters.names]:
            own = [i for i, row in enumerate(ratings) if name in ("all", row["rater"])]
            kappa = weighted_kappa([by_head[i] for i in own], [int(ratings[i]["rating"]) for i in own])
            report["agreement"]["head"][name] = {"kappa": kappa, "n": len(own)}
    return report
