"""The rows of a data set, and what is said of them before training: images that are there twice, that may be mirrored,
and captions that are longer than a text encoder reads."""

from pathlib import Path

from accelerate import PartialState
from transformers import CLIPTokenizer

from .. import may_mirror, resolve_modality
from ..cli import say
from ..data import splits
from ..data.image_loading import check_values
from ..data.image_reader import file_keys
from ..data.sources import resolve_path
from ..loading import register_modalities
from ..tokens import cut_texts
from .config import DataOptions, Options


NAMED = 5  # images that a warning names


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
    tell_repeats(data.train_data, image_paths(train, data.train_data), image_paths(val, data.train_data))
    return train, val


def check_processes(rows: list[dict], what: str) -> None:
    """Raises ValueError if there are fewer rows than processes, each of which takes its share."""
    processes = PartialState().num_processes
    if len(rows) < processes:
        raise ValueError(f"{what} has {len(rows)} rows for {processes} processes: start fewer, or give more rows.")


def image_paths(rows: list[dict], csv_path: str | Path) -> list[Path]:
    return [resolve_path(row, csv_path) for row in rows]


def tell_repeats(name: str | Path, train: list[Path], val: list[Path]) -> None:
    """Warns of images, by their content, that are trained on in several rows, or both trained and validated on.

    It is no error: people do have several captions of one image, and joined data sets that overlap a little. But a
    validation loss on images that were learned by heart chooses the wrong weights, so each is told by name.

    Args:
        name: of the data set.
        train, val: the images of its rows.
    """
    first: dict[str, Path] = {}
    again = []
    for path, key in zip(train, file_keys(train), strict=True):
        if first.setdefault(key, path) is not path:
            again.append((path, first[key]))
    if again:
        say(f"warning: {name}: {len(again)} of {len(train)} train rows repeat the image of another: {_named(again)}.")
    tell_overlap(name, train, val)


def tell_overlap(name: str | Path, train: list[Path], val: list[Path]) -> None:
    """Warns of images that are both trained and validated on, as `tell_repeats` does."""
    keys = file_keys([*train, *val])
    first = dict(zip(keys, train, strict=False))
    both = [(path, first[key]) for path, key in zip(val, keys[len(train) :], strict=True) if key in first]
    if both:
        say(
            f"warning: {name}: {len(both)} of {len(val)} val rows show an image that is trained on, so validation"
            f" looks better than it is: {_named(both)}."
        )


def _named(pairs: list[tuple[Path, Path]]) -> str:
    told = [str(a) if a == b else f"{a} is {b}" for a, b in pairs[:NAMED]]
    return ", ".join(told) + (f" and {len(pairs) - NAMED} more" if len(pairs) > NAMED else "")


def mirrored(rows: list[dict], no_mirror: bool = False, said: tuple[str, ...] = ("Text", "finding")) -> list[bool]:
    """Which rows' images may be mirrored: where the modality allows it and no column of `said` names a side."""
    return [
        not no_mirror and may_mirror(resolve_modality(row["modality"]), *(row.get(column, "") for column in said))
        for row in rows
    ]


def tell_mirrored(name: str | Path, rows: list[dict], flags: list[bool]) -> None:
    """Says how many rows may be mirrored, by what `mirrored` gave of them, and why not the others."""
    never = sum(not resolve_modality(row["modality"]).flip for row in rows)
    told = f"{name}: {sum(flags)} of {len(rows)} images may be mirrored"
    if any(flags):
        told += f"; {len(rows) - sum(flags) - never} others name a side, {never} are of modalities with a side"
    say(f"{told}.")


def tell_cut(texts: list[str], tokenizer: CLIPTokenizer) -> None:
    """Warns of texts, as the encoder is given them, that are longer than it reads, and quotes one."""
    cut = cut_texts(tokenizer, texts)
    if cut:
        text, lost = cut[0]
        say(
            f"warning: {len(cut)} of {len(texts)} captions are longer than the {tokenizer.model_max_length} tokens"
            f" that the text encoder reads, such as {text!r}, of which {lost.strip()!r} is not learned."
        )
