"""What `minim generate --accepted-only` gave up, in `fell_short.jsonl`: neither forgotten nor drawn again."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..files import atomic_path


FILE = "fell_short.jsonl"
# Rounds for an image, unless the bound is given. With a filter that accepts one candidate of ten, 4 candidates a round
# leave one image in 850 without.
MAX_ROUNDS = 16


class Shortfall:
    """The images of a run, in `folder`, that were not accepted within the bound, a line of JSON each.

    Attributes:
        entries: by the image's number its `index`, `Text`, `modality`, `seed`, `rounds` and `candidates` drawn, and
            how many of those were `rejected` for what.
    """

    def __init__(self, folder: str | Path):
        self.file, self.entries = Path(folder) / FILE, {}
        for line in self.file.read_text(encoding="utf-8").splitlines() if self.file.is_file() else ():
            try:
                entry = json.loads(line)
            except ValueError:  # half a line, after a crash of the machine
                continue
            self.entries[entry["index"]] = entry

    def holds(self, item, rounds: int) -> bool:
        """Whether this very image was drawn in so many rounds, or more, without success."""
        entry = self.entries.get(item.index)
        return entry is not None and entry["rounds"] >= rounds and entry | _told(item) == entry

    def add(self, item, rounds: int, candidates: int, rejected: Mapping[str, int]) -> None:
        entry = entry_of(item, rounds, candidates, rejected)
        self.entries[item.index] = entry
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def finish(self, items: Iterable, accepted: set[int], rounds: int) -> None:
        """Leaves the lines of those of `items` that fell short in the end, or no file. For one process only."""
        self.entries = Shortfall(self.file.parent).entries  # those of the other processes, too
        short = [item.index for item in items if item.index not in accepted and self.holds(item, rounds)]
        self.entries = {index: self.entries[index] for index in short}
        with atomic_path(self.file) as temporary:
            lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in self.entries.values())
            temporary.write_text("".join(lines), encoding="utf-8")
        if not short:
            self.file.unlink()


def entry_of(item, rounds: int, candidates: int, rejected: Mapping[str, int]) -> dict[str, object]:
    """What is noted of an image that fell short, as `Shortfall.entries` has it."""
    return _told(item) | {"rounds": rounds, "candidates": candidates, "rejected": dict(rejected)}


def _told(item) -> dict[str, object]:
    return {"index": item.index, "Text": item.text, "modality": item.modality.name, "seed": item.seed}
