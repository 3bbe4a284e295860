"""What a run says while it is under way, at the terminal and in `log.jsonl`."""

import json
import time
from pathlib import Path

from tqdm.auto import tqdm

from .schedule import Schedule


class Log:
    """A progress bar with images/s and time left, and a line of JSON for every record in `log.jsonl`."""

    def __init__(self, accelerator, output_dir: str, schedule: Schedule, images_a_step: int):
        self.accelerator, self.schedule, self.images_a_step = accelerator, schedule, images_a_step
        self.path = Path(output_dir) / "log.jsonl"
        self.bar = tqdm(
            total=1000,
            initial=int(1000 * schedule.progress),
            disable=not accelerator.is_local_main_process,
            bar_format="{desc} {percentage:3.0f}%|{bar:20}| {elapsed}<{remaining}{postfix}",
        )
        self.rate, self._since = 0.0, (time.monotonic(), schedule.step)

    def tick(self, **shown) -> None:
        now, (then, step) = time.monotonic(), self._since
        if now - then > 2:
            self.rate = (self.schedule.step - step) * self.images_a_step / (now - then)
            self._since = (now, self.schedule.step)
            self.bar.set_description(f"step {self.schedule.step}")
            self.bar.set_postfix_str(f"{self.rate:.0f} images/s " + " ".join(f"{k} {v:.3g}" for k, v in shown.items()))
            self.bar.n = int(1000 * self.schedule.progress)
            self.bar.refresh()

    def write(self, kind: str, **values) -> None:
        if not self.accelerator.is_main_process:
            return
        record = {
            "kind": kind,
            "step": self.schedule.step,
            "minutes": round(self.schedule.spent / 60, 2),
            "images_per_second": round(self.rate),
            **values,
        }
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")
        flat = {f"{kind}/{k}": v for k, v in values.items() if isinstance(v, int | float)}
        self.accelerator.log(flat, step=self.schedule.step)
        self.bar.write(f"[{kind}] " + json.dumps({k: v for k, v in record.items() if k != "kind"}))


def read_log(output_dir: str | Path) -> list[dict]:
    """The records of the run in a folder."""
    return [json.loads(line) for line in (Path(output_dir) / "log.jsonl").read_text().splitlines()]
