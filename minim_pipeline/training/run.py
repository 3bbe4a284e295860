"""A training run in a folder of its own: the same for all trainers.

with Run.open(config, "minim-autoencoder") as run:
    if not run.finished:
        model, optimizer = run.accelerator.prepare(...)
        run.begin(ema)
        run.train(step, validate)
        save_model(model, config.output / "vae")
        run.finish()
"""

import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, parse_flag_from_env, set_seed
from diffusers.training_utils import EMAModel

from ..finite import FiniteLoss
from ..locking import locked
from .checkpoints import find_checkpoint, is_finished, note_arguments, note_finished, save_checkpoint
from .config import RunOptions
from .hub import check_hub
from .log import Log
from .randomness import step_generator
from .schedule import Schedule


# The exit code of a process that SIGTERM has ended, as a shell gives it.
TERMINATED = 128 + signal.SIGTERM


class Best:
    """The best validation so far: its score, of which more is better, its step, and how many have come since."""

    def __init__(self) -> None:
        self.score, self.step, self.since = float("-inf"), 0, 0

    def take(self, score: float, step: int) -> bool:
        """Whether this one is the best: where all are alike, the latest is."""
        if score >= self.score:
            self.score, self.step, self.since = score, step, 0
            return True
        self.since += 1
        return False

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


class Run:
    """Folder, seeds, schedule, log, checkpoints and the loop of a trainer; made by `open`.

    Attributes:
        config: the options.
        accelerator: of the run's precision and trackers; `device` and `rank` are its own.
        output: the folder, this run's alone while it is open.
        finished: whether the folder holds this very run with nothing left to do, which has been said.
        schedule: how far the run is.
        best: for a validation that chooses among weights; saved with the checkpoints.
        images_a_step: of all processes, for the speed that the log tells.
        log: from `begin` on.
    """

    def __init__(
        self,
        config: RunOptions,
        name: str,
        gradient_accumulation_steps: int = 1,
        look_every: int = 16,
    ):
        self.config, self.name, self.output = config, name, config.output
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=gradient_accumulation_steps,
            log_with=config.report_to,
            project_dir=config.output_dir,
            # Gradients are averaged where they lie, without a copy of each to a bucket and back.
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
        self.device, self.rank = self.accelerator.device, self.accelerator.process_index
        self.is_main, self.look_every = self.accelerator.is_main_process, look_every
        self.checkpoint: Path | None = None
        self.finished = is_finished(config)
        if not self.finished:
            self.checkpoint = find_checkpoint(config)
        self.schedule = Schedule(config.max_train_steps, config.max_train_minutes, look_every)
        self.best = Best()
        self.losses, self.terminated = FiniteLoss(look_every), False
        self.images_a_step = config.train_batch_size * gradient_accumulation_steps * self.accelerator.num_processes

    @classmethod
    @contextmanager
    def open(cls, config: RunOptions, name: str, **keywords: Any) -> Iterator["Run"]:
        """The run of `config` in its folder, seeded.

        Args:
            name: for the trackers.
            keywords: of `gradient_accumulation_steps`; `look_every`: steps from one look at the clock, the losses
                and SIGTERM to the next, where looking makes the device or other processes wait.

        Raises:
            ValueError: another run has the folder now; it holds a run with other options or another number of
                processes, or a broken checkpoint; or the result could not be published.
        """
        check_hub(config)
        # As the Accelerator, which comes later, will have it: what is set up first stays.
        with locked(config.output_dir, PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))):
            run = cls(config, name, **keywords)
            if not run.finished:
                set_seed(config.seed)
                torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
            yield run

    def generator(self, part: int = 0, parts: int = 1) -> torch.Generator:
        """The source of all that is random in this step, or in one of the parts that are accumulated."""
        return step_generator(self.config.seed, self.schedule.step * parts + part, self.rank, self.device)

    def begin(self, *stateful: object) -> None:
        """Goes to where the checkpoint is, if there is one, and starts log and trackers; after `prepare`.

        Args:
            stateful: what has a state beside the networks and the optimizer, such as an `EMAModel`.
        """
        self.accelerator.register_for_checkpointing(*stateful, self.schedule, self.best)
        if self.checkpoint:
            self.accelerator.load_state(str(self.checkpoint))
        for part in stateful:
            if isinstance(part, EMAModel):
                part.to(self.device)
        if self.is_main:
            note_arguments(self.config, self.checkpoint)
        if self.config.report_to:
            options = {  # in types that all trackers take
                name: value if isinstance(value, bool | int | float | str) else str(value)
                for name, value in asdict(self.config).items()
            }
            self.accelerator.init_trackers(self.name, config=options)
        self.log = Log(self.accelerator, self.config.output_dir, self.schedule, self.images_a_step)

    def train(
        self,
        step: Callable[[], Mapping[str, torch.Tensor | float]],
        validate: Callable[[], object],
        saved: Callable[[], object] = lambda: None,
        log_every: int = 200,
    ) -> None:
        """Takes steps until the schedule is done, or a validation says that it is enough.

        After every step, in this order: a loss that is not finite ends the run; a checkpoint is written if one is due,
        or the run is over; then the model is validated, so that what goes wrong there loses nothing. A run that goes
        on from a checkpoint begins with the validation that was due after it, and so ends as if it had never stopped.

        SIGTERM, which Slurm and others send some time before they kill, lets the step be finished, writes a checkpoint
        and ends the process with code 143. With several processes it is heeded after up to `look_every` steps.

        Args:
            step: takes one, and gives its figures: `"loss"` and others to be shown, detached numbers.
            validate: gives something true if the run is to end.
            saved: called after a checkpoint was written.
            log_every: steps from one record of the figures in the log to the next.
        """
        previous = signal.signal(signal.SIGTERM, self.terminate)
        try:
            stop = bool(self.schedule.step and self.due(self.config.validation_steps) and validate())
            while not (self.schedule.done or stop):
                figures = step()
                self.schedule.advance(self.accelerator)
                self.log.tick(**figures)
                if self.schedule.step % log_every == 0:
                    self.log.write("train", **{name: float(f"{value:.6g}") for name, value in figures.items()})
                stop = self.end_step(torch.as_tensor(figures["loss"]), validate, saved)
        finally:
            signal.signal(signal.SIGTERM, previous)
        self.accelerator.wait_for_everyone()

    def finish(self) -> None:
        """Says that the run is over; after everything is written."""
        if self.is_main:
            note_finished(self.config, self.schedule)
        self.accelerator.end_training()

    def terminate(self, *signal: object) -> None:
        self.terminated = True

    def end_step(self, loss: torch.Tensor, validate: Callable[[], object], saved: Callable[[], object]) -> bool:
        """What follows a step, see `train`; whether the run is to end."""
        self.losses.add(loss, self.schedule.step)
        saving, validating = self.due(self.config.checkpointing_steps), self.due(self.config.validation_steps)
        terminated = False
        if saving or validating or self.accelerator.num_processes == 1 or self.schedule.step % self.look_every == 0:
            terminated = self.anywhere(self.terminated)
        if saving or validating or terminated:
            self.losses.check()
        if saving or terminated:
            limit = self.config.checkpoints_total_limit
            save_checkpoint(self.accelerator, self.config.output_dir, self.schedule.step, limit)
            saved()
        if terminated:
            self.stop()
        return bool(validating and validate())

    def due(self, steps: int) -> bool:
        return self.schedule.step % steps == 0 or self.schedule.done

    def stop(self) -> None:
        if self.is_main:
            print(
                f"\nStopped by SIGTERM after step {self.schedule.step}, of which there is a checkpoint in"
                f" {self.config.output_dir}: the same command goes on from there.",
                file=sys.stderr,
                flush=True,
            )
        self.accelerator.end_training()
        raise SystemExit(TERMINATED)

    def anywhere(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        if self.accelerator.num_processes == 1:
            return flag
        flags = torch.tensor([flag], device=self.device, dtype=torch.int32)
        return bool(self.accelerator.gather(flags).any())
