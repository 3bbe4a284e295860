"""Which rows are learned from, and which are held out to validate on: the column `split` says it, or a rule does."""

import hashlib
import warnings
from pathlib import Path

from ..modalities import resolve_modality
from .sources import read_columns, read_dataset
from .table import AS_USUAL


# Of the groups of each modality, where no column says what is held out.
HELD_OUT = 0.1
# Columns that say whose an image is: what belongs together is never on both sides.
GROUP_COLUMNS = ("group", "patient", "patient_id")


def read_splits(
    path: str | Path, split: str | None = "train", val_split: str | None = "val", **options
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The rows of a table to learn from, and those to validate on.

    Args:
        path: as of `read_dataset`; without a column `split` a share is held out as by `assign_splits`, and told.
        split: what is learned from; `None` for every row that is not of `val_split`.
        val_split: what is validated on; `None` for nothing.
        options: of `read_dataset`.

    Raises:
        ValueError: as `read_dataset`; without a column `split`, other splits than "train" and "val" are asked for.
    """
    if val_split is None:
        return read_split(path, split, hold_out=False, **options), []
    columns = options.get("columns", AS_USUAL)
    if split in (None, "train") and val_split == "val" and "split" not in read_columns(path, columns):
        rows = assign_splits(read_dataset(path, **options), path)
        return [row for row in rows if row["split"] == "train"], [row for row in rows if row["split"] == "val"]
    # What is validated on is never trained on, also where every row is asked for.
    train = [row for row in read_dataset(path, split=split, **options) if row.get("split") != val_split]
    return train, read_dataset(path, split=val_split, **options)


def read_split(path: str | Path, split: str | None, hold_out: bool = True, **options) -> list[dict[str, str]]:
    """The rows of one split, `None` for all; arguments and errors as for `read_splits`.

    Args:
        hold_out: without a column `split`, hold a share out as "val"; `False` gives all rows as "train".
    """
    columns = options.get("columns", AS_USUAL)
    if split is None or split not in ("train", "val") or "split" in read_columns(path, columns):
        return read_dataset(path, split=split, **options)
    rows = read_dataset(path, **options)
    if not hold_out:
        return [row | {"split": "train"} for row in rows]
    return [row for row in assign_splits(rows, path) if row["split"] == split]


def assign_splits(rows: list[dict[str, str]], source: str | Path) -> list[dict[str, str]]:
    """The rows with a column `split`: as they are if they have one, else with a tenth of each modality as "val".

    Held out are whole groups, by the first of the columns `group`, `patient` and `patient_id` that the rows have, or
    else single images; those whose names have the smallest hashes, so that it is the same every time. No modality is
    held out as a whole.

    Args:
        source: where they are from, for the warning that tells what is held out.
    """
    if not rows or "split" in rows[0]:
        return rows
    column = next((name for name in GROUP_COLUMNS if name in rows[0]), "path")
    groups = [row[column] or row["path"] for row in rows]
    modalities = [resolve_modality(row["modality"]).id for row in rows]
    first: dict[str, str] = {}  # by group: a patient may have images of several modalities, and counts once
    for group, modality in zip(groups, modalities):
        first.setdefault(group, modality)
    held: set[str] = set()
    for modality in dict.fromkeys(modalities):
        own = sorted((group for group in first if first[group] == modality), key=_hash)
        held.update(own[: max(1, round(HELD_OUT * len(own)))] if len(own) > 1 else [])
    learned = {modality for group, modality in zip(groups, modalities) if group not in held}
    held -= {group for group, modality in zip(groups, modalities) if modality not in learned}
    splits = ["val" if group in held else "train" for group in groups]
    by_column = f"{len(held)} of {len(first)} groups by the column {column!r}"
    warnings.warn(
        f"{source} has no column 'split': {splits.count('val')} of {len(splits)} rows are held out to validate on"
        f" ({'chosen by their names' if column == 'path' else by_column}, the same every time); the others are learned"
        " from.",
        stacklevel=3,
    )
    return [row | {"split": split} for row, split in zip(rows, splits)]


def _hash(group: str) -> bytes:
    return hashlib.sha256(group.encode()).digest()
