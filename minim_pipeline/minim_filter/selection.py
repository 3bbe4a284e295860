"""Selection: which candidates are accepted, which comes back for each image, and what is drawn again.

Rejection sampling by a learned score, as in Discriminator Rejection Sampling (arXiv 1810.06758), with a bound on the
rounds: what falls short until then comes back too, and says so.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from ..modalities import Modality
from ..notices import warn_once
from .filter_head import FilterHead, FilterHeadOutput
from .fingerprints import distances
from .funnel import REASONS, Funnel, accepted_first, combine, weaker


# Of people's, from which on a modality's thresholds are said to be calibrated.
FEWEST_RATINGS = 20


@dataclass(frozen=True)
class Thresholds:
    """From when on an image of a modality is accepted.

    The defaults are those of a modality that the filter was not calibrated for: the middle of the scale.

    Args:
        score: least score in [1, 3], of quality and finding together (see `combine`).
        finding: least rating in [1, 3] of the finding alone.
        copy: bits by which the fingerprint of a copy differs at most; -1 where no copies are known.
        ratings: how many of people's the filter has learned.
        realism: least log ratio of `FilterHeadOutput.realism`; None where it does not count.
    """

    score: float = 2.0
    finding: float = 2.0
    copy: int = -1
    ratings: int = 0
    realism: float | None = None

    @classmethod
    def read(cls, calibration: dict[str, dict] | None) -> dict[str, "Thresholds"]:
        """By modality id those of `FilterHead.config.calibration`; what an older head's lack has its default."""
        return {name: cls(**entry) for name, entry in (calibration or {}).items()}

    @classmethod
    def of(cls, config, modality_id: str) -> "Thresholds":
        """Those of one modality in the config of a filter head."""
        return cls.read(config.calibration).get(modality_id, cls())

    def entry(self) -> dict[str, float]:
        """As `FilterHead.config.calibration` has it: what does not count is left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def thresholds_of(head: FilterHead, modalities: list[Modality]) -> list[Thresholds]:
    """Those of each image; warns once of a modality for which they were not calibrated, or not by people."""
    known = Thresholds.read(head.config.calibration)
    for name in dict.fromkeys(modality.id for modality in modalities):
        if name not in known:
            warn_once(
                f"The filter's thresholds are not calibrated for {name}; those taken are {Thresholds.score} of 3 for"
                f" the score and {Thresholds.finding} for the finding."
            )
        elif known[name].ratings < FEWEST_RATINGS:
            warn_once(
                f"The filter's thresholds for {name} are not calibrated by people, who rated fewer than"
                f" {FEWEST_RATINGS} images of it: what is good there follows a rubric."
            )
    return [known.get(modality.id, Thresholds()) for modality in modalities]


def are_copies(head: FilterHead, rated: FilterHeadOutput, thresholds: list[Thresholds]) -> torch.Tensor:
    """Which finished images are copies of training images, as the head's fingerprints know them: bool (N,)."""
    limits = torch.tensor([t.copy for t in thresholds], device=rated.code.device)
    return distances(rated.code, head.fingerprints) <= limits


def look_real(rated: FilterHeadOutput, thresholds: list[Thresholds]) -> torch.Tensor:
    """Which images reach the realism of their thresholds: bool (N,); all of a head that does not rate it."""
    if rated.realism is None:
        return torch.ones(len(thresholds), dtype=torch.bool, device=rated.finding.device)
    least = [-torch.inf if t.realism is None else t.realism for t in thresholds]
    return rated.realism >= rated.realism.new_tensor(least)


def judge(
    head: FilterHead,
    rated: FilterHeadOutput,
    modalities: list[Modality],
    filter_threshold: float | None = None,
    reject_copies: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, list[str | None]]:
    """Scores (N,) in [1, 3]; bool (N,), whether finished images are accepted; and if not, why not.

    Accepted is an image whose score, finding and realism reach the thresholds of its modality, and that is no copy
    of a training image. `filter_threshold` takes the place of the score's.
    """
    thresholds = thresholds_of(head, modalities)
    scores = combine(rated.quality, rated.finding)
    least = scores.new_tensor([t.score if filter_threshold is None else filter_threshold for t in thresholds])
    least_finding = scores.new_tensor([t.finding for t in thresholds])
    real = look_real(rated, thresholds)
    reason = torch.where(real, weaker(rated), REASONS.index("realism"))
    reason = torch.where(rated.finding < least_finding, REASONS.index("finding"), reason)
    passed = (scores >= least) & (rated.finding >= least_finding) & real
    if reject_copies:
        copies = are_copies(head, rated, thresholds)
        reason, passed = torch.where(copies, REASONS.index("copy"), reason), passed & ~copies
    return scores, passed, [None if p else REASONS[r] for p, r in zip(passed.tolist(), reason.tolist())]


def choose_best(
    funnel: Funnel, rated: FilterHeadOutput, passed: torch.Tensor, reasons: list[str | None]
) -> tuple[list[int], list[tuple[int, str | None]]]:
    """The best candidate of each image of a round: one that is accepted before one that is not.

    Args:
        funnel: of the round, which is left with the best.
        rated: its ratings of the finished latents of those still in it, (m,); `passed`, `reasons`: as `judge` has it.

    Returns:
        For each image the index of its best among those m; image and reason of each candidate that is not chosen.
    """
    images = funnel.image[funnel.alive].tolist()
    best = funnel.keep(accepted_first(funnel.rank(rated), passed), 1).tolist()
    others = [(image, reason) for k, (image, reason) in enumerate(zip(images, reasons)) if k not in best]
    return best, funnel.dropped + others


@dataclass
class RoundResult:
    """What a round gives for each of its images; without a filter, all but `images` and `candidates` is empty.

    Args:
        images: pixels (n, 3, H, W) in about [-1, 1], or latents (n, C, h, w).
        candidates: of which each was chosen: indices into the round's batch.
        scores, accepted: the filter's word on each picture.
        rejected: image and reason of each candidate that is not accepted; None for one that is not chosen only.
    """

    images: torch.Tensor
    candidates: list[int]
    scores: list[float | None]
    accepted: list[bool | None]
    rejected: list[tuple[int, str | None]]


class Selection:
    """What the rounds of a call have found for each of its images so far, as lists in the order of the images."""

    def __init__(self, num_images: int, filtering: bool, reasons: Sequence[str] = REASONS):
        self.images: list[torch.Tensor | None] = [None] * num_images
        self.scores: list[float | None] = [None] * num_images
        self.accepted: list[bool | None] = [None] * num_images
        self.seeds: list[int | None] = [None] * num_images
        self.candidates = [0] * num_images
        self.rejected = [dict.fromkeys(reasons, 0) if filtering else None for _ in range(num_images)]

    @property
    def wanted(self) -> list[int]:
        """The images still to be drawn: those that are not there, or that the filter does not accept."""
        return [i for i, image in enumerate(self.images) if image is None or self.accepted[i] is False]

    def add(self, result: RoundResult, seeds: Sequence[int | None], candidates: int) -> None:
        """Takes the result of a round for the images wanted: the better one stays.

        Args:
            seeds: of each in the round's batch.
            candidates: drawn for each image.
        """
        wanted = self.wanted
        for place, reason in result.rejected:
            if reason and place < len(wanted) and (counts := self.rejected[wanted[place]]) is not None:
                counts[reason] += 1
        for place, i in enumerate(wanted):
            self.candidates[i] += candidates
            word = result.accepted[place], result.scores[place]
            if self.images[i] is None or word > (self.accepted[i], self.scores[i]):
                self.images[i], self.seeds[i] = result.images[place], seeds[result.candidates[place]]
                self.accepted[i], self.scores[i] = word
