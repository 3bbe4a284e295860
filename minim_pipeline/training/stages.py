"""A run of several stages, of which each is done once: what was stopped goes on where it was."""

import gc
import json
import time
from collections.abc import Callable, Collection
from dataclasses import asdict
from typing import Any

import torch

from ..files import write_json
from .checkpoints import check_unchanged
from .config import HubOptions


class Stages:
    """Which stages of a run are finished: in `stages.json`, with the options and what else has to stay the same.

    A stage is written whole or not at all by whoever does it, so one that was stopped can be begun again. `minutes`
    are those of each finished one, all its attempts together; of one that was killed outright, the last alone.

    Raises:
        ValueError: the folder, which the run has locked, holds one whose options differ in more than `may_change`.
    """

    def __init__(self, config: HubOptions, may_change: Collection[str]):
        self.path = config.output / "stages.json"
        arguments = {name: value for name, value in asdict(config).items() if name not in may_change}
        self.state: dict[str, Any] = {"arguments": arguments, "minutes": {}, "unfinished": {}}
        if self.path.is_file():
            self.state |= json.loads(self.path.read_text())
            check_unchanged(self.state["arguments"], config, may_change, f"{config.output_dir} holds a run")
        self.minutes: dict[str, float] = self.state["minutes"]

    def require(self, name: str, value: Any, change: str) -> None:
        """Raises ValueError, which says `change`, if `value` (a JSON one) is not what it was when the run began."""
        if self.state.setdefault(name, value) != value:
            raise ValueError(f"{change} since the run in {self.path.parent} began: choose another --output_dir.")

    def run(self, name: str, stage: Callable[..., object], *arguments: Any) -> None:
        """Does a stage unless it is finished."""
        if name in self.minutes:
            print(f"[{name}] is finished already")
            return
        print(f"[{name}]")
        gc.collect()
        torch.cuda.empty_cache()  # each stage begins with an empty device
        begun, unfinished = time.monotonic(), self.state["unfinished"]
        taken = unfinished
        try:
            stage(*arguments)
            taken = self.minutes
        finally:
            taken[name] = round(unfinished.pop(name, 0.0) + (time.monotonic() - begun) / 60, 2)
            self.save()

    def save(self) -> None:
        write_json(self.path, self.state)
