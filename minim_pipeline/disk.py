"""Models, folders and files that appear whole or not at all, and a full disk that is called so."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from .files import FULL
from .finite import check_weights


def save_model(model, folder: str | Path) -> None:
    """Writes a pipeline, or a part of one, with `save_pretrained`: finite and whole, or not at all.

    Raises ValueError if the weights are not finite, OSError if the disk is full.
    """
    check_weights(model)
    parts = model.components.values() if hasattr(model, "components") else [model]
    size = sum(count_bytes(part.state_dict()) for part in parts if isinstance(part, torch.nn.Module))
    with whole_folder(folder, size) as unfinished:
        model.save_pretrained(unfinished)


@contextmanager
def whole_folder(folder: str | Path, size: int = 0) -> Iterator[Path]:
    """Yields a folder beside `folder` that takes its place at the end, or is removed if anything fails.

    `size`: in bytes, about what will be written. Raises OSError if the disk is full.
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

    Raises OSError if the disk has no room for `size` bytes, or is full when they are written; the message says where,
    how much is needed and how much is free.
    """

    def told(free: int) -> OSError:
        place = str(path.with_name(path.name.removeprefix(".")).absolute())
        needed = f"{shown(size)} needed, " if size else ""
        return OSError(errno.ENOSPC, f"No room on the disk: {needed}{shown(free)} free", place)

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
    if isinstance(error, OSError) and error.errno in FULL:
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
