"""Studies: each is one SQLite file, with its plan, what each reader is shown, and the answers."""

import json
import secrets
import sqlite3
import sys
import threading
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

from rating_desk import RatingDesk
from rating_images import AT_ONCE, RatedImage, read_folder
from study_drawing import Prompts
from study_plan import NO_REAL, Plan, assign, check_enough, parse_plan

from minim_pipeline.data.image_reader import Reading
from minim_pipeline.files import write_json
from minim_pipeline.generate.plan import count_images
from minim_pipeline.ratings import Rating, RatingStore


MOST_STUDIES = 200

_TABLES = """
CREATE TABLE study (plan TEXT NOT NULL);
CREATE TABLE readers (place INTEGER PRIMARY KEY, rater TEXT NOT NULL UNIQUE, token TEXT NOT NULL UNIQUE);
CREATE TABLE shown (
    rater TEXT NOT NULL, place INTEGER NOT NULL, kind TEXT NOT NULL, path TEXT NOT NULL, turn INTEGER NOT NULL,
    PRIMARY KEY (rater, place)
);
"""


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
    return parse_plan(text)


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
        prompts: files whose images are drawn first, into a folder beside the study's file; a start goes on with them.

    A study that cannot be opened, as its images are gone, is told on stderr and left out.

    Attributes:
        open: by id.
        readers: by token, a reader's study and name.
        pending: by id, plans whose images are being drawn; of those in `failed` they could not be.
    """

    def __init__(
        self, folder: str | Path, sources: Mapping[str, str | Path], reading: Reading, prompts: Prompts | None = None
    ):
        self.folder, self.sources = Path(folder), sources
        self.prompts = prompts or Prompts({}, "")
        # A folder is read again once its data.csv is another.
        self.read = lru_cache(maxsize=16)(lambda place, kind, changed: read_folder(place, kind, reading))
        self.open: dict[str, Study] = {}
        self.readers: dict[str, tuple[Study, str]] = {}
        self.pending: dict[str, Plan] = {}
        self.failed: set[str] = set()
        self.lock = threading.Lock()
        drawn_first = {file.stem: file for file in self.folder.glob("*.json")}
        for file in sorted(self.folder.glob("*.sqlite"), key=lambda file: file.stat().st_mtime):
            try:
                self._open(file)
            except (ValueError, OSError) as error:
                if file.stem not in drawn_first:
                    print(f"space/app.py: study {file.stem} is left out: {error}", file=sys.stderr)
        for identity, file in drawn_first.items():
            if identity in self.open:
                file.unlink()
            else:
                self._begin(identity, parse_plan(file.read_text(encoding="utf-8")))

    def folders(self, plan: Plan, identity: str) -> dict[str, Path]:
        """By kind, where the images of a study lie; ValueError for a folder that is not among those to choose."""
        named = {"generated": plan.images} | ({"real": plan.real} if plan.real != NO_REAL else {})
        drawn = dict.fromkeys(self.prompts.files, self.folder / identity)
        known = {"generated": {**self.sources, **drawn}, "real": self.sources}
        for kind, name in named.items():
            if name not in known[kind]:
                raise ValueError(f"The folder has to be one of {', '.join(known[kind])}, got {name[:40]!r}.")
        return {kind: Path(known[kind][name]) for kind, name in named.items()}

    def images(self, plan: Plan, identity: str, kinds: tuple[str, ...] = ("generated", "real")) -> list[RatedImage]:
        """Those of a plan's folders; ValueError for a folder that is not among those to choose, or cannot be read."""
        found = []
        for kind, folder in self.folders(plan, identity).items():
            try:
                found += self.read(folder, kind, (folder / "data.csv").stat().st_mtime_ns) if kind in kinds else []
            except (ValueError, OSError) as error:  # it has paths of this machine, which are not for a page
                print(f"space/app.py: {folder} cannot be read: {error}", file=sys.stderr)
                name = plan.images if kind == "generated" else plan.real
                raise ValueError(f"The folder {name} cannot be read; the server's log says why.") from error
        return found

    def make(self, plan: Plan) -> Study | None:
        """Makes a study and opens it; None if its images are drawn first. Raises as `check_enough` and `images`."""
        with self.lock:
            if len(self.open) + len(self.pending) >= MOST_STUDIES:
                raise ValueError(f"There are {MOST_STUDIES} studies, which is the most: move some files away.")
            identity = secrets.token_hex(6)
            self.folder.mkdir(parents=True, exist_ok=True)
            if plan.images not in self.prompts.files:
                return self._write(identity, plan)
            count = count_images(self.prompts.requests(plan.images))
            check_enough(plan, {"generated": count, "real": len(self.images(plan, identity, ("real",)))})
            write_json(self.folder / f"{identity}.json", asdict(plan))
            self._begin(identity, plan)
            return None

    def _begin(self, identity: str, plan: Plan) -> None:
        self.pending[identity] = plan
        threading.Thread(target=self._draw, args=(identity, plan), daemon=True).start()

    def _draw(self, identity: str, plan: Plan) -> None:
        try:
            self.prompts.draw(plan.images, self.folder / identity)
            with self.lock:
                self._write(identity, plan)
                del self.pending[identity]
            (self.folder / f"{identity}.json").unlink()
        except Exception as error:  # whatever it is, the host has to see that nothing will come
            self.failed.add(identity)
            print(f"space/app.py: the images of study {identity} could not be drawn: {error}", file=sys.stderr)

    def _write(self, identity: str, plan: Plan) -> Study:
        shown = assign(plan, self.images(plan, identity), secrets.randbits(64))
        file = self.folder / f"{identity}.sqlite"
        write_study(file, plan, shown)
        return self._open(file)

    def _open(self, file: Path) -> Study:
        images = self.images(read_plan(file), file.stem)
        study = Study(file, images)
        if len(images) > AT_ONCE:
            used = list(study.desk.images.values())
            threading.Thread(target=study.desk.check, args=(used, f"study {study.id}"), daemon=True).start()
        self.open[study.id] = study
        self.readers |= {token: (study, rater) for rater, token in study.tokens.items()}
        return study
