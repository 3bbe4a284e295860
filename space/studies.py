"""Studies: what is asked, who answers, and what each reader is shown. Each is one SQLite file, with its answers."""

import json
import random
import secrets
import sqlite3
import sys
import threading
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from rating_desk import RatingDesk
from rating_images import AT_ONCE, RatedImage, read_folder, with_repeats

from minim_pipeline.data.image_reader import Reading
from minim_pipeline.ratings import LONGEST, Rating, RatingStore


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
MOST_READERS, MOST_IMAGES, MOST_STUDIES = 50, 5000, 200

_TABLES = """
CREATE TABLE study (plan TEXT NOT NULL);
CREATE TABLE readers (place INTEGER PRIMARY KEY, rater TEXT NOT NULL UNIQUE, token TEXT NOT NULL UNIQUE);
CREATE TABLE shown (
    rater TEXT NOT NULL, place INTEGER NOT NULL, kind TEXT NOT NULL, path TEXT NOT NULL, turn INTEGER NOT NULL,
    PRIMARY KEY (rater, place)
);
"""


@dataclass(frozen=True)
class Plan:
    """What a host decides of a study.

    Args:
        question: one of `QUESTIONS`.
        images, real: which folders, by the names that `Studies` has for them; `NO_REAL` for none.
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


def assign(plan: Plan, images: list[RatedImage], seed: int) -> dict[str, list[tuple[RatedImage, int]]]:
    """What each reader is shown, image and turn in order; ValueError if there are too few images for that."""
    chance = random.Random(seed)
    own: dict[str, list[RatedImage]] = {rater: [] for rater in plan.raters}
    real = round(plan.each * plan.real_share)
    for kind, each in (("generated", plan.each - real), ("real", real)):
        there = [image for image in images if image.kind == kind]
        common = round(plan.overlap * each)
        needed = common + len(own) * (each - common)
        if needed > len(there):
            less = "let each reader have fewer, or all have more in common"
            raise ValueError(f"{needed} {kind} images are needed, there are {len(there)}: {less}.")
        drawn = chance.sample(there, needed)
        for i, chosen in enumerate(own.values()):
            start = common + i * (each - common)
            chosen += drawn[:common] + drawn[start : start + each - common]
    place = {image.id: i for i, image in enumerate(images)}
    for chosen in own.values():
        chance.shuffle(chosen)
        if plan.order == "given":
            chosen.sort(key=lambda image: place[image.id])
    return {rater: with_repeats(chosen, plan.repeat_share, chance) for rater, chosen in own.items()}


class Study:
    """A study that was made: `plan`, by reader `tokens` and what is `shown`, and its `desk`.

    Args:
        file: written by `write_study`.
        images: of the plan's folders.

    Raises:
        ValueError: an image is not there, or is another one than was rated; or the file is none of a study.
    """

    def __init__(self, file: Path, images: list[RatedImage]):
        self.id, self.plan = file.stem, read_plan(file)
        with closing(sqlite3.connect(file)) as connection:
            self.tokens = dict(connection.execute("SELECT rater, token FROM readers ORDER BY place"))
            rows = connection.execute("SELECT rater, kind, path, turn FROM shown ORDER BY rater, place").fetchall()
        there = {(image.kind, image.path): image for image in images}
        self.shown: dict[str, list[tuple[RatedImage, int]]] = {rater: [] for rater in self.tokens}
        for rater, kind, path, turn in rows:
            if (kind, path) not in there:
                raise ValueError(f"the {kind} image {path} of study {self.id} is no longer there")
            self.shown[rater].append((there[kind, path], turn))
        used = {image.id: image for shown in self.shown.values() for image, _ in shown}
        order, question = self.shown.__getitem__, self.plan.question
        self.store = RatingStore(file)
        self.desk = RatingDesk(self.store, list(used.values()), order=order, question=question)

    def answers(self) -> list[Rating]:
        return self.store.answers()


def read_plan(file: Path) -> Plan:
    """A study's plan; ValueError if the file has none."""
    try:
        with closing(sqlite3.connect(file)) as connection:
            (text,) = connection.execute("SELECT plan FROM study").fetchone()
    except (sqlite3.DatabaseError, TypeError) as error:
        raise ValueError(f"{file} is no study: {error}.") from error
    given = json.loads(text)
    return Plan(**given | {"raters": tuple(given["raters"])})


def write_study(file: Path, plan: Plan, shown: Mapping[str, list[tuple[RatedImage, int]]]) -> None:
    """Writes a study, whole or not at all, with a new token for each reader."""
    RatingStore(file)
    with closing(sqlite3.connect(file)) as connection:
        connection.executescript(f"BEGIN; {_TABLES}")
        connection.execute("INSERT INTO study VALUES (?)", (json.dumps(asdict(plan)),))
        readers = [(i, rater, secrets.token_urlsafe(16)) for i, rater in enumerate(plan.raters)]
        connection.executemany("INSERT INTO readers VALUES (?, ?, ?)", readers)
        for rater, own in shown.items():
            rows = [(rater, i, image.kind, image.path, turn) for i, (image, turn) in enumerate(own)]
            connection.executemany("INSERT INTO shown VALUES (?, ?, ?, ?, ?)", rows)
        connection.commit()


class Studies:
    """The studies of a folder, open for their readers.

    Args:
        folder: of their files.
        sources: by name, the folders of images that a host may choose; nobody names another.
        reading: of their images.

    A study that cannot be opened, as its images are gone, is told on stderr and left out.
    """

    def __init__(self, folder: str | Path, sources: Mapping[str, str | Path], reading: Reading):
        self.folder, self.sources = Path(folder), sources
        # A folder is read again once its data.csv is another.
        self.read = lru_cache(maxsize=16)(lambda name, kind, changed: read_folder(sources[name], kind, reading))
        self.open: dict[str, Study] = {}
        self.readers: dict[str, tuple[Study, str]] = {}  # by token
        self.lock = threading.Lock()
        for file in sorted(self.folder.glob("*.sqlite"), key=lambda file: file.stat().st_mtime):
            try:
                self._open(file)
            except (ValueError, OSError) as error:
                print(f"space/app.py: study {file.stem} is left out: {error}", file=sys.stderr)

    def images(self, plan: Plan) -> list[RatedImage]:
        """Those of a plan's folders; ValueError for a folder that is not among `sources`, or cannot be read."""
        found = []
        for kind, name in (("generated", plan.images), ("real", plan.real)):
            if name == NO_REAL and kind == "real":
                continue
            if name not in self.sources:
                raise ValueError(f"The folder has to be one of {', '.join(self.sources)}, got {name[:40]!r}.")
            try:
                found += self.read(name, kind, (Path(self.sources[name]) / "data.csv").stat().st_mtime_ns)
            except (ValueError, OSError) as error:  # it has paths of this machine, which are not for a page
                print(f"space/app.py: {self.sources[name]} cannot be read: {error}", file=sys.stderr)
                raise ValueError(f"The folder {name} cannot be read; the server's log says why.") from error
        return found

    def make(self, plan: Plan) -> Study:
        """Makes a study and opens it; ValueError as `assign` and `images`."""
        with self.lock:
            if len(self.open) >= MOST_STUDIES:
                raise ValueError(f"There are {MOST_STUDIES} studies, which is the most: move some files away.")
            shown = assign(plan, self.images(plan), secrets.randbits(64))
            self.folder.mkdir(parents=True, exist_ok=True)
            file = self.folder / f"{secrets.token_hex(6)}.sqlite"
            write_study(file, plan, shown)
            return self._open(file)

    def _open(self, file: Path) -> Study:
        images = self.images(read_plan(file))
        study = Study(file, images)
        if len(images) > AT_ONCE:
            used = list(study.desk.images.values())
            threading.Thread(target=study.desk.check, args=(used, f"study {study.id}"), daemon=True).start()
        self.open[study.id] = study
        self.readers |= {token: (study, rater) for rater, token in study.tokens.items()}
        return study
