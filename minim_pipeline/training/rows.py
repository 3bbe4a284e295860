"""What is read of a data set, and said of it before training: images that are there twice, that may be mirrored, and
captions that are longer than a text encoder reads."""

import argparse
from pathlib import Path

from transformers import CLIPTokenizer

from minim_pipeline import may_mirror, resolve_modality
from minim_pipeline.cli import say
from minim_pipeline.data.duplicates import file_keys
from minim_pipeline.data.sources import resolve_path
from minim_pipeline.tokens import cut_texts


NAMED = 5  # images that a warning names


def add_csv_arguments(parser) -> None:
    """Options for a CSV that was written elsewhere, see `csv_options`."""
    parser.add_argument("--modality", help="Of all rows of --train_data, where it has no such column.")
    parser.add_argument(
        "--image_root",
        help="Look for the images of --train_data here: by their whole path, or what is left of it without its first "
        "folders.",
    )


def add_mirror_argument(parser) -> None:
    parser.add_argument(
        "--no_mirror",
        action="store_true",
        help="Mirror no image. Without it, those of modalities that look the same mirrored are, unless the caption "
        "names a side.",
    )


def csv_options(args: argparse.Namespace) -> dict:
    """What `read_csv` needs to know of `--train_data`: `--modality` and `--image_root`."""
    return {"modality": args.modality, "image_root": args.image_root}


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
