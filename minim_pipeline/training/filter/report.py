"""How well the head rates: areas under ROC curves on images that it has not learned from."""

import math
import random
from collections.abc import Callable

import torch
from torchmetrics.functional.classification import binary_auroc

from ...evaluation.judges import class_of, families_of, merged_class
from ...minim_filter import FilterHead
from ...minim_filter.estimate import noise_angles
from ...modalities import resolve_modality
from ...tokens import tokenize
from .estimates import NoisedEstimates


LEVELS = (0.0, 1.0, 2.6, 4.0)


def auroc(scores: torch.Tensor, right: torch.Tensor) -> float:
    return round(binary_auroc(scores.float(), right.long()).item(), 4)


def other_findings(rows: list[dict], seed: int) -> list[int]:
    """For every row another one of the same modality and another finding, whose caption is then wrong for it."""
    generator = random.Random(seed)
    keys = [class_of(row) for row in rows]
    pools = [[j for j, b in enumerate(keys) if b[0] == a[0] and b != a] for a in keys]
    return [generator.choice(pool) if pool else -1 for pool in pools]


def text_of(row: dict) -> str:
    """The caption of a row as the head is asked, with the modality's token."""
    return f"{resolve_modality(row['modality']).token} {row['Text']}"


@torch.no_grad()
def rate_at(
    head: FilterHead,
    estimates: NoisedEstimates,
    level: float,
    latents: torch.Tensor,
    ids: torch.Tensor,
    noise: torch.Tensor,
    part: str,
) -> torch.Tensor:
    """A `part` of what the head says, [N] on the CPU, of latents [N, C, h, w] noised to a level sigma / alpha.

    For captions of token ids [N, L], in the noise given; 0 leaves the latents as they are.
    """
    device, rated = head.device, []
    steps = torch.arange(len(estimates.alphas_cumprod), device=device)
    t = (noise_angles(estimates.alphas_cumprod, steps) - math.atan(level)).abs().argmin()
    for x, asked, e in zip(latents.split(128), ids.split(128), noise.split(128), strict=True):
        x, asked = x.to(device).float(), asked.to(device)
        held = estimates(x, t.expand(len(x)), asked, e.to(device)) if level else (x, x, x.new_zeros(len(x)))
        rated.append(getattr(head(*held, asked), part).cpu())
    return torch.cat(rated)


def separation(high: torch.Tensor, low: torch.Tensor) -> float:
    """The area under the ROC curve by which ratings [N] lie above others [M]."""
    scores = torch.cat([high, low])
    return auroc(scores, torch.arange(len(scores)) < len(high))


def separations(high: torch.Tensor, low: torch.Tensor, modalities: list[str]) -> dict:
    """`separation` of ratings [N] and [N] as `auroc`, and of those of each modality as `modalities`."""
    own = {name: torch.tensor([m == name for m in modalities]) for name in dict.fromkeys(modalities)}
    by_modality = {name: separation(high[which], low[which]) for name, which in own.items()}
    return {"auroc": separation(high, low), "modalities": by_modality}


def finding_report(
    head: FilterHead, estimates: NoisedEstimates, rows: list[dict], latents: torch.Tensor, seed: int
) -> dict:
    """Right captions against wrong ones, by the finding's rating, at several noise levels sigma / alpha.

    Every image is rated twice, for its own caption and for one of another finding of its modality, in the same noise.
    By level: `auroc` over all images, `auroc_unlike` without pairs that look alike, `modalities`, and `n` images.
    """
    wrong = other_findings(rows, seed)
    index = [i for i, j in enumerate(wrong) if j >= 0]
    ids = tokenize(estimates.tokenizer, [text_of(row) for row in rows])
    own, other = torch.tensor(index), torch.tensor([wrong[i] for i in index])
    names = [class_of(rows[i])[0] for i in index]
    families = families_of(rows)
    merged = [merged_class(*class_of(row), families) for row in rows]
    alike = torch.tensor([merged[i] == merged[wrong[i]] for i in index])
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    report = {}
    for level in LEVELS:
        held = head, estimates, level, latents[own]
        high, low = (rate_at(*held, ids[captions], noise[own], "finding") for captions in (own, other))
        report[str(level)] = separations(high, low, names)
        report[str(level)] |= {"auroc_unlike": separation(high[~alike], low[~alike]), "n": len(own)}
    return report


def folds_by_group(rows: list[dict], count: int, seed: int) -> list[int]:
    """The fold of each row; rows of one group share it."""
    groups = sorted({row["group"] for row in rows})
    random.Random(seed).shuffle(groups)
    fold = {group: i % count for i, group in enumerate(groups)}
    return [fold[row["group"]] for row in rows]


@torch.no_grad()
def rate(head: FilterHead, latents: torch.Tensor, part: str = "quality") -> torch.Tensor:
    """Quality, or realism, [N] on the CPU, of finished images, latents [N, C, h, w]; no text takes part in it."""
    text, rated = torch.zeros(1, head.config.text_width, device=head.device), []
    for x in latents.split(128):
        x = x.to(head.device).float()
        rated.append(getattr(head(x, x, x.new_zeros(len(x)), text=text.expand(len(x), -1)), part).cpu())
    return torch.cat(rated)


def cross_validate(
    ratings: list[dict], folds: int, seed: int, train: Callable[[list[int], int], FilterHead], latents: torch.Tensor
) -> torch.Tensor:
    """The quality [N] that a head gives each rated image, latents [N, C, h, w], whose fold it has not learned from.

    `train` makes a head that has learned from some ratings, given their indices and the fold's number.
    """
    fold = folds_by_group(ratings, folds, seed)
    guesses = torch.zeros(len(ratings))
    for i in range(folds):
        tested = [j for j, f in enumerate(fold) if f == i]
        head = train([j for j, f in enumerate(fold) if f != i], i)
        guesses[tested] = rate(head, latents[tested])
    return guesses


def quality_report(ratings: list[dict], guesses: torch.Tensor) -> dict:
    """Good (3) against the others (1 and 2), over all and by source; and 3 against 2."""
    grades = torch.tensor([int(row["rating"]) for row in ratings])
    sources = [row.get("source", "") for row in ratings]
    report = {}
    for name in ("all", *sorted(set(sources))):
        which = torch.tensor([name in ("all", source) for source in sources])
        report[name] = {"n": int(which.sum()), "3_against_1_and_2": auroc(guesses[which], grades[which] == 3)}
        which &= grades != 1
        if len(set(grades[which].tolist())) == 2:
            report[name]["3_against_2"] = auroc(guesses[which], grades[which] == 3)
    return report
