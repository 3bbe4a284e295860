"""What happens between two steps of a run: the same in all trainers, and in the same order."""

import argparse
import signal
import sys
from collections.abc import Callable

import torch

from minim_pipeline.finite import FiniteLoss
from minim_pipeline.training.checkpoints import save_checkpoint


# The exit code of a process that SIGTERM has ended, as a shell gives it.
TERMINATED = 128 + signal.SIGTERM


class Run:
    """Looks at the loss, writes checkpoints, validates, and heeds SIGTERM; a context manager around the loop.

    After every step, in this order: a loss that is not finite ends the run; a checkpoint is written if one is due, or
    the run is over; then the model is validated, so that what goes wrong there loses nothing. A run that goes on from
    a checkpoint begins with the validation that was due after it, and so ends as if it had never stopped.

    SIGTERM, which Slurm and others send some time before they kill, lets the step be finished, writes a checkpoint and
    ends the process with code 143. With several processes it is heeded after up to `every` steps.

    Args:
        args: `output_dir`, `validation_steps`, `checkpointing_steps` and `checkpoints_total_limit`.
        validate: gives something true if the run is to end.
        saved: called after a checkpoint was written.
    """

    def __init__(
        self,
        accelerator,
        args: argparse.Namespace,
        schedule,
        validate: Callable[[], object],
        saved: Callable[[], object] = lambda: None,
        every: int = 16,
    ):
        self.accelerator, self.args, self.schedule = accelerator, args, schedule
        self.validate, self.saved, self.every = validate, saved, every
        self.losses, self.terminated = FiniteLoss(every), False

    def __enter__(self) -> "Run":
        self.previous = signal.signal(signal.SIGTERM, self.terminate)
        return self

    def __exit__(self, *error) -> None:
        signal.signal(signal.SIGTERM, self.previous)

    def terminate(self, *signal) -> None:
        self.terminated = True

    def begin(self) -> bool:
        """To be called before the first step; whether the run is to end already."""
        return bool(self.schedule.step and self.due(self.args.validation_steps) and self.validate())

    def end_step(self, loss: torch.Tensor) -> bool:
        """To be called after `schedule.advance`, with the loss, a number; whether the run is to end."""
        self.losses.add(loss, self.schedule.step)
        saving, validating = self.due(self.args.checkpointing_steps), self.due(self.args.validation_steps)
        terminated = False
        if saving or validating or self.accelerator.num_processes == 1 or self.schedule.step % self.every == 0:
            terminated = self.anywhere(self.terminated)
        if saving or validating or terminated:
            self.losses.check()
        if saving or terminated:
            self.save()
        if terminated:
            self.stop()
        return bool(validating and self.validate())

    def due(self, steps: int) -> bool:
        return self.schedule.step % steps == 0 or self.schedule.done

    def save(self) -> None:
        args = self.args
        save_checkpoint(self.accelerator, args.output_dir, self.schedule.step, args.checkpoints_total_limit)
        self.saved()

    def stop(self) -> None:
        if self.accelerator.is_main_process:
            print(
                f"\nStopped by SIGTERM after step {self.schedule.step}, of which there is a checkpoint in"
                f" {self.args.output_dir}: the same command with --resume_from_checkpoint latest goes on from there.",
                file=sys.stderr,
                flush=True,
            )
        self.accelerator.end_training()
        raise SystemExit(TERMINATED)

    def anywhere(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        if self.accelerator.num_processes == 1:
            return flag
        flags = torch.tensor([flag], device=self.accelerator.device, dtype=torch.int32)
        return bool(self.accelerator.gather(flags).any())
