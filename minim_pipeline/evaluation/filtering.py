"""What the filter is worth: images with it and without it on the same seeds, read by judges that it never met.

All candidates of an image are drawn to their end, once; from the ratings along the way follows what each way of
choosing gives back (`choices`).
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ImageOps

from .. import MinimPipeline, resolve_modality
from ..contact_sheet import contact_sheet
from ..minim_filter import FilterHead, FilterHeadOutput
from ..minim_filter.funnel import accepted_first, plan_stages
from ..training.filter.candidates import Candidates, follow
from ..training.filter.report import other_findings, quality_report, rate
from .agreement import weighted_kappa
from .judges import class_of
from .metrics import bootstrap_interval


def judge_candidates(
    pipe: MinimPipeline, drawn: Candidates, modalities: list[str]
) -> tuple[torch.Tensor, list[str | None]]:
    """Whether the pipeline accepts each finished candidate, bool [N], and if not, why not."""
    device = pipe.filter_head.device
    quality, finding = drawn.quality[:, -1].to(device), drawn.finding[:, -1].to(device)
    realism = None if drawn.realism is None else drawn.realism[:, -1].to(device)
    finished = FilterHeadOutput(quality, finding, None, None, None, drawn.code.to(device), realism)
    _, accepted, reasons = pipe.judge(finished, [resolve_modality(name) for name in modalities])
    return accepted.cpu(), reasons


def choices(drawn: Candidates, accepted: torch.Tensor, head: FilterHead, candidates: int) -> dict[str, dict]:
    """By the name of a way to choose: `index` [M] of the candidate that comes back, and `samples` of the U-Net.

    - off: the first candidate;
    - filter: the funnel of the head's config, and at the end the best of what is left, accepted ones first;
    - best rated: the same, without the limit `enough` from which on more does not count;
    - filter, best rated at the end: both, but no candidate is dropped on the way;
    - CFG-Rejection (arXiv 2505.23343), high and low: candidates are left by the accumulated difference between the
      predictions with and without the prompt, at the same steps and the same cost, and no head is needed.
    """
    guided = (drawn.guidance > 0).any(0)
    score, every = (values.view(-1, candidates, values.shape[1]).clone() for values in (drawn.rank(head), drawn.score))
    for values in (score, every):
        values[:, :, -1] = accepted_first(values[:, :, -1], accepted.view(-1, candidates))  # at the end
    sums = drawn.guidance_sum.view_as(score)
    plans = plan_stages(head.config.stages, candidates)
    ways = {"filter": (score, plans), "filter at the end": (score, [])}
    ways |= {"best rated": (every, plans), "best rated at the end": (every, [])}
    ways |= {"CFG-Rejection, high": (sums, plans), "CFG-Rejection, low": (-sums, plans)}
    plain = int(guided.sum()) + len(guided)
    made = {"off": {"index": torch.zeros(len(score), dtype=torch.long), "samples": plain}}
    for name, (values, plan) in ways.items():
        index, samples = follow(values, drawn.levels, guided, plan)
        made[name] = {"index": index, "samples": samples}
    return made


def removed(off: torch.Tensor, on: torch.Tensor) -> float:
    """Share of the wrong images without a filter that are right with it, less those that it made wrong."""
    return 1 - (on.double().mean() / off.double().mean().clamp(min=1e-9)).item()


def compare_wrong(off: torch.Tensor, on: torch.Tensor) -> dict[str, Any]:
    """Wrong findings, bool [M] each, of the same slots; `None` for what too few of them tell nothing of."""
    figures: dict[str, Any] = {"wrong": round(on.double().mean().item(), 4), "removed": None, "interval": None}
    if off.any():
        figures["removed"] = round(removed(off, on), 4)
    # Of fewer a half may hold none, and a share of none is no number.
    if off.sum() >= 20:
        interval = bootstrap_interval(removed, off, on, paired=True, draws=1000)
        figures["interval"] = [round(value, 4) for value in interval]
    return figures


def rejections(pipe: MinimPipeline, rows: list[dict], images: torch.Tensor, seed: int) -> dict[str, dict]:
    """Share of pictures that the filter rejects: of those that it should, and of real val images as they are.

    Args:
        images: of the rows, uint8 [N, 3, H, W].
    """
    g = torch.Generator().manual_seed(seed)
    n, texts = len(rows), [row["Text"] for row in rows]
    modalities = [class_of(row)[0] for row in rows]
    level = torch.rand(n, 1, 1, 1, generator=g).expand(n, 3, *images.shape[2:])
    # Another modality's image, chosen at random, for the caption of this one.
    others = {m: [j for j in range(n) if modalities[j] != m] for m in dict.fromkeys(modalities)}
    other = [others[m][int(torch.randint(len(others[m]), (1,), generator=g))] for m in modalities]
    wrong = other_findings(rows, seed)
    wrong_texts = [texts[j] if j >= 0 else text for j, text in zip(wrong, texts, strict=True)]
    real = images.float() / 255
    cases = {
        "noise": (torch.rand(real.shape, generator=g), texts),
        "flat": (level, texts),
        "another modality": (real[other], texts),
        "another finding's caption": (real, wrong_texts),
        "real, own caption (false rejection)": (real, texts),
    }
    return {name: _rejected(pipe, x, captions, modalities) for name, (x, captions) in cases.items()}


def _rejected(pipe: MinimPipeline, images: torch.Tensor, texts: list[str], modalities: list[str]) -> dict[str, Any]:
    rejected: list[bool] = []
    reasons: list[str] = []
    for part in torch.arange(len(texts)).split(32):
        index = part.tolist()
        rated = pipe.score(images[part], [texts[i] for i in index], [modalities[i] for i in index])
        rejected += [not accepted for accepted in rated.accepted]
        reasons += [reason for reason in rated.reasons if reason]
    each = {
        name: round(float(np.mean([r for r, m in zip(rejected, modalities, strict=True) if m == name])), 4)
        for name in dict.fromkeys(modalities)
    }
    counts = {reason: reasons.count(reason) for reason in sorted(set(reasons))}
    return {
        "rejected": round(sum(rejected) / len(texts), 4),
        "n": len(texts),
        "reasons": counts,
        "modalities": each,
    }


def agreement_with_people(pipe: MinimPipeline, rows: list[dict], images: torch.Tensor) -> dict[str, Any]:
    """The head's quality against people's grades of images uint8 [N, 3, H, W]: areas under ROC curves, and kappa."""
    with torch.no_grad():
        latents = torch.cat([pipe.encode_images(x.to(pipe.device) / 127.5 - 1) for x in images.split(32)])
    quality = rate(pipe.filter_head, latents)
    by_head, grades = quality.round().long().tolist(), [int(row["rating"]) for row in rows]
    return {"auroc": quality_report(rows, quality), "kappa": weighted_kappa(by_head, grades), "n": len(rows)}


def save_filter_sheet(
    images: torch.Tensor,
    chosen: torch.Tensor,
    wrong: torch.Tensor,
    modalities: list[str],
    path: Path,
    columns: int = 12,
    side: int = 128,
) -> None:
    """Above, without the filter; below, with it: slots of each modality, evenly from those that differ.

    A bar below is green where the judges find what was asked for, else red.

    Args:
        images: uint8 [M * candidates, 3, H, W], those of a slot one after the other; the first is that without.
        chosen: int64 [M], the candidate of each slot that the filter gives back.
        wrong: bool [M * candidates], whether judges find something else.
        modalities: of each slot.
    """
    candidates, rows = len(images) // len(chosen), []
    for modality in dict.fromkeys(modalities):
        slots = [i for i, m in enumerate(modalities) if m == modality and chosen[i] != 0]
        slots = [slots[int(k)] for k in np.linspace(0, len(slots) - 1, min(columns, len(slots)))]
        for index in (torch.zeros_like(chosen), chosen):
            row = []
            for j in (i * candidates + int(index[i]) for i in slots):
                colour = (200, 60, 50) if wrong[j] else (40, 150, 80)
                row.append(ImageOps.expand(contact_sheet(images[j : j + 1], 1, side), (0, 0, 0, 6), colour))
            if row:
                rows.append(ImageOps.expand(contact_sheet(row, columns, blank="white"), (0, 0, 0, 6), "white"))
    if rows:
        contact_sheet(rows, 1).save(path)
