"""Options of the training commands: dataclasses whose fields say what they mean, their default and their range.

`transformers.HfArgumentParser` turns them into a command line, `parse` also reads them from YAML, and in Python they
are made as they stand. Wherever they come from, what no run can have is refused before any work is done:

    @dataclass(kw_only=True)
    class MyConfig(DataOptions, RunOptions):
        weight: Weight = option(0.5, "Of what.")

    train(parse(MyConfig, description=__doc__))         # python train/my.py runs/my.yaml --output_dir out --weight 1
    train(MyConfig(train_data="data.csv", output_dir="out", weight=1.0))
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from transformers import HfArgumentParser

from ..options import (  # what most trainers have of it they find here
    OF_THE_TABLE,  # noqa: F401
    Config,
    Count,
    Options,
    Positive,
    Precision,
    Range,  # noqa: F401
    ReadingOptions,  # noqa: F401
    Share,
    TableOptions,
    Weight,
    Whole,
    option,
)


@dataclass(kw_only=True)
class CsvOptions(TableOptions):
    """A data set, in a table of which not everything need be as MINIM has it."""

    train_data: str = option(
        help="CSV in MINIM's format, path,Text,modality[,finding,split,part]; or an ImageFolder, Parquet or tar files "
        "(a file, a folder, a glob), a dataset of save_to_disk, an id on the Hub (docs/data.md)."
    )
    modalities_from: str | None = option(None, "Know the modalities that this pipeline has defined, too.")
    no_mirror: bool = option(
        False, "Mirror no image; else those of symmetric modalities are, if no caption names a side."
    )


@dataclass(kw_only=True)
class DataOptions(CsvOptions):
    """Which rows and images a trainer learns from, named as in diffusers' examples."""

    split: str = option(
        "train",
        "Rows of this `split` are trained on; 'all' takes every row. Without a column `split` all are, but for a "
        "tenth by group that is held out to validate on.",
    )
    val_split: str = option("val", "Rows of this `split` are validated on; 'none' for none.")
    resolution: Count = option(256, "Side of the images in pixels, a multiple of 8.")
    skip_bad_rows: bool = option(False, "Leave out missing or broken images and rows.")
    max_train_samples: Count | None = option(None, "Train on the first so many rows only (for debugging).")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.split == self.val_split:
            raise ValueError(
                f"--split and --val_split are both {self.split!r}; --val_split none validates on nothing."
            )
        if self.resolution % 8:
            raise ValueError(f"--resolution has to be a positive multiple of 8, got {self.resolution}.")


@dataclass(kw_only=True)
class HubOptions(Options):
    """Publishing what was made."""

    output_dir: str = option(help="Where everything is written; the same command goes on with what it finds there.")
    push_to_hub: bool = option(False, "Publish the result; needs `hf auth login`.")
    hub_model_id: str | None = option(None, "Where to, owner/name; default: the name of --output_dir, one's own.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hub_model_id and not self.push_to_hub:
            raise ValueError(f"--hub_model_id {self.hub_model_id} is of no use without --push_to_hub.")

    @property
    def output(self) -> Path:
        return Path(self.output_dir)

    @property
    def hub_target(self) -> str:
        return self.hub_model_id or self.output.resolve().name


@dataclass(kw_only=True)
class PrecisionOptions(Options):
    """Where chance begins, and the precision of networks."""

    seed: Whole = 0
    mixed_precision: Precision = "no"

    @property
    def bf16(self) -> bool:
        return self.mixed_precision == "bf16"


@dataclass(kw_only=True)
class RunOptions(HubOptions, PrecisionOptions):
    """A run: how long, how fast it learns, and what it leaves on its way."""

    train_batch_size: Count = option(64, "Images a step and a process.")
    max_train_steps: Count = 10_000
    max_train_minutes: Positive | None = option(
        None,
        "Run the whole schedule in this time if it ends sooner than --max_train_steps. The steps then depend on the "
        "machine's speed; runs that have to be repeated exactly are given by --max_train_steps alone.",
    )
    learning_rate: Weight = 4e-4
    lr_warmup_steps: Whole = 200
    adam_weight_decay: Weight = 1e-2
    max_grad_norm: Weight = 1.0
    ema_decay: Share = 0.999
    compile: bool = option(False, "torch.compile the networks.")
    gradient_checkpointing: bool = option(False, "Less memory, a quarter slower.")
    validation_steps: Count = 1000
    checkpointing_steps: Count = option(1000, "Also after the last step, and at SIGTERM.")
    checkpoints_total_limit: Count = 2
    resume_from_checkpoint: str = option("latest", "A checkpoint's folder; default: the newest whole in --output_dir.")
    report_to: str | None = option(None, "A tracker of accelerate: tensorboard, wandb, … ; none by default.")

    def __post_init__(self) -> None:
        super().__post_init__()
        name = self.report_to
        if name is None:
            return
        # accelerate leaves out a tracker that is not installed, and says nothing.
        installed = [tracker.value for tracker in get_available_trackers()]
        known = [str(tracker) for tracker in LOGGER_TYPE_TO_CLASS]
        if name not in (*known, "all"):
            raise ValueError(f"--report_to has to be one of {', '.join(known)} or all, got {name!r}.")
        if not installed or name not in (*installed, "all"):
            raise ValueError(f"--report_to {name} is not installed here; installed: {', '.join(installed) or 'none'}.")


def parse(
    config: type[Config],
    argv: Sequence[str] | None = None,
    description: str | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Config:
    """Options from a command line, whose first argument may be a YAML file with more of them.

    What stands on the command line replaces what the file says.

    Args:
        argv: default: that of the process.
        description: the script's docstring, for `--help`.
        defaults: of options for which the command line may have others.

    Raises:
        ValueError: an option has a value that is not possible.
        SystemExit: after `--help`, or an option that there is not.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    raw, epilog = argparse.RawDescriptionHelpFormatter, "A YAML file of options may stand in front of the others."
    parser = HfArgumentParser(config, description=description, epilog=epilog, formatter_class=raw, allow_abbrev=False)
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        arguments = [*yaml_arguments(arguments[0]), *arguments[1:]]
    arguments = [*as_arguments(defaults or {}), *arguments]
    found, unknown = parser.parse_args_into_dataclasses(
        arguments, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return found


def yaml_arguments(path: str | Path) -> list[str]:
    """The options of a YAML file as a command line has them; raises ValueError if it is no table of options."""
    content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path} has to be a table of options, `name: value` in each line, got {content!r}.")
    return as_arguments(content)


def as_arguments(options: Mapping[str, Any]) -> list[str]:
    """Options as a command line has them, without those that are None."""
    arguments = []
    for name, value in options.items():
        if value is not None:
            arguments += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return arguments
