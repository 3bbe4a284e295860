"""What the training scripts share: arguments, rows, randomness that does not depend on history, the log."""

import argparse
import json
import warnings
from collections import Counter
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from minim_pipeline.data import splits
from minim_pipeline.data.image_loading import check_values
from minim_pipeline.data.image_reader import add_reading_arguments, reading_of
from minim_pipeline.files import atomic_path, write_json
from minim_pipeline.locking import locked
from minim_pipeline.modalities import resolve_modality
from minim_pipeline.training.arguments import check_shares, check_tracker
from minim_pipeline.training.checkpoints import FINISHED, step_of
from minim_pipeline.training.hub import add_hub_arguments, check_hub_arguments
from minim_pipeline.training.rows import add_csv_arguments, add_mirror_argument, csv_options, image_paths, tell_repeats

from .log import Log  # noqa: F401
from .schedule import Schedule  # noqa: F401


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that every trainer on images has, named as in diffusers' examples."""
    add_data_arguments(parser)
    add_run_arguments(parser)


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument("--train_data", required=True, help="CSV in MINIM's format: path,Text,modality[,finding,split].")
    data.add_argument(
        "--split",
        default="train",
        help="Rows of this `split` are trained on; 'all' takes every row. Without "
        "a column `split` all are, but for a tenth by group that is held out to validate on.",
    )
    data.add_argument("--val_split", default="val", help="Rows of this `split` are validated on; 'none' for none.")
    data.add_argument("--resolution", type=int, default=256, help="Side of the images in pixels, a multiple of 8.")
    add_modalities_argument(data)
    data.add_argument("--skip_bad_rows", action="store_true", help="Leave out missing or broken images and rows.")
    add_csv_arguments(data)
    add_mirror_argument(data)
    add_reading_arguments(data)
    data.add_argument("--max_train_samples", type=int, help="Train on the first so many rows only (for debugging).")


def add_modalities_argument(group) -> None:
    """`--modalities_from`, for scripts that are given no pipeline."""
    group.add_argument("--modalities_from", help="Know the modalities that this pipeline has defined, too.")


def know_modalities(args: argparse.Namespace) -> None:
    """Registers what the pipelines of the arguments define; before any row is read."""
    from minim_pipeline.generate.command import read_model_index

    base = getattr(args, "pretrained_model_name_or_path", None)
    if base and Path(base).is_dir() and not (Path(base) / "model_index.json").is_file():
        base = None  # parts of a pipeline
    for model in filter(None, (base, args.modalities_from)):
        read_model_index(model)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    run = parser.add_argument_group("run")
    run.add_argument("--output_dir", required=True)
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--train_batch_size", type=int, default=64, help="Images a step and a process.")
    run.add_argument("--max_train_steps", type=int, default=10_000)
    run.add_argument(
        "--max_train_minutes",
        type=float,
        help="Run the whole schedule in this time if it ends sooner than --max_train_steps. The steps then depend on "
        "the machine's speed; runs that have to be repeated exactly are given by --max_train_steps alone.",
    )
    run.add_argument("--learning_rate", type=float, default=4e-4)
    run.add_argument("--lr_warmup_steps", type=int, default=200)
    run.add_argument("--adam_weight_decay", type=float, default=1e-2)
    run.add_argument("--max_grad_norm", type=float, default=1.0)
    run.add_argument("--ema_decay", type=float, default=0.999)
    run.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    run.add_argument("--compile", action="store_true", help="torch.compile the networks.")
    run.add_argument("--gradient_checkpointing", action="store_true", help="Less memory, a quarter slower.")
    run.add_argument("--validation_steps", type=int, default=1000)
    run.add_argument("--checkpointing_steps", type=int, default=1000, help="Also after the last step, and at SIGTERM.")
    run.add_argument("--checkpoints_total_limit", type=int, default=2)
    run.add_argument(
        "--resume_from_checkpoint",
        help="A checkpoint's folder, or 'latest': the newest that is whole, if there is one.",
    )
    run.add_argument("--report_to", help="A tracker of accelerate: tensorboard, wandb, … ; none by default.")
    add_hub_arguments(parser)


def check_common_arguments(args: argparse.Namespace) -> None:
    """Raises ValueError for what no run can have, before any image is read; numbers: `arguments.check_numbers`."""
    check_run_arguments(args)
    if args.split == args.val_split:
        raise ValueError(f"--split and --val_split are both {args.split!r}; --val_split none validates on nothing.")
    if args.resolution < 8 or args.resolution % 8:
        raise ValueError(f"--resolution has to be a positive multiple of 8, got {args.resolution}.")


def check_run_arguments(args: argparse.Namespace) -> None:
    """As `check_common_arguments`, of a run that reads no images."""
    if args.max_train_minutes is not None and args.max_train_minutes <= 0:
        raise ValueError(f"--max_train_minutes has to be above 0, got {args.max_train_minutes}.")
    check_shares(args, "ema_decay")
    check_tracker(args.report_to)
    check_hub_arguments(args)


def read_splits(args: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """The rows to train on and those to validate on; every image is looked at before training starts.

    Images that are there twice are told.
    """
    know_modalities(args)
    wanted = None if args.split == "all" else args.split, None if args.val_split == "none" else args.val_split
    options = {"skip_bad_rows": args.skip_bad_rows, **csv_options(args)}
    train, val = splits.read_splits(args.train_data, *wanted, **options)
    if not train:
        raise ValueError(f"{args.train_data} has no rows to train on: all are of --val_split {args.val_split!r}.")
    train, val = train[: args.max_train_samples], val[: args.max_train_samples]
    # Images that cannot be read as they are meant are refused now, and not when the networks are there.
    check_values([(train, args.train_data), (val, args.train_data)], reading_of(args))
    tell_repeats(args.train_data, image_paths(train, args.train_data), image_paths(val, args.train_data))
    return train, val


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


def check_processes(rows: list[dict], what: str) -> None:
    """Raises ValueError if there are fewer rows than processes, each of which takes its share."""
    processes = PartialState().num_processes
    if len(rows) < processes:
        raise ValueError(f"{what} has {len(rows)} rows for {processes} processes: start fewer, or give more rows.")


def start_trackers(accelerator, name: str, args: argparse.Namespace) -> None:
    """Starts what `--report_to` names, with the arguments in types that all trackers take."""
    if args.report_to:
        config = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in vars(args).items()}
        accelerator.init_trackers(name, config=config)


def own_folder(args: argparse.Namespace) -> AbstractContextManager:
    """`--output_dir` as one run's alone, of all its processes; raises as `locked`."""
    # As the Accelerator, which comes later, will have it: what is set up first stays.
    return locked(args.output_dir, PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")))


def note_arguments(args: argparse.Namespace, checkpoint: Path | None) -> None:
    """Writes `arguments.json`; of an earlier log only what is before the checkpoint stays.

    That is without the validation after the same step, which is done again.
    """
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    (output / FINISHED).unlink(missing_ok=True)
    write_json(output / "arguments.json", json.loads(json.dumps(vars(args), default=str)))
    # Without a checkpoint everything is done again, what comes before the first step too.
    log, step = output / "log.jsonl", step_of(checkpoint) if checkpoint else -1

    def stays(line: str) -> bool:
        if not line.endswith("\n"):  # the process was killed while it wrote
            return False
        record = json.loads(line)
        return record["step"] < step or (record["step"] == step and record["kind"] == "train")

    if log.is_file():
        with atomic_path(log) as temporary:
            temporary.write_text("".join(line for line in log.read_text().splitlines(keepends=True) if stays(line)))


def step_generator(seed: int, step: int, rank: int, device: torch.device | str) -> torch.Generator:
    """The source of everything random in one step on one process.

    It depends on nothing but its arguments, so a run that is resumed draws what an unbroken run would have drawn.
    """
    state = np.random.SeedSequence([seed, step, rank]).generate_state(2, dtype=np.uint32)
    return torch.Generator(device).manual_seed(int(state[0]) << 20 ^ int(state[1]))


def hold_images(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Keeps the images on the device if they take less than a quarter of its free memory, else where they are."""
    if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] / 4:
        return images.to(device)
    return images
