"""How far a run is, by steps or by time, and how fast it learns there."""

import math
import time

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast


class Schedule:
    """How far a run is, from 0 to 1: by steps, or by time where that is further (`--max_train_minutes`)."""

    def __init__(self, max_steps: int, max_minutes: float | None = None, look_every: int = 16):
        self.max_steps, self.max_seconds = max_steps, 60 * max_minutes if max_minutes else math.inf
        self.look_every = look_every  # steps from one look at the clock to the next
        self.step, self.spent, self.by_time = 0, 0.0, 0.0
        self._last: float | None = None

    def advance(self, accelerator: Accelerator) -> None:
        now = time.monotonic()
        # The clock starts with the second step, so that compiling does not count.
        self.spent += now - self._last if self._last is not None else 0.0
        self._last = now
        self.step += 1
        if self.step % self.look_every == 0 and self.max_seconds < math.inf:
            # All processes go by the main process's clock; asking it makes them wait, so it is asked now and then.
            clock = torch.tensor([self.spent / self.max_seconds], device=accelerator.device, dtype=torch.float32)
            self.by_time = broadcast(clock).item()

    @property
    def progress(self) -> float:
        return min(1.0, max(self.step / self.max_steps, self.by_time))

    @property
    def done(self) -> bool:
        return self.progress >= 1.0

    def set_learning_rates(self, optimizer: torch.optim.Optimizer, peaks: list[float], warmup_steps: int) -> None:
        """Gives each group of the optimizer its rate at this step, of the peak that is its."""
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = self.learning_rate(peak, warmup_steps)

    def learning_rate(self, peak: float, warmup_steps: int) -> float:
        """A linear rise over `warmup_steps`, then half a cosine down to 0."""
        return peak * min(1.0, (self.step + 1) / max(1, warmup_steps)) * 0.5 * (1 + math.cos(math.pi * self.progress))

    def state_dict(self) -> dict:
        return {"step": self.step, "spent": self.spent, "by_time": self.by_time, "max_seconds": self.max_seconds}

    def load_state_dict(self, state: dict) -> None:
        self.step, self.spent, self.by_time = state["step"], state["spent"], state["by_time"]
        if state.get("max_seconds", self.max_seconds) != self.max_seconds:  # it goes on with more time
            self.by_time = self.spent / self.max_seconds
