"""What a run leaves on the disk: checkpoints, models and the word that it is finished; each whole or not at all."""

import argparse
import errno
import json
import math
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open

from minim_pipeline.finite import check_weights
from minim_pipeline.provenance import atomic_path


# Writing


def save_checkpoint(accelerator, output_dir: str | Path, step: int, limit: int) -> Path:
    """Writes `checkpoint-<step>` whole or not at all, and removes the oldest before it beyond `limit`.

    Raises:
        ValueError: the weights are not finite.
        OSError: the disk is full.
    """
    final, unfinished = Path(output_dir) / f"checkpoint-{step}", Path(output_dir) / f".checkpoint-{step}"
    for model in accelerator._models:
        check_weights(model)
    parts = [*accelerator._models, *accelerator._optimizers, *accelerator._custom_objects]
    with enough_room(unfinished, sum(count_bytes(part.state_dict()) for part in parts)):
        accelerator.save_state(str(unfinished))
        accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        os.replace(unfinished, final)
        # A later one is of a run that goes on from an earlier one because it is broken.
        earlier = [path for path in list_checkpoints(output_dir) if step_of(path) <= step]
        for old in earlier[:-limit]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def save_model(model, folder: str | Path) -> None:
    """Writes a pipeline, or a part of one, with `save_pretrained`: finite and whole, or not at all.

    Raises:
        ValueError, OSError: as `save_checkpoint`.
    """
    check_weights(model)
    parts = model.components.values() if hasattr(model, "components") else [model]
    size = sum(count_bytes(part.state_dict()) for part in parts if isinstance(part, torch.nn.Module))
    with whole_folder(folder, size) as unfinished:
        model.save_pretrained(unfinished)


@contextmanager
def whole_folder(folder: str | Path, size: int = 0) -> Iterator[Path]:
    """Yields a folder beside `folder` that takes its place at the end, or is removed if anything fails.

    Args:
        size: in bytes, about what will be written.

    Raises:
        OSError: the disk is full.
    """
    folder = Path(folder)
    unfinished = folder.with_name(f".{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    with enough_room(unfinished, size):
        unfinished.mkdir(parents=True)
        yield unfinished
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


@contextmanager
def whole_file(path: Path, size: int = 0) -> Iterator[Path]:
    """As `whole_folder`, of a file."""
    unfinished = path.with_name(f".{path.name}")
    with enough_room(unfinished, size):
        yield unfinished
    unfinished.replace(path)


@contextmanager
def enough_room(path: Path, size: int) -> Iterator[None]:
    """What is written in it to `path`, a file or a folder, is removed if anything fails.

    Raises:
        OSError: the disk has no room for `size` bytes, or is full when they are written; the message says where, how
            much is needed and how much is free.
    """

    def told(free: int) -> OSError:
        place = path.with_name(path.name.removeprefix("."))
        return OSError(
            errno.ENOSPC, f"No room on the disk: {shown(size)} needed, {shown(free)} free", str(place.absolute())
        )

    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise told(free)
    try:
        yield
    except BaseException as error:
        free = shutil.disk_usage(path.parent).free  # before what was written is removed
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        if is_full(error):
            raise told(free) from error
        raise


def is_full(error: BaseException) -> bool:
    """Whether writing failed for want of room (disk, quota, limit), as Python, safetensors and torch say it."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    signs = ("No space left", "quota exceeded", "File too large", "PytorchStreamWriter", "inline_container")
    return isinstance(error, RuntimeError | SafetensorError) and any(sign in str(error) for sign in signs)


def count_bytes(state) -> int:
    """Of the tensors in a state dict."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return sum(map(count_bytes, values))


def shown(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


# Going on


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def broken_part(checkpoint: Path) -> str | None:
    """Which file of a checkpoint is missing or cut off, and how that was seen; None if all are whole.

    Every file ends, or begins, with a list of what it holds, so that only these are read.
    """
    for name in ("model*.safetensors", "optimizer.bin", "random_states_0.pkl"):
        if not any(checkpoint.glob(name)):
            return f"{name} is missing"
    for file in sorted(checkpoint.iterdir()):
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt"):
                    pass
            elif file.suffix in (".bin", ".pkl"):
                zipfile.ZipFile(file).close()  # as torch.save writes it
        except (OSError, SafetensorError, zipfile.BadZipFile) as error:
            return f"{file.name}: {error}"
    return None


# What may differ between a run and its continuation: where it lies, and how long and how closely it is watched.
_MAY_CHANGE = {
    *("output_dir", "resume_from_checkpoint", "max_train_steps", "max_train_minutes", "validation_steps"),
    *("checkpointing_steps", "checkpoints_total_limit", "report_to", "compile", "gradient_checkpointing"),
    *("push_to_hub", "hub_model_id"),
}


def check_arguments(args: argparse.Namespace, folder: Path, what: str | Path) -> None:
    """Raises ValueError if the run in `folder`, of which `what` is to go on, had other arguments."""
    if not (folder / "arguments.json").is_file():
        return
    before = json.loads((folder / "arguments.json").read_text())
    now = json.loads(json.dumps(vars(args), default=str))
    other = [k for k in now if k not in _MAY_CHANGE and k in before and before[k] != now[k]]
    if other:
        told = "; ".join(f"--{k} was {before[k]!r}, now {now[k]!r}" for k in other)
        raise ValueError(f"{what} is of a run with other arguments: {told}.")


def find_checkpoint(args: argparse.Namespace) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` names; None if there is nothing to resume from.

    Of `latest` it is the newest that is whole; one that is broken is said, and passed over.

    Raises:
        ValueError: a checkpoint is named that does not exist, or is broken; the folder holds a run and nothing was
            said of it; or the run had other arguments, and so could not be continued as if it had never stopped.
    """
    argument, existing = args.resume_from_checkpoint, list_checkpoints(args.output_dir)
    if argument is None and (existing or (Path(args.output_dir) / "log.jsonl").is_file()):
        found = ", ".join(p.name for p in existing) or "none"
        raise ValueError(
            f"{args.output_dir} holds an earlier run (checkpoints: {found}): give --resume_from_checkpoint latest to "
            "go on with it, or another --output_dir."
        )
    if argument is None:
        return None
    if argument == "latest":
        checkpoint = newest_whole(existing)
        if checkpoint is None:
            if (Path(args.output_dir) / FINISHED).is_file():
                raise ValueError(
                    f"{args.output_dir} holds a finished run and no checkpoint to go on from: choose another"
                    " --output_dir."
                )
            return None
    else:
        checkpoint = Path(argument)
        if not re.fullmatch(r"checkpoint-\d+", checkpoint.name) or not checkpoint.is_dir():
            raise ValueError(
                f"{argument!r} is no folder `checkpoint-<step>`; there are: {[p.name for p in existing]}."
            )
        why = broken_part(checkpoint)
        if why:
            others = ", ".join(p.name for p in list_checkpoints(checkpoint.parent) if not broken_part(p)) or "none"
            raise ValueError(f"{checkpoint} is broken: {why}. Whole ones beside it: {others}.")
    check_arguments(args, checkpoint.parent, checkpoint)
    return checkpoint


def newest_whole(checkpoints: list[Path]) -> Path | None:
    """The newest checkpoint that is not broken, after a word on those that are; None if there are none.

    Raises:
        ValueError: all are broken.
    """
    broken = []
    for checkpoint in reversed(checkpoints):
        why = broken_part(checkpoint)
        if why is None:
            if broken and PartialState().is_main_process:
                print(f"Broken: {'; '.join(broken)}. The run goes on from {checkpoint}, which is whole.", flush=True)
            return checkpoint
        broken.append(f"{checkpoint} ({why})")
    if broken:
        raise ValueError(f"No checkpoint is whole: {'; '.join(broken)}. Remove them to begin anew.")
    return None


# The end

FINISHED = "finished.json"


def note_finished(args: argparse.Namespace, schedule) -> None:
    """Says in `finished.json`, after everything else is written, that the run is over, and how far it was to go."""
    limits = {"max_train_steps": args.max_train_steps, "max_train_minutes": args.max_train_minutes}
    with atomic_path(Path(args.output_dir) / FINISHED) as temporary:
        temporary.write_text(json.dumps({"step": schedule.step, **limits}, indent=2) + "\n")


def is_finished(args: argparse.Namespace) -> bool:
    """Whether `--resume_from_checkpoint latest` finds a run that has nothing left to do, which is then said.

    A run of more steps or minutes than the finished one goes on from its last checkpoint.

    Raises:
        ValueError: the run had other arguments.
    """
    file = Path(args.output_dir) / FINISHED
    if args.resume_from_checkpoint != "latest" or not file.is_file():
        return False
    check_arguments(args, file.parent, file.parent)
    held = json.loads(file.read_text())
    if args.max_train_steps > held["max_train_steps"]:
        return False
    if (args.max_train_minutes or math.inf) > (held["max_train_minutes"] or math.inf):
        return False
    if PartialState().is_main_process:
        print(f"{args.output_dir} holds a finished run of {held['step']} steps: there is nothing left to do.")
    return True
