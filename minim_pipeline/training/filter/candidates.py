"""Candidates drawn to their end, what the filter said of them at every step, and what it is to decide by.

A survivor of the funnel is the image that its seed draws alone (tests/minim_filter/test_filter.py), so what any plan
of dropping, its stages, would give back can be read from ratings of candidates that were all drawn to the end.
Thresholds are such that an asked-for share of generated images is accepted, or is right.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from ... import MinimPipeline, resolve_modality
from ...evaluation.sampling import batches, bytes_of, decode_latents, draw_batch, joined
from ...minim_filter import FilterHead
from ...minim_filter.funnel import combine, rank
from .estimates import watch_steps
from .report import auroc


Plan = list[tuple[int, int]]  # steps at whose ratings candidates are dropped, and how many are left then


@dataclass
class Candidates:
    """N candidates, S steps; the last of S + 1 ratings is that of the finished image. On the CPU."""

    quality: torch.Tensor  # [N, S + 1], expected ratings from 1 to 3
    finding: torch.Tensor  # [N, S + 1]
    guidance: torch.Tensor  # [N, S], `guidance_strength` of each step, 0 where it is not guided
    levels: torch.Tensor  # [S + 1], sigma / alpha of each step, 0 at the end
    code: torch.Tensor  # [N, B], of the finished images
    images: torch.Tensor  # uint8 [N, 3, H, W]
    realism: torch.Tensor | None = None  # [N, S + 1], log ratios, of a head that rates it

    @property
    def score(self) -> torch.Tensor:
        """[N, S + 1]"""
        return combine(self.quality, self.finding)

    @property
    def guidance_sum(self) -> torch.Tensor:
        """[N, S + 1], as the funnel has it when it rates."""
        total = self.guidance.cumsum(1)
        return torch.cat([total, total[:, -1:]], 1)

    def rank(self, head: FilterHead) -> torch.Tensor:
        """By what the funnel chooses, [N, S + 1]."""
        return rank(self.quality, self.finding, self.guidance_sum, self.realism, head.config)


@torch.no_grad()
def draw_candidates(
    pipe: MinimPipeline,
    prompts: Sequence[str],
    modalities: Sequence[str],
    seeds: Sequence[int],
    batch_size: int = 64,
    bf16: bool = False,
) -> Candidates:
    """Draws one candidate for each prompt, modality and seed at the pipeline's own settings.

    With `bf16` networks are autocast on a GPU; the filter's own arithmetic stays fp32.
    """
    parts = []
    for batch in batches(len(prompts), batch_size, "candidates"):
        texts, kinds = list(prompts[batch]), [resolve_modality(name) for name in modalities[batch]]
        funnel = pipe.prepare_funnel(texts, kinds, list(range(len(texts))), 1, pipe.device)
        with watch_steps(pipe, len(texts)) as steps:
            latents = draw_batch(pipe, texts, modalities[batch], seeds[batch], bf16)
        rated = [pipe.filter_head(*step[:3], text=funnel.text) for step in steps]
        decoded = decode_latents(pipe, latents, modalities[batch], bf16)
        # As the pipeline has the last word: on the picture, not on the latents that it was decoded from
        pictures = pipe.image_processor.postprocess(decoded, output_type="pil")
        rated.append(pipe.rate_pictures(pictures, texts, kinds, pipe.device))
        names = ("quality", "finding", "realism")[: 3 if pipe.filter_head.config.rates_realism else 2]
        ratings = {name: torch.stack([getattr(r, name) for r in rated], 1).cpu() for name in names}
        levels = torch.stack([angle[0].clamp(max=1.5707).tan() for _, _, angle, _ in steps]).cpu()
        guidance = torch.stack([moved for *_, moved in steps], 1).cpu()
        rest = {"code": rated[-1].code.cpu(), "images": bytes_of(decoded)}
        parts.append(Candidates(**ratings, guidance=guidance, levels=F.pad(levels, (0, 1)), **rest))
    return replace(joined(parts), levels=parts[0].levels)


def follow(
    score: torch.Tensor, levels: torch.Tensor, guided: torch.Tensor, plan: list[tuple[float, int]]
) -> tuple[torch.Tensor, int]:
    """What the funnel would do with candidates that were drawn to their end.

    Args:
        score: [M, K, S + 1], by which candidates of each of M images are dropped, and at last chosen.
        levels: [S + 1], as of `Candidates`.
        guided: bool [S], steps of which each sample costs two of the U-Net's.
        plan: (sigma / alpha, candidates left) as `plan_stages` gives them.

    Returns:
        The index [M] of the candidate that comes back, and the U-Net's samples that an image costs.
    """
    alive = torch.ones(score.shape[:2], dtype=torch.bool)
    left, samples, plan = score.shape[1], 0, list(plan)
    for i, level in enumerate(levels[:-1].tolist()):
        samples += left * (2 if guided[i] else 1)
        count = left
        while plan and level <= plan[0][0]:
            count = min(count, plan.pop(0)[1])
        if count < left:
            ranked = score[:, :, i].masked_fill(~alive, -torch.inf).sort(dim=1, descending=True, stable=True)
            alive = torch.zeros_like(alive).scatter(1, ranked.indices[:, :count], True)
            left = count
    return score[:, :, -1].masked_fill(~alive, -torch.inf).argmax(1), samples


def threshold(
    score: torch.Tensor,
    finding: torch.Tensor,
    floor: float,
    acceptance: float,
    right: torch.Tensor | None = None,
    precision: float | None = None,
) -> float:
    """The score from which generated images are accepted, given that their finding reaches its floor.

    Args:
        score, finding: [N].
        acceptance: share of all N to accept; less are accepted if the floor leaves less.
        right: bool [N], whether they show what they should; with `precision`, the share of accepted ones that has to.

    Raises:
        ValueError: no threshold reaches the precision with at least 20 images accepted.
    """
    reached = finding >= floor
    if precision is None or right is None:
        ranked = score.masked_fill(~reached, 1.0).sort(descending=True).values
        return ranked[max(1, round(acceptance * len(score))) - 1].item()
    order = score[reached].argsort(descending=True)
    share = right[reached][order].double().cumsum(0) / torch.arange(1, len(order) + 1)
    enough = ((share >= precision) & (torch.arange(1, len(order) + 1) >= 20)).nonzero()[:, 0]
    if not len(enough):
        best = share[19:].max().item() if len(share) >= 20 else math.nan
        raise ValueError(f"No threshold reaches a precision of {precision} with 20 images; the most is {best:.3f}.")
    return score[reached][order][enough[-1]].item()


def choose_stages(
    drawn: Candidates, candidates: int, most_cost: float, head: FilterHead
) -> tuple[list[tuple[float, float]], list[dict]]:
    """When to drop candidates: of all plans of one or two stages within the cost, that whose final ratings are best.

    Returns:
        Stages as in the head's config, and of the best plan of each cost: `gain`, the share it has of what is won by
        drawing all candidates to their end, and `cost` in plain images.

    Raises:
        ValueError: no plan is within `most_cost`.
    """
    score = drawn.rank(head).view(-1, candidates, drawn.score.shape[1])
    guided = (drawn.guidance > 0).any(0)
    plain = int(guided.sum()) + len(guided)
    final = score[:, :, -1]
    levels = drawn.levels.tolist()
    best: dict[float, tuple[float, Plan]] = {}
    for plan in plans(len(guided), candidates):
        by_level = [(min(levels[i], 1e3), k) for i, k in plan]
        chosen, samples = follow(score, drawn.levels.clamp(max=1e3), guided, by_level)
        won = final.gather(1, chosen[:, None]).mean() - final.mean()
        gain = (won / (final.amax(1).mean() - final.mean())).item()
        if samples / plain not in best or gain > best[samples / plain][0]:
            best[samples / plain] = gain, plan
    affordable = [(gain, -cost, plan) for cost, (gain, plan) in best.items() if cost <= most_cost]
    if not affordable:
        raise ValueError(f"No plan of {candidates} candidates costs at most {most_cost} plain images.")
    plan = max(affordable)[2]  # of equals the cheaper
    # Between a step's level and that before it, so that another number of steps finds its place.
    between = [1e3, *(math.sqrt(min(a, 1e3) * min(b, 1e3)) for a, b in itertools.pairwise(levels))]
    stages = [(round(between[i], 2), 0.0 if k == 1 else k / candidates) for i, k in plan]
    table = [{"cost": round(cost, 3), "gain": round(best[cost][0], 4), "plan": best[cost][1]} for cost in sorted(best)]
    return stages, table


def plans(steps: int, candidates: int) -> list[Plan]:
    """All of one stage, and of two of which the first leaves more than one."""
    one = [[(i, 1)] for i in range(steps)]
    return one + [[(i, k), (j, 1)] for i, j in itertools.combinations(range(steps), 2) for k in range(2, candidates)]


def foretelling(drawn: Candidates, right: torch.Tensor | None, known: torch.Tensor | None) -> list[dict]:
    """By noise level: how well a score tells the better half of final scores, and what classifiers read (AUROC).

    `right` and `known`, bool [N], say whether classifiers read the asked finding, and whether they know it.
    """
    table = []
    for i, level in enumerate(drawn.levels.tolist()):
        row = {"level": round(min(level, 1e3), 3)}
        row["final_score"] = auroc(drawn.score[:, i], drawn.score[:, -1] > drawn.score[:, -1].median())
        if right is not None:
            row["right_finding"] = auroc(drawn.finding[known, i], right[known])
        table.append(row)
    return table
