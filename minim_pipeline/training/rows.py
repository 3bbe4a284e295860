"""The rows to learn from and to validate on, and what is said of them before training.

That is: images that are there twice, or that may be mirrored, and captions that are longer than a text encoder reads.
"""

import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from transformers import CLIPTokenizer

from .. import MODALITIES, may_mirror, resolve_modality
from ..cli import say
from ..data import splits
from ..data.image_loading import check_values
from ..data.looks import file_keys
from ..data.sources import resolve_paths
from ..loading import register_modalities
from ..tokens import cut_texts
from .config import CsvOptions, DataOptions, Options


NAMED = 5  # images that a warning names
FINDINGS = ("path", "Text", "modality", "finding")  # columns of a CSV in which each row has a finding


def know_modalities(config: Options) -> None:
    """Registers what the pipelines that the options name define; before any row is read."""
    base = getattr(config, "pretrained_model_name_or_path", None)
    if base and Path(base).is_dir() and not (Path(base) / "model_index.json").is_file():
        base = None  # parts of a pipeline
    for model in filter(None, (base, getattr(config, "modalities_from", None))):
        register_modalities(model)


def read_splits(data: DataOptions) -> tuple[list[dict], list[dict]]:
    """The rows to train on and those to validate on; every image is looked at before training starts.

    Images that are there twice are told.
    """
    know_modalities(data)
    wanted = None if data.split == "all" else data.split, None if data.val_split == "none" else data.val_split
    options = {"skip_bad_rows": data.skip_bad_rows, **data.csv_options}
    train, val = splits.read_splits(data.train_data, *wanted, **options)
    if not train:
        raise ValueError(f"{data.train_data} has no rows to train on: all are of --val_split {data.val_split!r}.")
    train, val = train[: data.max_train_samples], val[: data.max_train_samples]
    # Images that cannot be read as they are meant are refused now, and not when the networks are there.
    check_values([(train, data.train_data), (val, data.train_data)], data.reading)
    tell_repeats(data.train_data, train, val)
    return train, val


def read_findings(data: CsvOptions) -> tuple[list[dict], list[dict]]:
    """The train and val rows, each with its finding; raises ValueError if there are none of either."""
    know_modalities(data)
    return splits.read_splits(data.train_data, require=FINDINGS, **data.csv_options)


def of_part(rows: list[dict], *parts: str) -> list[dict]:
    """Rows with one of these `part`s; 'all' takes every row."""
    return [row for row in rows if "all" in parts or row.get("part") in parts]


def check_processes(rows: list[dict], what: str) -> None:
    """Raises ValueError if there are fewer rows than processes, each of which takes its share."""
    processes = PartialState().num_processes
    if len(rows) < processes:
        raise ValueError(f"{what} has {len(rows)} rows for {processes} processes: start fewer, or give more rows.")


def tell_repeats(source: str | Path, train_rows: list[dict], val_rows: list[dict]) -> None:
    """Warns of images of a CSV, by their content, that are trained on in several rows, or validated on, too.

    It is no error: people do have several captions of one image, and joined data sets that overlap a little. But a
    validation loss on images that were learned by heart chooses the wrong weights, so each is told by name.
    """
    train, again = resolve_paths(train_rows, source), []
    first: dict[str, str] = {}
    for path, key in zip(train, file_keys(train), strict=True):
        if first.setdefault(key, path) is not path:
            again.append((path, first[key]))
    if again:
        say(
            f"warning: {source}: {len(again)} of {len(train)} train rows repeat the image of another: {_named(again)}."
        )
    tell_overlap(source, train, resolve_paths(val_rows, source))


def tell_overlap(name: str | Path, train: list[str], val: list[str]) -> None:
    """Warns of images that are both trained and validated on, as `tell_repeats` does."""
    keys = file_keys([*train, *val])
    first = dict(zip(keys, train, strict=False))
    both = [(path, first[key]) for path, key in zip(val, keys[len(train) :], strict=True) if key in first]
    if both:
        say(
            f"warning: {name}: {len(both)} of {len(val)} val rows show an image that is trained on, so validation"
            f" looks better than it is: {_named(both)}."
        )


def _named(pairs: list[tuple[str, str]]) -> str:
    names = [a if a == b else f"{a} is {b}" for a, b in pairs[:NAMED]]
    return ", ".join(names) + (f" and {len(pairs) - NAMED} more" if len(pairs) > NAMED else "")


def mirrored(rows: list[dict], no_mirror: bool = False, said: tuple[str, ...] = ("Text", "finding")) -> list[bool]:
    """Which rows' images may be mirrored: where the modality allows it and no column of `said` names a side."""
    return [
        not no_mirror and may_mirror(resolve_modality(row["modality"]), *(row.get(column, "") for column in said))
        for row in rows
    ]


def tell_mirrored(name: str | Path, rows: list[dict], flags: list[bool]) -> None:
    """Says how many rows may be mirrored, by what `mirrored` gave of them, and why not the others."""
    never = sum(not resolve_modality(row["modality"]).flip for row in rows)
    message = f"{name}: {sum(flags)} of {len(rows)} images may be mirrored"
    if any(flags):
        message += f"; {len(rows) - sum(flags) - never} others name a side, {never} are of modalities with a side"
    say(f"{message}.")


def tell_cut(texts: list[str], tokenizer: CLIPTokenizer) -> None:
    """Warns of texts, as the encoder is given them, that are longer than it reads, and quotes one."""
    cut = cut_texts(tokenizer, texts)
    if cut:
        text, lost = cut[0]
        say(
            f"warning: {len(cut)} of {len(texts)} captions are longer than the {tokenizer.model_max_length} tokens"
            f" that the text encoder reads, such as {text!r}, of which {lost.strip()!r} is not learned."
        )


@dataclass
class Rows:
    """Rows to train and to validate on: of `--train_data`, and `old_*` ones of `--replay`."""

    train: list[dict]
    val: list[dict]
    old_train: list[dict]
    old_val: list[dict]

    @classmethod
    def read(cls, data: DataOptions, replay: DataOptions | None, base: str | None) -> "Rows":
        """Reads and checks them; `base` is the pipeline that is trained on, a folder or an id on the Hub, if any.

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
            for a, b, rows, val_rows in ((source, old, train, old_val), (old, source, old_train, val)):
                tell_overlap(f"{a} and the val rows of {b}", resolve_paths(rows, a), resolve_paths(val_rows, b))
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
    unknown = set(map(modality_of, rows)) - set(learned)
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
    learned = set(map(modality_of, train_rows))
    known = learned | set(index.get("modalities") or [])
    counts = Counter(map(modality_of, val_rows))
    for names, what in (
        (counts.keys() - known, "val rows are left out"),
        (counts.keys() & known - learned, "copies of train images are not looked for"),
    ):
        if names:
            without = ", ".join(f"{name!r} ({counts[name]} val rows)" for name in sorted(names))
            warnings.warn(f"{source} has no train rows of {without}: {what}.", stacklevel=2)
    return [row for row in val_rows if modality_of(row) in known]
