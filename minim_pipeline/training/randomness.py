"""Randomness that does not depend on history."""

import numpy as np
import torch


def step_generator(seed: int, step: int, rank: int, device: torch.device | str) -> torch.Generator:
    """The source of everything random in one step on one process.

    It depends on nothing but its arguments, so a run that is resumed draws what an unbroken run would have drawn.
    """
    state = np.random.SeedSequence([seed, step, rank]).generate_state(2, dtype=np.uint32)
    return torch.Generator(device).manual_seed(int(state[0]) << 20 ^ int(state[1]))
