"""What has diverged is told where it is first seen, and never written: losses and weights that are no numbers."""

import math

import torch
from torch import nn


def check_loss(loss: float, step: int) -> None:
    """Raises ValueError if the loss of a step is not finite."""
    if not math.isfinite(loss):
        raise ValueError(
            f"The loss is {loss} at step {step}: the training has diverged, and nothing is written of it. Lower the"
            " learning rate."
        )


class FiniteLoss:
    """Looks at every loss of a run, and ends the run at one that is not finite.

    Reading a number waits for the device. So on a GPU the losses stay there, and are read every `every` steps and
    before anything is written (`check`); the step that is told is the first that went wrong all the same.

    Args:
        every: steps from one reading to the next; on a CPU each is read.
    """

    def __init__(self, every: int = 16):
        self.every = every
        self.unread: list[tuple[torch.Tensor, int]] = []  # losses and their steps

    def add(self, loss: torch.Tensor, step: int) -> None:
        """Takes the loss, a number, of a step; raises as `check` if it is time to read."""
        self.unread.append((loss.detach().clone(), step))
        if loss.device.type == "cpu" or len(self.unread) >= self.every:
            self.check()

    def check(self) -> None:
        """Raises ValueError if any loss so far was not finite."""
        for loss, step in self.unread:
            check_loss(loss.item(), step)
        self.unread.clear()


def check_weights(model) -> None:
    """Raises ValueError if a network, or one of a pipeline, holds weights that are not finite.

    Args:
        model: an `nn.Module` or a diffusers pipeline.
    """
    parts = model.components if hasattr(model, "components") else {type(model).__name__: model}
    for name, part in parts.items():
        for key, tensor in part.state_dict().items() if isinstance(part, nn.Module) else ():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise ValueError(
                    f"Weights of {name} are not finite ({key}, {str(tensor.dtype).removeprefix('torch.')}): the"
                    " training has diverged, and nothing is written of it. Lower the learning rate."
                )
