"""The store of people's ratings: one SQLite file, safe with many raters at once, and CSV in and out.

A rating is acknowledged once its transaction is on the disk: whoever kills the process loses none, and one that is
sent again takes the place of the first, so that none is there twice.
"""

import hashlib
import itertools
import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from .data.sources import read_dataset, resolve_path
from .files import write_csv
from .modalities import resolve_modality


# How much of an image's name, its sentence or a rater's name is kept: nobody needs more, and nobody fills the disk.
LONGEST = {"rater": 80, "path": 500, "text": 1000, "remark": 1000, "revision": 100, "question": 40}
OPTIONAL = ("remark", "revision")
CANNOT_JUDGE = 0  # in the place of a rating

_TABLE = """
CREATE TABLE IF NOT EXISTS ratings (
    rater TEXT NOT NULL, path TEXT NOT NULL, turn INTEGER NOT NULL,
    rating INTEGER NOT NULL CHECK (rating IN (0, 1, 2, 3)), text TEXT NOT NULL, modality TEXT NOT NULL,
    kind TEXT NOT NULL, seconds REAL, time TEXT NOT NULL, digest TEXT NOT NULL,
    remark TEXT NOT NULL DEFAULT '', seed INTEGER, revision TEXT NOT NULL DEFAULT '',
    question TEXT NOT NULL DEFAULT 'overall',
    PRIMARY KEY (rater, kind, path, turn, question)
)
"""


@dataclass(frozen=True)
class Rating:
    """What a person said of an image.

    Args:
        rater: the person's name.
        path: of the image, with slashes, relative to the folder of its kind.
        rating: 1 (bad), 2 or 3 (good); `CANNOT_JUDGE` where the person could not say.
        text: what the image is to show.
        modality: its id.
        turn: 0, or 1 and more where the same person is shown the same image again.
        kind: `"generated"` or `"real"`.
        seconds: from seeing the image to the rating.
        time: of the rating, ISO 8601 in UTC; now, if left empty.
        digest: `image_digest` of the file, so that no other file of that name is taken for it; empty if not known.
        remark: what the person added in words.
        seed, revision: of a generated image, the seed that draws it and the model's revision, as far as known.
        question: what was asked; `"overall"` is how good an image is as one of what it is to show.

    Raises:
        ValueError: a field is not possible; the message has the value given and those allowed.
    """

    rater: str
    path: str
    rating: int
    text: str
    modality: str
    turn: int = 0
    kind: str = "generated"
    seconds: float | None = None
    time: str = ""
    digest: str = ""
    remark: str = ""
    seed: int | None = None
    revision: str = ""
    question: str = "overall"

    def __post_init__(self):
        for name, most in LONGEST.items():
            value, least = getattr(self, name), 0 if name in OPTIONAL else 1
            if not isinstance(value, str) or len(value) > most or (least and not value.strip()):
                raise ValueError(f"{name} has to be a text of {least} to {most} characters, got {str(value)[:80]!r}.")
        if type(self.rating) is not int or self.rating not in (CANNOT_JUDGE, 1, 2, 3):
            raise ValueError(f"rating has to be 1, 2 or 3, got {self.rating!r} ({CANNOT_JUDGE} is 'cannot judge').")
        if self.seed is not None and (type(self.seed) is not int or not -(2**63) <= self.seed < 2**63):
            raise ValueError(f"seed has to be a whole number of 64 bits, got {self.seed!r}.")
        if type(self.turn) is not int or not 0 <= self.turn < 100:
            raise ValueError(f"turn has to be a whole number from 0 to 99, got {self.turn!r}.")
        if self.kind not in ("generated", "real"):
            raise ValueError(f"kind has to be 'generated' or 'real', got {self.kind!r}.")
        if PurePosixPath(self.path).is_absolute() or ".." in PurePosixPath(self.path).parts:
            raise ValueError(f"path has to lie within the folder of images, got {self.path!r}.")
        object.__setattr__(self, "modality", resolve_modality(self.modality).id)
        if not self.time:
            object.__setattr__(self, "time", datetime.now(UTC).isoformat(timespec="milliseconds"))


COLUMNS = tuple(field.name for field in fields(Rating))
KEY = ("rater", "kind", "path", "turn", "question")  # a real image may have the name of a generated one
CSV_COLUMNS = ("path", "Text", *(name for name in COLUMNS if name not in ("path", "text")))


def image_digest(path: str | Path) -> str:
    """The first 16 hexadecimal digits of a file's SHA-256."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def _add_columns(connection: sqlite3.Connection) -> None:
    """Makes the table of a store of before `question` one of today's; its ratings stay."""
    connection.execute("BEGIN IMMEDIATE")  # another process may be at it
    there = {row["name"] for row in connection.execute("PRAGMA table_info(ratings)")}
    if "question" not in there:
        names = ", ".join(name for name in COLUMNS if name in there)
        connection.execute("ALTER TABLE ratings RENAME TO earlier")
        connection.execute(_TABLE)
        connection.execute(f"INSERT INTO ratings ({names}) SELECT {names} FROM earlier")
        connection.execute("DROP TABLE earlier")


class RatingStore:
    """Ratings in an SQLite file, made if it is not there; WAL files lie beside it while it is open.

    Raises ValueError for a file of another kind.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._local = threading.local()
        try:
            with self._connection() as connection:
                connection.execute(_TABLE)
                _add_columns(connection)
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{self.path} is no store of ratings: {error}.") from error

    def _connection(self) -> sqlite3.Connection:
        """This thread's own: SQLite locks between connections, and waits for another's transaction."""
        connection = getattr(self._local, "connection", None)
        if connection is None:
            connection = sqlite3.connect(self.path, timeout=30)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")  # a commit survives a power cut, too
            connection.row_factory = sqlite3.Row
            self._local.connection = connection
        return connection

    def add(self, *ratings: Rating) -> None:
        """Stores ratings, all or none; one of the same rater, image and turn takes the place of the earlier."""
        names = ", ".join(COLUMNS)
        values = ", ".join(f":{name}" for name in COLUMNS)
        changes = ", ".join(f"{name} = excluded.{name}" for name in COLUMNS if name not in KEY)
        command = f"INSERT INTO ratings ({names}) VALUES ({values}) ON CONFLICT ({', '.join(KEY)}) DO UPDATE SET"
        # What is read back from a log may be older than what is here.
        command += f" {changes} WHERE excluded.time >= ratings.time"
        with self._connection() as connection:
            connection.executemany(command, [asdict(rating) for rating in ratings])

    def ratings(self, rater: str | None = None) -> list[Rating]:
        """All ratings from 1 to 3, or those of one rater, in the order of their times."""
        return [answer for answer in self.answers(rater) if answer.rating != CANNOT_JUDGE]

    def answers(self, rater: str | None = None) -> list[Rating]:
        """As `ratings`, with what could not be judged."""
        where = "" if rater is None else "WHERE rater = ?"
        rows = self._connection().execute(
            f"SELECT * FROM ratings {where} ORDER BY time, {', '.join(KEY)}", () if rater is None else (rater,)
        )
        return [Rating(**{name: row[name] for name in COLUMNS}) for row in rows]

    def write_csv(self, path: str | Path, folders: Mapping[str, str | Path]) -> int:
        """Writes all ratings from 1 to 3 as a CSV of `CSV_COLUMNS`, whole or not at all, and returns how many.

        Args:
            folders: by kind, `"generated"` and `"real"`, what the images' paths are relative to; in the CSV they are
                relative to its own folder.

        Raises:
            ValueError: there are ratings of a kind without a folder, or of images that are not there, or are others.
        """
        rows = self.ratings()
        unknown = sorted({rating.kind for rating in rows} - set(folders))
        if unknown:
            raise ValueError(f"There are ratings of {unknown[0]} images: say which folder these lie in.")
        digests = {Path(folders[rating.kind]) / rating.path: rating.digest for rating in rows}
        problems = []
        for file, digest in digests.items():
            if not file.is_file():
                problems.append(f"{file} is not there")
            elif digest and image_digest(file) != digest:
                problems.append(f"{file} is another image than the one that was rated")
        if problems:
            raise ValueError(f"{'; '.join(problems[:5])}{f' (and {len(problems) - 5} more)' if problems[5:] else ''}.")
        home = Path(path).absolute().parent
        lines = []
        for rating in rows:
            place = os.path.relpath(Path(folders[rating.kind]).absolute() / rating.path, home)
            row = asdict(rating) | {"path": Path(place).as_posix(), "Text": rating.text}
            lines.append({name: row[name] for name in CSV_COLUMNS})
        write_csv(Path(path), lines, CSV_COLUMNS)
        return len(rows)

    def read_csv(self, path: str | Path, folders: Mapping[str, str | Path]) -> int:
        """Adds the ratings of a CSV, all or none, and returns how many; errors as of `read_ratings`."""
        found = read_ratings(path, folders, self.ratings())
        self.add(*found)
        return len(found)


def read_ratings(path: str | Path, folders: Mapping[str, str | Path], earlier: Iterable[Rating] = ()) -> list[Rating]:
    """The ratings of a CSV, as `RatingStore.write_csv` writes it or with `path,Text,modality,rating` alone.

    MINIM's own, `image_path,rating,modality,expert_level,prompt`, is read too. Raters without a name are called after
    their `expert_level`, if there is one; who rates an image again without a `turn` is taken for another person,
    "expert level 3 (2)". An image that is not where `path` leads from the CSV is looked for in the folder of its kind,
    as `resolve_path` does.

    Args:
        folders: by kind, what the images' paths are relative to in the ratings.
        earlier: ratings that these are to be added to.

    Raises:
        ValueError: bad rows, told with their numbers, such as two ratings of a named rater for one image and turn, of
            which only one could be kept, or one of a rater without a name that differs from an earlier one.
    """
    home, found = Path(path).absolute().parent, []
    kinds: dict[str, Callable[[str], Any]] = {"turn": _whole, "seconds": float, "rating": _whole, "seed": int}
    taken, stored = set(), {_key(rating): rating.rating for rating in earlier}

    def check(row: Mapping[str, str]) -> None:
        given: dict[str, Any] = {name: row[name] for name in COLUMNS if row.get(name)}
        for name in given.keys() & kinds.keys():
            try:
                given[name] = kinds[name](given[name])
            except ValueError:
                raise ValueError(f"{name} has to be a number, got {given[name]!r}") from None
        if given["rating"] == CANNOT_JUDGE:
            raise ValueError(f"rating has to be 1, 2 or 3, got {row['rating']!r}")
        kind = given.get("kind", "generated")
        if kind not in folders:
            raise ValueError(f"kind has to be one of {', '.join(folders)}, got {kind!r}")
        file, folder = home / row["path"], Path(folders[kind]).absolute()
        if not file.is_file() and resolve_path(row, path, folder).is_file():
            file = resolve_path(row, path, folder)
        place = Path(os.path.relpath(file, folder)).as_posix()
        if place.startswith("../") and not file.is_file():
            raise ValueError(f"no image {row['path']!r}, neither seen from the CSV nor in {folders[kind]}")
        level = row.get("expert_level")
        name = given.get("rater") or (f"expert level {level}" if level else "unnamed")
        rating = Rating(**given | {"rater": name, "path": place, "text": row["Text"]})
        for again in itertools.count(2):
            if _key(rating) not in taken or given.get("time"):
                break
            if given.get("rater"):
                raise ValueError(f"{name!r} has rated {row['path']} above already, as turn {rating.turn}")
            rating = replace(rating, rater=f"{name} ({again})")
        before = stored.get(_key(rating), rating.rating)
        if not given.get("rater") and before != rating.rating:
            raise ValueError(
                f"{rating.rater!r} has rated {row['path']} as {before} before, and as {rating.rating} now: if this is"
                " another person, a column 'rater' has to say so"
            )
        taken.add(_key(rating))
        found.append(rating)

    read_dataset(path, require=("path", "Text", "modality", "rating"), check_images=False, check=check)
    return found


def _key(rating: Rating) -> tuple:
    return tuple(getattr(rating, part) for part in KEY)


def _whole(text: str) -> int:
    """A whole number, also as pandas writes it: "2.0"."""
    value = float(text)
    if not value.is_integer():
        raise ValueError(text)
    return int(value)


def counts(ratings: Iterable[Rating]) -> dict[str, dict[str, int]]:
    """By modality id: `ratings`, `images` and `raters`."""
    by_modality: dict[str, list[Rating]] = {}
    for rating in ratings:
        by_modality.setdefault(rating.modality, []).append(rating)
    return {
        name: {
            "ratings": len(own),
            "images": len({(rating.kind, rating.path) for rating in own}),
            "raters": len({rating.rater for rating in own}),
        }
        for name, own in by_modality.items()
    }


def consistency(ratings: Iterable[Rating]) -> dict[str, dict[str, float | None]]:
    """By rater, of images shown again: how many (`n`), and the share that got the same rating again (`same`)."""
    given: dict[str, dict[tuple[str, str, str], dict[int, int]]] = {}
    for r in ratings:
        given.setdefault(r.rater, {}).setdefault((r.kind, r.path, r.question), {})[r.turn] = r.rating
    table: dict[str, dict[str, float | None]] = {}
    for rater, images in given.items():
        same = [again == turns[0] for turns in images.values() for t, again in turns.items() if t and 0 in turns]
        table[rater] = {"n": len(same), "same": sum(same) / len(same) if same else None}
    return table
