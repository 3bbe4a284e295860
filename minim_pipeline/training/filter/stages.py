"""When the funnel drops candidates: found on candidates that were all drawn to their end."""

import itertools
import math

import torch

from ...minim_filter import FilterHead
from .candidates import Candidates, follow
from .report import auroc


Plan = list[tuple[int, int]]  # steps at whose ratings candidates are dropped, and how many are left then


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
    stages = [
        (
            round(math.sqrt(min(levels[i], 1e3) * min(levels[i - 1], 1e3)) if i else 1e3, 2),
            0.0 if k == 1 else k / candidates,
        )
        for i, k in plan
    ]
    table = [{"cost": round(cost, 3), "gain": round(best[cost][0], 4), "plan": best[cost][1]} for cost in sorted(best)]
    return stages, table


def plans(steps: int, candidates: int) -> list[Plan]:
    """All of one stage, and of two of which the first leaves more than one."""
    one = [[(i, 1)] for i in range(steps)]
    return one + [[(i, k), (j, 1)] for i, j in itertools.combinations(range(steps), 2) for k in range(2, candidates)]


def foretelling(drawn: Candidates, right: torch.Tensor | None, known: torch.Tensor | None) -> list[dict]:
    """By noise level: how well a score tells the better half of final scores, and what classifiers read (AUROC).

    Args:
        right, known: bool [N], whether classifiers read the asked finding, and whether they know it; or None.
    """
    table = []
    for i, level in enumerate(drawn.levels.tolist()):
        row = {"level": round(min(level, 1e3), 3)}
        row["final_score"] = auroc(drawn.score[:, i], drawn.score[:, -1] > drawn.score[:, -1].median())
        if right is not None:
            row["right_finding"] = auroc(drawn.finding[known, i], right[known])
        table.append(row)
    return table
