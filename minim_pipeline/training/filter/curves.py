"""Pictures of a calibration: shares accepted, and how early scores foretell."""

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure

from ...modalities import resolve_modality


def acceptance_curves(
    score: torch.Tensor, finding: torch.Tensor, modalities: list[str], calibration: dict[str, dict], path: Path
) -> None:
    """Share of generated images accepted against the score asked for, a line for each modality.

    Args:
        score, finding: [N], of finished images.
        modalities: id of each.
        calibration: thresholds by modality id, as in the head's config.
    """
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    asked = torch.linspace(1, 3, 201)
    for i, (name, thresholds) in enumerate(calibration.items()):
        own = torch.tensor([m == name for m in modalities])
        able = score[own].masked_fill(finding[own] < thresholds["finding"], 0)
        share = [(able >= s).double().mean().item() * 100 for s in asked]
        axes.plot(asked, share, color=f"C{i}", label=resolve_modality(name).name)
        at = thresholds["score"]
        axes.plot([at], [(able >= at).double().mean().item() * 100], "o", color=f"C{i}")
    axes.set(xlabel="score asked for (1 to 3)", ylabel="generated images accepted (%)", xlim=(1, 3), ylim=(0, 100))
    axes.grid(alpha=0.2)
    axes.legend(title="modality; dots: thresholds")
    figure.savefig(path, dpi=120)


def noise_curves(table: list[dict], stages: Sequence[tuple[float, float]], path: Path) -> None:
    """How well scores foretell (`stages.foretelling`), against the noise level; where candidates are dropped."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, label in (("final_score", "final score above its median"), ("right_finding", "finding read as right")):
        if name in table[0]:
            points = [(row["level"], row[name]) for row in table if 0 < row["level"] < 1e3]
            axes.plot(*zip(*points, strict=True), "o-", markersize=3, label=label)
    for i, (level, _) in enumerate(stages):
        axes.axvline(level, color="0.5", linestyle=":", label=None if i else "candidates are dropped")
    axes.set(xscale="log", xlabel="noise level (sigma / alpha)", ylabel="AUROC of the score at that level")
    axes.invert_xaxis()
    axes.grid(alpha=0.2)
    axes.legend()
    figure.savefig(path, dpi=120)
