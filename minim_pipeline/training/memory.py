"""What may stay on the device for a whole run."""

import os

import torch


def fits(nbytes: int, device: torch.device) -> bool:
    """Whether it takes less than a quarter of a GPU's free memory; on a CPU, of the machine's memory."""
    if device.type == "cuda":
        return nbytes < torch.cuda.mem_get_info(device)[0] / 4
    return nbytes < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 4
