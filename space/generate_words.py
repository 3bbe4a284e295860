"""What the page says of the images: one vocabulary for their captions and for the sentence below them.

An image is accepted or not accepted; a candidate that did not come back was outranked by one that did.
"""

from collections import Counter
from collections.abc import Sequence

from drawing import Drawn


REASONS = {
    "quality": "for their quality",
    "finding": "for the finding",
    "copy": "as copies of training images",
    "realism": "because they do not look like real ones",
}
ONE = {
    "quality": "for its quality",
    "finding": "for the finding",
    "copy": "as a copy of a training image",
    "realism": "because it does not look like a real one",
}


def captions(drawn: Drawn, needed: float, accepted: str = "accepted") -> list[str]:
    """What stands below each image.

    Args:
        needed: the score from which on the filter accepts an image of this modality.
        accepted: the word for images that the filter accepts.
    """
    said = []
    for score, passed, reason in zip(drawn.scores, drawn.accepted, drawn.reasons):
        if passed is None:
            said.append("not rated")
            continue
        word, why = (f"✓ {accepted}", "") if passed else ("✗ not accepted", f": {ONE[reason]}")
        said.append(f"{word}, score {score:.2f} of 3 ({needed:.2f} needed){why}")
    return said


def summarise(drawn: Drawn, seconds: float) -> str:
    """What came of it, in a sentence or two."""
    if drawn.scores[0] is None:
        return f"{len(drawn.images)} images in {seconds:.0f} s."
    accepted, others = sum(drawn.accepted), sum(drawn.candidates) - len(drawn.images)
    told = f"The filter accepted {accepted} of {len(drawn.images)} images, in {seconds:.0f} s."
    if not others:
        return told
    # The pipeline counts what was not accepted among the images as well.
    counts = Counter[str]()
    for rejected in drawn.rejected:
        counts.update(rejected)
    counts.subtract(reason for reason in drawn.reasons if reason)
    reasons = [f"{counts[reason]} {words}" for reason, words in REASONS.items() if counts[reason] > 0]
    if good := others - sum(counts.values()):
        reasons.append(f"{good} though good enough")
    return f"{told} It chose them from {others + len(drawn.images)} candidates; outranked: {listed(reasons)}."


def listed(words: Sequence[str]) -> str:
    return ", ".join(words[:-1]) + " and " * (len(words) > 1) + words[-1]
