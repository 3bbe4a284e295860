"""Who rates what next, and where a rating goes."""

import itertools
from collections.abc import Callable
from functools import lru_cache

from pydantic import BaseModel, ConfigDict, Field
from rating_images import RatedImage, check_images, queue

from minim_pipeline import resolve_modality
from minim_pipeline.ratings import CANNOT_JUDGE, LONGEST, Rating, RatingStore


AHEAD = 6  # images that a browser is told of before they are needed
MOST_SHOWN = 1_000_000  # images in all queues that are remembered: names are anybody's to invent


class Ask(BaseModel):
    """Who asks for images to rate, and of which modalities, by their ids; empty for all."""

    model_config = ConfigDict(str_strip_whitespace=True)
    rater: str = Field(min_length=1, max_length=LONGEST["rater"])
    modalities: list[str] = Field(default=[], max_length=50)


class Shown(Ask):
    """An image that was shown, and which turn of it."""

    image: str = Field(min_length=16, max_length=16)
    turn: int = Field(ge=0, le=99)


class Answer(Shown):
    """A rating, or `CANNOT_JUDGE`, after how many seconds, and what the rater adds in words."""

    rating: int = Field(ge=CANNOT_JUDGE, le=3)
    seconds: float = Field(ge=0, le=86_400)
    remark: str = Field(default="", max_length=500)


class Queue:
    """What one rater is shown, in order, and what of it is done.

    Args:
        shown: image and turn of it.
        answers: those stored already.

    Attributes:
        place: by image id and turn, where it stands in `shown`.
        given: by place, rating and remark.
        skipped: places, to be shown after all others.
        chosen, places: what `choose` was asked last, and what it found.
    """

    def __init__(self, shown: list[tuple[RatedImage, int]], answers: list[Rating]):
        self.shown = shown
        self.place = {(image.id, turn): i for i, (image, turn) in enumerate(shown)}
        stored = {(answer.kind, answer.path, answer.turn): answer for answer in answers}
        self.given: dict[int, tuple[int, str]] = {}
        for i, (image, turn) in enumerate(shown):
            if answer := stored.get((image.kind, image.path, turn)):
                self.given[i] = answer.rating, answer.remark
        self.skipped: dict[int, None] = {}
        self.chosen: tuple[frozenset, int] | None = None
        self.places: dict[int, None] = {}

    def choose(self, modalities: frozenset[str], broken: set[str]) -> dict[int, None]:
        """The places of images of these modalities, without broken ones, in order; kept for the next time."""
        if self.chosen != (modalities, len(broken)):
            shown = enumerate(self.shown)
            wanted = [i for i, (image, _) in shown if image.modality in modalities and image.id not in broken]
            self.chosen, self.places = (modalities, len(broken)), dict.fromkeys(wanted)
        return self.places

    def tell(self, i: int) -> dict:
        """What a browser is told of an image: neither where it lies, nor whether it is real, nor its score."""
        image, turn = self.shown[i]
        told = {"image": image.id, "text": image.text, "modality": resolve_modality(image.modality).name, "turn": turn}
        rating, remark = self.given.get(i, (None, ""))
        return told | {"rating": rating} | ({"remark": remark} if remark else {})


class RatingDesk:
    """Hands out images, and takes ratings into the store; ValueError if that has ratings of others of the same names.

    Args:
        real_share, repeat_share: see `rating_images.queue`.
        keep: called with each rating stored, before it is acknowledged.
        order: gives what a rater is shown, as `rating_images.queue`, which it is by default.
        question: what is asked, as the store has it.
    """

    def __init__(
        self,
        store: RatingStore,
        images: list[RatedImage],
        real_share: float = 0.1,
        repeat_share: float = 0.1,
        keep: Callable[[Rating], None] | None = None,
        *,
        order: Callable[[str], list[tuple[RatedImage, int]]] | None = None,
        question: str = "overall",
    ):
        by_path = {(image.kind, image.path): image for image in images}
        for rating in store.answers():
            image = by_path.get((rating.kind, rating.path))
            if image is not None and rating.digest and image.digest != rating.digest:
                another = "choose another --store (and --ratings_repo)"
                raise ValueError(f"{store.path} holds ratings of another {rating.path}: {another}.")
        self.store, self.images = store, {image.id: image for image in images}
        self.order = order or (lambda rater: queue(images, rater, real_share, repeat_share))
        self.question, self.keep = question, keep
        self.queues: dict[str, Queue] = {}
        self.broken: set[str] = set()  # ids of images that cannot be shown
        self.read = lru_cache(maxsize=256)(RatedImage.read)
        self.modalities = list(dict.fromkeys(image.modality for image in images))

    def choices(self) -> list[dict]:
        """The modalities that there are images of, and whether they are grey."""
        known = map(resolve_modality, self.modalities)
        return [{"id": modality.id, "name": modality.name, "grey": modality.grey} for modality in known]

    def queue_of(self, rater: str) -> Queue:
        if rater not in self.queues:
            while self.queues and (len(self.queues) + 1) * len(self.images) > MOST_SHOWN:
                del self.queues[next(iter(self.queues))]
            self.queues[rater] = Queue(self.order(rater), self.store.answers(rater))
        return self.queues[rater]

    def upcoming(self, rater: str, modalities: list[str] | tuple[str, ...] = ()) -> dict:
        """What is left for a rater: the `next` images, how many are `done` of `total`, and the `last` ones rated.

        Raises ValueError for a modality that there are no images of.
        """
        unknown = [name for name in modalities if name not in self.modalities]
        if unknown:
            raise ValueError(f"modalities have to be among {', '.join(self.modalities)}, got {unknown[0][:40]!r}.")
        own = self.queue_of(rater)
        places = own.choose(frozenset(modalities or self.modalities), self.broken)
        done = [i for i in sorted(own.given) if i in places]
        fresh = (i for i in places if i not in own.given and i not in own.skipped)
        skipped = (i for i in list(own.skipped) if i in places and i not in own.given)
        left = itertools.islice(itertools.chain(fresh, skipped), AHEAD)
        told = {"next": [own.tell(i) for i in left], "last": [own.tell(i) for i in done[-20:]]}
        return told | {"done": len(done), "total": len(places)}

    def check(self, images: list[RatedImage], source: str) -> None:
        """Takes what turns out to be broken out of all queues, told as `check_images` does."""
        good = {image.id for image in check_images(images, source)}
        self.broken |= {image.id for image in images if image.id not in good}

    def place_of(self, shown: Shown) -> int:
        """Where it stands in its rater's queue; ValueError if there is no such image, or it is not this rater's."""
        place = self.queue_of(shown.rater).place.get((shown.image, shown.turn))
        if place is None:
            raise ValueError("This image is not among those to rate: reload the page.")
        return place

    def skip(self, shown: Shown) -> None:
        """Puts an image at the end, until the server starts again; ValueError as `place_of`."""
        place = self.place_of(shown)
        skipped = self.queue_of(shown.rater).skipped
        skipped.pop(place, None)
        skipped[place] = None

    def take(self, answer: Answer) -> None:
        """Stores a rating; ValueError as `place_of`."""
        place = self.place_of(answer)
        image = self.images[answer.image]
        names = ("path", "text", "modality", "kind", "digest", "seed", "revision")
        shown = {name: getattr(image, name) for name in names}
        said = {"rating": answer.rating, "turn": answer.turn, "seconds": round(answer.seconds, 3)}
        rating = Rating(rater=answer.rater, question=self.question, **shown, **said, remark=answer.remark)
        self.store.add(rating)
        if self.keep is not None:
            self.keep(rating)
        self.queue_of(answer.rater).given[place] = answer.rating, answer.remark
