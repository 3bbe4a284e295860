"""What a run leaves to go on from: checkpoints, each whole or not at all, and the word that it is finished."""

import json
import math
import os
import re
import shutil
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError, safe_open

from ..disk import count_bytes, enough_room
from ..files import atomic_path, write_json
from ..finite import check_weights
from .config import Options, RunOptions


FINISHED = "finished.json"


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
MAY_CHANGE = {
    *("output_dir", "resume_from_checkpoint", "max_train_steps", "max_train_minutes", "validation_steps"),
    *("checkpointing_steps", "checkpoints_total_limit", "report_to", "compile", "gradient_checkpointing"),
    *("push_to_hub", "hub_model_id"),
}


def check_arguments(config: RunOptions, folder: Path, what: str | Path) -> None:
    """Raises ValueError if the run in `folder`, of which `what` is to go on, had other arguments."""
    if not (folder / "arguments.json").is_file():
        return
    check_unchanged(json.loads((folder / "arguments.json").read_text()), config, MAY_CHANGE, f"{what} is of a run")


def check_unchanged(before: Mapping[str, Any], config: Options, may_change: Collection[str], what: str) -> None:
    """Raises ValueError if an option that is not of `may_change` is another than it was `before`, in `what`."""
    now = json.loads(json.dumps(asdict(config)))
    changed = [name for name in now if name not in may_change and name in before and before[name] != now[name]]
    if changed:
        changes = "; ".join(f"--{name} was {before[name]!r}, now {now[name]!r}" for name in changed)
        raise ValueError(f"{what} with other arguments: {changes}.")


def find_checkpoint(config: RunOptions) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` names; None if there is nothing to resume from.

    Of `latest` it is the newest that is whole; one that is broken is said, and passed over.

    Raises:
        ValueError: a checkpoint is named that does not exist, or is broken; or the run had other arguments, or
            another number of processes, and so could not be continued as if it had never stopped.
    """
    argument, existing = config.resume_from_checkpoint, list_checkpoints(config.output_dir)
    if argument == "latest":
        checkpoint = newest_whole(existing)
        if checkpoint is None:
            if (config.output / FINISHED).is_file():
                raise ValueError(
                    f"{config.output_dir} holds a finished run and no checkpoint to go on from: choose another"
                    " --output_dir."
                )
            if (config.output / "log.jsonl").is_file():  # it was stopped before its first checkpoint, and begins anew
                check_arguments(config, config.output, config.output)
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
    check_arguments(config, checkpoint.parent, checkpoint)
    before, now = len(list(checkpoint.glob("random_states_*.pkl"))), PartialState().num_processes
    if before != now:
        raise ValueError(f"{checkpoint} is of a run of {before} processes, and now there are {now}.")
    return checkpoint


def newest_whole(checkpoints: list[Path]) -> Path | None:
    """The newest checkpoint that is not broken, after a word on those that are; None if there are none.

    Raises:
        ValueError: all are broken.
    """
    broken: list[str] = []
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


def note_arguments(config: RunOptions, checkpoint: Path | None) -> None:
    """Writes `arguments.json`; of an earlier log only what is before the checkpoint stays.

    That is without the validation after the same step, which is done again.
    """
    output = config.output
    output.mkdir(parents=True, exist_ok=True)
    (output / FINISHED).unlink(missing_ok=True)
    write_json(output / "arguments.json", asdict(config))
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


# The end


def note_finished(config: RunOptions, schedule) -> None:
    """Says in `finished.json`, after everything else is written, that the run is over, and how far it was to go."""
    limits = {"max_train_steps": config.max_train_steps, "max_train_minutes": config.max_train_minutes}
    with atomic_path(config.output / FINISHED) as temporary:
        temporary.write_text(json.dumps({"step": schedule.step, **limits}, indent=2) + "\n")


def is_finished(config: RunOptions) -> bool:
    """Whether `--resume_from_checkpoint latest` finds a run that has nothing left to do, which is then said.

    A run of more steps or minutes than the finished one goes on from its last checkpoint.

    Raises:
        ValueError: the run had other arguments.
    """
    file = config.output / FINISHED
    if config.resume_from_checkpoint != "latest" or not file.is_file():
        return False
    check_arguments(config, file.parent, file.parent)
    held = json.loads(file.read_text())
    if config.max_train_steps > held["max_train_steps"]:
        return False
    if (config.max_train_minutes or math.inf) > (held["max_train_minutes"] or math.inf):
        return False
    if PartialState().is_main_process:
        print(f"{config.output_dir} holds a finished run of {held['step']} steps: there is nothing left to do.")
    return True
