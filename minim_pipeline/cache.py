"""Tensors that are made once, and read from disk when the same is asked for again."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .disk import count_bytes, whole_file


def cached_tensors(
    path: Path, key: Any, make: Callable[[], dict[str, torch.Tensor]], keep_other: bool = False
) -> dict[str, torch.Tensor]:
    """What `make` gives, by name, read from `path` if that holds what was made under the same key.

    Args:
        path: a file of safetensors, written whole or not at all.
        key: anything that JSON can say, of all settings that the tensors depend on.
        keep_other: raise ValueError where the file was made under another key; else it is made anew.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
    if path.is_file():
        with safe_open(path, "pt") as stored:
            if (stored.metadata() or {}).get("key") == digest:
                return {name: stored.get_tensor(name) for name in stored.keys()}
        if keep_other:
            raise ValueError(f"{path} was made with other settings: choose another folder, or the same settings.")
    tensors = {name: tensor.cpu().contiguous() for name, tensor in make().items()}
    with whole_file(path, count_bytes(tensors)) as unfinished:
        save_file(tensors, unfinished, metadata={"key": digest})
    return tensors


def cached_tensor(path: Path, key: Any, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """As `cached_tensors`, of one tensor; what was made under another key is not written over."""
    return cached_tensors(path, key, lambda: {"tensor": make()}, keep_other=True)["tensor"]
