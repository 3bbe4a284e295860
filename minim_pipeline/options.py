"""Options as dataclasses, whose fields say what they mean, their default and their range.

The commands of `minim` make their command lines of them with `add_options`, the trainers with
`minim_pipeline.training.config.parse`, which imports transformers. In Python they are made as they stand.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from inspect import get_annotations
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from .data.image_reader import Reading
from .data.table import Columns


@dataclass(frozen=True)
class Range:
    """The values that a number may have: from `least` to `most`; `open` if neither of them itself."""

    least: float = -math.inf
    most: float = math.inf
    open: bool = False
    multiple: int | None = None

    def check(self, name: str, value: float) -> None:
        """Raises ValueError, in the words of the command line, for a value that is not in the range."""
        if self.open and not self.least < value < self.most:
            top = "" if math.isinf(self.most) else f" and below {self.most:g}"
            raise ValueError(f"--{name} has to be above {self.least:g}{top}, got {value}.")
        if not math.isinf(self.most) and not self.least <= value <= self.most:
            raise ValueError(f"--{name} has to be between {self.least:g} and {self.most:g}, got {value}.")
        if not value >= self.least:  # so that nan fails too
            raise ValueError(f"--{name} has to be at least {self.least:g}, got {value}.")
        if not math.isfinite(value):
            raise ValueError(f"--{name} has to be a finite number, got {value}.")
        if self.multiple and value % self.multiple:
            raise ValueError(f"--{name} has to be a multiple of {self.multiple}, got {value}.")


Count = Annotated[int, Range(1)]  # sizes and numbers of things
Whole = Annotated[int, Range(0)]  # 0 means none, or the first
Weight = Annotated[float, Range(0)]  # rates, weights, costs
Positive = Annotated[float, Range(0, open=True)]
Share = Annotated[float, Range(0, 1)]

Fit = Literal["stretch", "crop", "pad"]
Precision = Literal["no", "bf16"]


def option(default: Any = MISSING, help: str = "", **keywords: Any) -> Any:
    """A field with its default and the line that `--help` shows; without a default it has to be given.

    Args:
        keywords: further ones of `ArgumentParser.add_argument`, such as `nargs` or `metavar`.
    """
    metadata = {"help": help.replace("%", "%%"), **keywords}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class Options:
    """What all options have: ranges, by the types of their fields. A group adds checks in its `__post_init__`."""

    separator = "_"  # between the words of an option, as messages have it

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            for number in value if isinstance(value, list | tuple) else [value]:
                for limits in ranges(hint) if number is not None else []:
                    limits.check(name.replace("_", self.separator), number)

    def values(self, *names: str) -> dict[str, Any]:
        """Some of the options, for another dataclass that has them, too."""
        return {name: getattr(self, name) for name in names}


def ranges(hint: Any) -> list[Range]:
    """The ranges in a type, as of `Count | None` or `list[Share]`."""
    if get_origin(hint) is Annotated:
        return [part for part in hint.__metadata__ if isinstance(part, Range)]
    return [found for part in get_args(hint) for found in ranges(part)]


@dataclass(kw_only=True)
class ReadingOptions(Options):
    """How images are read."""

    fit: Fit = option("stretch", "What becomes of images that are not square.")
    window: list[float] | None = option(
        None,
        "Values that become black and white, in images of more than 8 bits (default: by the bits in use; a lung "
        "window for chest CT in Hounsfield units; a DICOM file's own window).",
        metavar=("LOW", "HIGH"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.reading_elsewhere()  # raises for a window that is none

    def reading_elsewhere(self) -> Reading:
        """How the images of a CSV are read that `--modality` and `--image_root` are not of."""
        return Reading(self.fit, (self.window[0], self.window[1]) if self.window else None)


# Of the options below, those that are of one table, and not of all that a command reads.
OF_THE_TABLE = ("modality", "image_root", "image_column", "caption_column", "modality_column", "finding_column")


@dataclass(kw_only=True)
class TableOptions(ReadingOptions):
    """How tables and their images are read, of which not everything need be as MINIM has it."""

    modality: str | None = option(None, "Of all rows, where the table has no such column.")
    image_column: str | None = option(None, "Where its name is not usual: the column of the images, or their paths.")
    caption_column: str | None = option(None, "The same of the captions.")
    modality_column: str | None = option(None, "The same of the modalities.")
    finding_column: str | None = option(None, "The same of the findings.")
    image_root: str | None = option(
        None, "Look for the images here: by their whole path, or what is left of it without its first folders."
    )

    @property
    def csv_options(self) -> dict[str, Any]:
        """What `read_dataset` needs to know of the table."""
        names = self.image_column, self.caption_column, self.modality_column, self.finding_column
        return {"modality": self.modality, "image_root": self.image_root, "columns": Columns(*names)}

    @property
    def reading(self) -> Reading:
        """How the images of the table are read."""
        return dataclasses.replace(self.reading_elsewhere(), **self.csv_options)


Config = TypeVar("Config", bound=Options)
Number = TypeVar("Number", int, float)


def number(kind: type[Number], limits: Range) -> Callable[[str], Number]:
    """A type for argparse: a number of `kind`, int or float, within `limits`."""

    def parse(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            value = None
        # Written so that nan fails too.
        if value is None or not limits.least <= value < 2**63 or (limits.multiple and value % limits.multiple):
            what = "a whole number" if kind is int else "a number"
            of = f", a multiple of {limits.multiple}" if limits.multiple else ""
            raise argparse.ArgumentTypeError(f"has to be {what} from {limits.least} on{of}, got {text!r}")
        return value

    return parse


def add_options(parser: argparse.ArgumentParser, options: type[Options], strict: bool = True) -> None:
    """Adds the fields of `options` to a parser, those of each class that it is made of as a group of `--help`.

    Spelled with hyphens. `HfArgumentParser` would import transformers, which takes a second. `strict` refuses a number
    that is out of range while parsing; else only making `options` does.
    """
    owners = {name: part for part in reversed(options.__mro__) for name in get_annotations(part)}
    hints = get_type_hints(options, include_extras=True)
    for part in options.__mro__:
        if own := [f for f in fields(options) if owners[f.name] is part]:
            group = parser.add_argument_group((part.__doc__ or "").partition("\n")[0].rstrip("."))
            for f in own:
                _add_option(group, f, hints[f.name], strict)


def _add_option(parser: argparse._ArgumentGroup, f: dataclasses.Field, hint: Any, strict: bool) -> None:
    default = f.default if f.default_factory is MISSING else f.default_factory()
    keywords: dict[str, Any] = dict(f.metadata)
    keywords |= {"required": True} if default is MISSING else {"default": default}
    limits = ranges(hint)
    if NoneType in get_args(hint):
        hint = get_args(hint)[0]
    if get_origin(hint) is list:
        (hint,) = get_args(hint)
        if "action" not in keywords:
            keywords["nargs"] = len(keywords["metavar"]) if isinstance(keywords.get("metavar"), tuple) else "+"
    kind = hint.__origin__ if get_origin(hint) is Annotated else hint
    if kind is bool:
        keywords["action"] = "store_true"
    elif get_origin(kind) is Literal:
        keywords["choices"] = get_args(kind)
    else:
        keywords["type"] = number(kind, limits[0]) if strict and limits else kind
        if "choices" not in keywords:
            keywords.setdefault("metavar", {Path: "PATH", int: "N", float: "X"}.get(kind))
    parser.add_argument(f"--{f.name.replace('_', '-')}", **keywords)


def options_from(options: type[Config], args: argparse.Namespace) -> Config:
    """What `add_options` has parsed; raises ValueError for values that are not possible."""
    return options(**{f.name: getattr(args, f.name) for f in fields(options)})
