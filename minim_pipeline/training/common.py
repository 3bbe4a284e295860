"""What the trainers share: rows, randomness that does not depend on history, the arguments of a run on disk."""

import argparse
import json
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState

from ..data import splits
from ..data.image_loading import check_values
from ..files import atomic_path, write_json
from ..modalities import resolve_modality
from .checkpoints import FINISHED, step_of
from .config import DataOptions
from .rows import image_paths, tell_repeats


def add_modalities_argument(group) -> None:
    """`--modalities_from`, for scripts that are given no pipeline."""
    group.add_argument("--modalities_from", help="Know the modalities that this pipeline has defined, too.")


def know_modalities(args: argparse.Namespace) -> None:
    """Registers what the pipelines of the arguments define; before any row is read."""
    from minim_pipeline.loading import register_modalities

    base = getattr(args, "pretrained_model_name_or_path", None)
    if base and Path(base).is_dir() and not (Path(base) / "model_index.json").is_file():
        base = None  # parts of a pipeline
    for model in filter(None, (base, args.modalities_from)):
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
