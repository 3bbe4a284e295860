"""What a host decides of a study: the question, the readers, and which images each of them is shown."""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass

from rating_images import RatedImage, with_repeats

from minim_pipeline.ratings import LONGEST


@dataclass(frozen=True)
class Question:
    """What is asked of each image, and what the answers 1, 2 and 3 mean: a word or two, and a sentence."""

    words: str
    answers: tuple[tuple[str, str], tuple[str, str], tuple[str, str]]


QUESTIONS = {
    "quality": Question(
        "How good is this image, as one of its kind?",
        (
            ("not usable", "Broken, or clearly not real."),
            ("with flaws", "Usable, but something is off."),
            ("good", "As a real image could be."),
        ),
    ),
    "congruence": Question(
        "Does the image show what the words say?",
        (
            ("no", "Nothing of it, or something else."),
            ("in part", "Some of it is missing or wrong."),
            ("yes", "All of it, and nothing against it."),
        ),
    ),
    "real_or_synthetic": Question(
        "Is this image real or synthetic?",
        (
            ("synthetic", "A computer has made it."),
            ("not sure", "It could be either."),
            ("real", "It was taken of a person."),
        ),
    ),
}
ORDERS = {"random": "each reader's own", "given": "as in data.csv"}
NO_REAL = ""
MOST_READERS, MOST_IMAGES = 50, 5000


@dataclass(frozen=True)
class Plan:
    """What a host decides of a study.

    Args:
        question: one of `QUESTIONS`.
        images: which folder, or which prompts to draw, by the names that `Studies` has for them.
        real: which folder; `NO_REAL` for none.
        raters: the readers' names.
        each: how many different images each reader is shown.
        overlap: how much of these all readers are shown alike, in [0, 1].
        repeat_share: how many come a second time, in [0, 1]; see `rating_images.with_repeats`.
        real_share: how much of what is shown is real, in [0, 1].
        order: one of `ORDERS`.

    Raises:
        ValueError: a field is not possible; the message has the value given and those allowed.
    """

    title: str
    question: str
    images: str
    raters: tuple[str, ...]
    each: int
    real: str = NO_REAL
    overlap: float = 1.0
    repeat_share: float = 0.1
    real_share: float = 0.0
    order: str = "random"

    def __post_init__(self) -> None:
        if not 1 <= len(self.title) <= 80:
            raise ValueError(f"The title has to have 1 to 80 characters, got {len(self.title)}.")
        for name, allowed in (("question", QUESTIONS), ("order", ORDERS)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"The {name} has to be one of {', '.join(allowed)}, got {getattr(self, name)[:40]!r}."
                )
        if not 1 <= len(self.raters) <= MOST_READERS or len(set(self.raters)) < len(self.raters):
            raise ValueError(
                f"1 to {MOST_READERS} readers of different names are needed, got {len(self.raters)} names."
            )
        if not all(1 <= len(name) <= LONGEST["rater"] for name in self.raters):
            raise ValueError(f"A reader's name has to have 1 to {LONGEST['rater']} characters.")
        if not 1 <= self.each <= MOST_IMAGES:
            raise ValueError(f"Images for each reader have to be 1 to {MOST_IMAGES}, got {self.each}.")
        for name in ("overlap", "repeat_share", "real_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} has to be in [0, 1], got {getattr(self, name)}.")
        if self.real_share and self.real == NO_REAL:
            raise ValueError(f"A real share of {self.real_share} needs a folder of real images.")


def check_enough(plan: Plan, there: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """By kind, how many images each reader is shown and how many of these all are; ValueError if there are too few."""
    real = round(plan.each * plan.real_share)
    counts = {
        kind: (each, round(plan.overlap * each)) for kind, each in (("generated", plan.each - real), ("real", real))
    }
    for kind, (each, common) in counts.items():
        needed = common + len(plan.raters) * (each - common)
        if needed > there[kind]:
            less = "let each reader have fewer, or all have more in common"
            raise ValueError(f"{needed} {kind} images are needed, there are {there[kind]}: {less}.")
    return counts


def assign(plan: Plan, images: list[RatedImage], seed: int) -> dict[str, list[tuple[RatedImage, int]]]:
    """What each reader is shown, image and turn in order; ValueError if there are too few images for that."""
    chance = random.Random(seed)
    own: dict[str, list[RatedImage]] = {rater: [] for rater in plan.raters}
    there = {kind: [image for image in images if image.kind == kind] for kind in ("generated", "real")}
    for kind, (each, common) in check_enough(plan, {kind: len(found) for kind, found in there.items()}).items():
        drawn = chance.sample(there[kind], common + len(own) * (each - common))
        for i, chosen in enumerate(own.values()):
            start = common + i * (each - common)
            chosen += drawn[:common] + drawn[start : start + each - common]
    place = {image.id: i for i, image in enumerate(images)}
    for chosen in own.values():
        chance.shuffle(chosen)
        if plan.order == "given":
            chosen.sort(key=lambda image: place[image.id])
    return {rater: with_repeats(chosen, plan.repeat_share, chance) for rater, chosen in own.items()}


def parse_plan(text: str) -> Plan:
    """A plan of its JSON."""
    given = json.loads(text)
    return Plan(**given | {"raters": tuple(given["raters"])})
