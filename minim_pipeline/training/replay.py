"""The rows to learn from and to validate on: new ones, and old ones that a base has learned and is to know still."""

import warnings
from collections import Counter
from dataclasses import dataclass

from .. import MODALITIES, resolve_modality
from ..loading import register_modalities
from .config import DataOptions
from .rows import check_processes, image_paths, read_splits, tell_overlap


@dataclass
class Rows:
    """Rows to train and to validate on: of `--train_data`, and `old_*` ones of `--replay`."""

    train: list[dict]
    val: list[dict]
    old_train: list[dict]
    old_val: list[dict]

    @classmethod
    def read(cls, data: DataOptions, replay: DataOptions | None, base: str | None) -> "Rows":
        """Reads and checks them.

        Args:
            data, replay: how the CSVs are read.
            base: the pipeline that is trained on, a folder or an id on the Hub; None for a new one.

        Raises:
            ValueError: rows that cannot be trained on, or to replay that the base has not learned.
        """
        # Before any row is read: it may be of a modality that only the base knows.
        index = register_modalities(base) if base else {}
        source = data.train_data
        train, val = read_splits(data)
        old_train, old_val = read_splits(replay) if replay else ([], [])
        if replay:
            old = replay.train_data
            both = image_paths(train, source), image_paths(old_val, old)
            tell_overlap(f"{source} and the val rows of {old}", *both)
            both = image_paths(old_train, old), image_paths(val, source)
            tell_overlap(f"{old} and the val rows of {source}", *both)
            check_known(old_train + old_val, old, index, str(base))
        val = judgeable(val, train + old_train, index, source)
        if old_val and not val:  # the weights that are kept have the lowest mean of both
            warnings.warn(f"{source} leaves no val rows, so those of --replay are left out, too.", stacklevel=2)
            old_val = []
        shares = {f"--split {data.split} of {source}": train, "the validation": val}
        if replay:
            shares |= {f"--replay {old}": old_train, f"the validation of --replay {old}": old_val}
        for what, rows in shares.items():
            if rows:
                check_processes(rows, what)
        return cls(train, val, old_train, old_val)

    @property
    def learned(self) -> dict[str, list[str]]:
        """The findings of each modality that is trained on."""
        findings: dict[str, list[str]] = {}
        for row in self.train + self.old_train:
            known = findings.setdefault(modality_of(row), [])
            if row.get("finding") and row["finding"] not in known:
                known.append(row["finding"])
        return {name: findings[name] for name in MODALITIES if name in findings}


def modality_of(row: dict) -> str:
    return resolve_modality(row["modality"]).id


def check_known(rows: list[dict], source: str, index: dict, model: str) -> None:
    """Raises ValueError for rows to replay of modalities that `model`, by its `model_index.json`, has not learned."""
    learned = index.get("modalities") or []
    unknown = {modality_of(row) for row in rows} - set(learned)
    if unknown:
        raise ValueError(
            f"{source}, to replay, has rows of {', '.join(map(repr, sorted(unknown)))}, which {model} has not learned;"
            f" it has learned: {', '.join(learned) or 'none'}."
        )


def judgeable(val_rows: list[dict], train_rows: list[dict], index: dict, source: str) -> list[dict]:
    """The val rows of modalities that the model learns here, or has learned, by its `model_index.json`.

    Of others it cannot know anything; they are left out, with a word. So are copies of train images where none are
    learned from.
    """
    learned = {resolve_modality(row["modality"]).id for row in train_rows}
    known = learned | set(index.get("modalities") or [])
    counts = Counter(resolve_modality(row["modality"]).id for row in val_rows)
    for names, what in (
        (counts.keys() - known, "val rows are left out"),
        (counts.keys() & known - learned, "copies of train images are not looked for"),
    ):
        if names:
            told = ", ".join(f"{name!r} ({counts[name]} val rows)" for name in sorted(names))
            warnings.warn(f"{source} has no train rows of {told}: {what}.", stacklevel=2)
    return [row for row in val_rows if resolve_modality(row["modality"]).id in known]
