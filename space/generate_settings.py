"""What may be asked of the page that draws images, and within which bounds."""

import urllib.parse
from dataclasses import asdict, dataclass

from minim_pipeline import check_caption


@dataclass(frozen=True)
class Limits:
    """The most that one call may ask of the server; the pages' sliders end there, and the server checks it again."""

    images: int = 8
    candidates: int = 8
    steps: int = 50
    guidance: float = 10.0
    prompt: int = 300  # characters
    opened: int = 8  # candidates that did not come back drawn at once
    seed: int = 2**31 - 1

    def __post_init__(self):
        if min(asdict(self).values()) < 1:
            raise ValueError(f"Limits have to be at least 1, got {self}.")


@dataclass(frozen=True)
class Settings:
    """What was asked for; `check` makes one of what a browser sends.

    `second` is the prompt that is drawn beside the first from the same noise, empty for none.
    """

    modality: str
    prompt: str
    images: int
    seed: int
    steps: int
    guidance: float
    candidates: int
    second: str = ""

    @property
    def query(self) -> str:
        """The part of a link that asks for the same again."""
        return "?" + urllib.parse.urlencode({name: value for name, value in asdict(self).items() if value != ""})


def check(limits: Limits, trained: list[str], **asked) -> Settings:
    """Settings within the limits; ValueError with what was given and what is allowed for one that is not possible."""
    if asked["modality"] not in trained:
        raise ValueError(f"Choose a modality: {', '.join(trained)} (got {str(asked['modality'])[:40]!r}).")
    prompt, second = (" ".join(str(asked.get(name) or "").split()) for name in ("prompt", "second"))
    if not prompt:
        raise ValueError("Say what the image is to show.")
    for text in (prompt, second):
        check_caption(text)
        if len(text) > limits.prompt:
            raise ValueError(f"The description has {len(text)} characters, at most {limits.prompt} are allowed.")
    bounds = {
        "images": (int, 1, limits.images),
        "seed": (int, 0, limits.seed),
        "steps": (int, 2, limits.steps),
        "guidance": (float, 1, limits.guidance),
        "candidates": (int, 1, limits.candidates),
    }
    numbers = {}
    for name, (kind, low, high) in bounds.items():
        try:
            value = float(asked[name])
            if not low <= value <= high or (kind is int and value != int(value)):
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            what, given = "a whole number" if kind is int else "a number", str(asked[name])[:40]
            raise ValueError(f"{name} has to be {what} from {low} to {high}, got {given!r}.") from None
        numbers[name] = kind(value)
    return Settings(asked["modality"], prompt, **numbers, second=second)
