"""Publishing on the Hugging Face Hub: what is uploaded, what a card says, and what never leaves."""

from .dataset import publish_dataset, staged_dataset
from .leaks import SPACE_FILES, check_folder
from .upload import check_target, connect, hub_errors, publish, staged, upload


__all__ = [
    "SPACE_FILES",
    "check_folder",
    "check_target",
    "connect",
    "hub_errors",
    "publish",
    "publish_dataset",
    "staged",
    "staged_dataset",
    "upload",
]
