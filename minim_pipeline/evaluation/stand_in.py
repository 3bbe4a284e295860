"""A stand-in for a clinician, where none is at hand: two networks of part C give a generated image 1, 2 or 3.

A classifier says whether the image shows the finding, a judge of realism whether it could be real. Both learn from
part C of the train split, which neither the filter head (part A) nor the judges (part B) learn from. What a stand-in
says is not what a clinician would say, and wherever its ratings appear they are called a stand-in's.

How real an image looks is the share of real images of its finding that look less real, to judges that have not seen
them: part C goes in two halves, each half is judged by a network that learned from the other, and a generated image
by both. Real images go through the pipeline's autoencoder first, or its marks would be learned.

- 3: the finding is read as right, and the image looks as real as 30 % of the real ones.
- 1: the finding is read as less than half as likely as another (look-alikes do not count), or nine in ten real images
  look more real.
- 2: everything between.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from .judges import Judges, finds_asked, load_judges, merged_class


RATER = "stand-in"
# Shares of real images: below the first an image is rated 1, from the second on it may be rated 3.
LIMITS = (0.1, 0.3)
FOLDS = 2


class StandIn:
    """Rates images by the module's rule; trained by `research/stand_in.py`.

    Args:
        findings: the classifier of findings.
        realism: for each half of part C, the judge that has not seen it.
        scales: for each half, by "modality: finding" and by modality, its real images' realism in ascending order.
    """

    def __init__(self, findings: Judges, realism: list[Judges], scales: list[dict[str, list[float]]]):
        self.findings, self.realism, self.scales = findings, realism, scales

    @classmethod
    def from_pretrained(cls, path: str | Path, device: torch.device | str = "cpu") -> "StandIn":
        folder = Path(path)
        realism = [load_judges(folder / f"realism-{k}", device) for k in range(FOLDS)]
        scales = json.loads((folder / "scales.json").read_text())
        return cls(load_judges(folder / "findings", device), realism, scales)

    def save_pretrained(self, path: str | Path) -> None:
        """Writes all but the classifier of findings, whose training writes it."""
        for k, judge in enumerate(self.realism):
            judge.save_pretrained(Path(path) / f"realism-{k}")
        (Path(path) / "scales.json").write_text(json.dumps(self.scales) + "\n")

    def looks_real(self, images: Tensor, modalities: list[str], findings: list[str]) -> Tensor:
        """The share of real images that look less real than each of these: [N] in [0, 1]."""
        shares = []
        for judge, scales in zip(self.realism, self.scales, strict=True):
            share = realism_of(judge, images)
            for i, (modality, finding) in enumerate(zip(modalities, findings, strict=True)):
                scale = torch.tensor(scales.get(f"{modality}: {finding}") or scales[modality])
                share[i] = (scale < share[i]).double().mean()
            shares.append(share)
        return torch.stack(shares).mean(0)

    def rate(self, images: Tensor, modalities: list[str], findings: list[str]) -> list[int]:
        """Ratings, 1 to 3, of images uint8 [N, 3, H, W] for the findings asked for.

        Raises:
            ValueError: it has not learned a finding.
        """
        for key in dict.fromkeys(zip(modalities, findings, strict=True)):
            if key not in self.findings.classes:
                raise ValueError(f"This stand-in has not learned the finding {key[1]!r} of {key[0]!r}.")
        probabilities, real = self.findings.judge(images), self.looks_real(images, modalities, findings)
        right, ratings = finds_asked(probabilities, self.findings.classes, modalities, findings), []
        for i, (modality, finding) in enumerate(zip(modalities, findings, strict=True)):
            asked, other = 0.0, 0.0
            for key, probability in zip(self.findings.classes, probabilities[i].tolist(), strict=True):
                if key[0] == modality and merged_class(*key) == merged_class(modality, finding):
                    asked = max(asked, probability)
                elif key[0] == modality:
                    other = max(other, probability)
            if asked < other / 2 or real[i] < LIMITS[0]:
                ratings.append(1)
            else:
                ratings.append(3 if right[i] and real[i] >= LIMITS[1] else 2)
        return ratings


def realism_of(judge: Judges, images: Tensor) -> Tensor:
    """The log odds that images are real: fp32 [N]."""
    return torch.special.logit(judge.judge(images)[:, 1], eps=1e-6)
