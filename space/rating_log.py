"""Ratings beyond a Space's restart: appended as lines of JSON that huggingface_hub pushes to a dataset repository.

A Space's disk is lost when it restarts, so what lies in the repository is read back into the store at start.
"""

import json
import os
import uuid
import warnings
from dataclasses import asdict
from pathlib import Path

from huggingface_hub import CommitScheduler, snapshot_download

from minim_pipeline.ratings import Rating, RatingStore


IN_REPO = "ratings"  # folder of the repository, with one file of JSON lines for each start of a Space


class RatingLog:
    """Keeps ratings in a dataset repository on the Hub, too.

    Args:
        store: what the repository's ratings are read into.
        folder: where the file lies that is pushed; on a Space any place.
        repo_id, token: of the dataset repository, made private if it is not there yet, with the right to write.
        every: minutes between two pushes; what was rated since the last one is lost with a Space's disk.
    """

    def __init__(self, store: RatingStore, folder: str | Path, repo_id: str, token: str, every: float = 5):
        self.file = Path(folder) / f"{uuid.uuid4().hex}.jsonl"
        where = {"repo_id": repo_id, "repo_type": "dataset", "path_in_repo": IN_REPO, "private": True}
        self.scheduler = CommitScheduler(folder_path=folder, every=every, token=token, **where)
        home = snapshot_download(repo_id, repo_type="dataset", allow_patterns=f"{IN_REPO}/*.jsonl", token=token)
        self.read_back = sum(read_lines(store, path) for path in sorted(Path(home, IN_REPO).glob("*.jsonl")))

    def keep(self, rating: Rating) -> None:
        """Appends a rating; a push never sees half of it."""
        with self.scheduler.lock, open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(rating), ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def push(self) -> None:
        """Pushes now, and waits until it is done."""
        self.scheduler.trigger().result()


def read_lines(store: RatingStore, path: Path) -> int:
    """Adds the ratings of a file of JSON lines to the store; a line that is none is told and left out."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            found.append(Rating(**json.loads(line)))
        except (ValueError, TypeError) as error:
            warnings.warn(f"{path.name}, line {number}: no rating ({error}).", stacklevel=2)
    store.add(*found)
    return len(found)
