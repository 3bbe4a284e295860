"""Which images to draw: of one prompt, or of a CSV of them."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.sources import read_dataset
from ..data.table import AS_USUAL, Columns
from ..modalities import Modality, resolve_modality


MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Item:
    """One image to draw: its number in the folder, what it shows, its seed, and columns to carry through."""

    index: int
    text: str
    modality: Modality
    seed: int
    extra: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Request:
    """Images of one prompt: `count` of them, of which image i has seed `seed + i`, and columns to carry through."""

    text: str
    modality: Modality
    count: int
    seed: int
    extra: dict[str, str] = field(default_factory=dict)


def plan_prompt(text: str, modality: Modality, num_images: int, seed: int) -> list[Item]:
    """`num_images` images of one prompt; image i has seed `seed + i`."""
    return expand(request_prompt(text, modality, num_images, seed))


def plan_file(path: str | Path, num_images: int, seed: int, **options: Any) -> list[Item]:
    """The images that `request_file` asks for, one by one."""
    return expand(request_file(path, num_images, seed, **options))


def request_prompt(text: str, modality: Modality, num_images: int, seed: int) -> list[Request]:
    """As `plan_prompt`, in one; ValueError if the last image's seed is out of range."""
    _check_seeds(seed, num_images)
    return [Request(text, modality, num_images, seed)]


def request_file(
    path: str | Path,
    num_images: int,
    seed: int,
    trained: list[str] | None = None,
    skip_bad_rows: bool = False,
    modality: str | None = None,
    columns: Columns = AS_USUAL,
) -> list[Request]:
    """The images that a table of prompts asks for, in the order of its rows.

    Columns: `Text,modality`; optional `num_images` (default: the argument) and `seed`. Image i of a row has the row's
    seed + i; without one, `seed` + the image's number in the whole run, so that no two rows share seeds. Other columns
    are carried through; `path`, which names the generated image there, as `source_path`. `modality` is that of all
    rows, where there is no such column, and `columns` how columns are called whose names are not usual.

    Raises:
        ValueError: as `read_dataset`; for it a row is bad, too, if its modality is not among `trained`, or
            `num_images` or `seed` is no number or out of range.
    """

    def number_of(row: dict[str, str]) -> int:
        return _whole_number("num_images", row.get("num_images") or num_images, 1)

    def check(row: dict[str, str]) -> None:
        resolve_modality(row["modality"], trained)
        _check_seeds(_whole_number("seed", row.get("seed") or seed, 0), number_of(row))

    requests: list[Request] = []
    total = 0
    shared: dict[tuple, dict[str, str]] = {}  # many rows carry the same through
    options: dict[str, Any] = {"skip_bad_rows": skip_bad_rows, "check": check, "modality": modality}
    options["columns"] = columns
    rows = read_dataset(path, require=("Text", "modality"), check_images=False, **options)[::-1]
    while rows:  # a million rows and their requests at once would not fit into a gigabyte
        row = rows.pop()
        known = ("Text", "modality", "num_images", "seed", "path")
        extra = {name: value for name, value in row.items() if name not in known}
        if row.get("path"):
            extra["source_path"] = row["path"]
        kind, first = resolve_modality(row["modality"], trained), int(row.get("seed") or seed + total)
        extra = shared.setdefault(tuple(extra.items()), extra)
        requests.append(Request(row["Text"], kind, number_of(row), first, extra))
        total += requests[-1].count
    _check_seeds(seed, total)
    return requests


def count_images(requests: Iterable[Request]) -> int:
    return sum(request.count for request in requests)


def expand(requests: Iterable[Request]) -> list[Item]:
    """The images of `requests` one by one, numbered from 0."""
    items: list[Item] = []
    for r in requests:
        items += [Item(len(items) + i, r.text, r.modality, r.seed + i, r.extra) for i in range(r.count)]
    return items


def _check_seeds(first: int, count: int) -> None:
    if first + count - 1 > MAX_SEED:
        raise ValueError(f"seed has to be at most {MAX_SEED} for the last image too, got {first} for {count} images.")


def _whole_number(name: str, value: str | int, least: int) -> int:
    try:
        number = int(value)
    except ValueError:
        number = None
    if number is None or not least <= number <= MAX_SEED:
        raise ValueError(f"{name} has to be a whole number from {least}, got {value!r}.")
    return number
