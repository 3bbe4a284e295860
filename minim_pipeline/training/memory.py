"""What may stay on the device for a whole run."""

import os

import torch

from ..mapped import Rows


def fits(nbytes: int, device: torch.device) -> bool:
    """Whether it takes less than a quarter of a GPU's free memory; on a CPU, of the machine's memory."""
    if device.type == "cuda":
        return nbytes < torch.cuda.mem_get_info(device)[0] / 4
    return nbytes < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 4


def hold(rows: Rows, device: torch.device) -> Rows:
    """Rows on the device if it is another than the CPU, and they fit; else where they are.

    On a CPU the system's own cache of the files does as much, and gives way where there is no room.
    """
    if device.type == "cpu" or not fits(rows.nbytes, device):
        return rows
    return rows.to(device)
