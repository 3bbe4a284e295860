"""What figures look through: networks that turn images into features.

Every figure of a report depends on its extractor, so each carries a name and a hash of its weights. The project's own
encoder (encoder.py) and any vision model of transformers do: DINOv2, RAD-DINO, CLIP and its relatives, a ResNet.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import cached_file

from ..mapped import Rows
from .classifier import preprocessing
from .efficientnet import VARIANTS, make_efficientnet
from .encoder import ImageTextEncoder
from .images import to_input, to_unit
from .judges import Judges


@dataclass(frozen=True)
class Extractor:
    """Features of images, and whose they are.

    Args:
        name: of the model, without the folders above it.
        digest: the first 16 digits of the SHA-256 of its weights.
        extract: images [N, 3, H, W], uint8 or float in [0, 1], square -> features [N, D], fp32, on the
            CPU.
        encoder: set if it is the project's own, which does more than that.
    """

    name: str
    digest: str
    extract: Callable[[Rows], Tensor]
    encoder: ImageTextEncoder | None = None


def load_extractor(model: str | Path, device: torch.device | str = "cpu", batch_size: int = 16) -> Extractor:
    """An extractor from a folder, a Hub id, or a file of TorchScript; or one of `VARIANTS`, from packages.

    Inception's weights cannot be shipped. The file that the field computes FID with is StyleGAN2-ADA's
    `inception-2015-12-05.pt`, TorchScript that takes uint8 images and `return_features=True`: its path may be given.

    Of a vision model the pooled output is taken, or the mean over positions where there is none; of an image-text
    model its image embedding.

    Raises:
        ImportError: the packages of one of `VARIANTS` are not installed.
        OSError: there is no model at `model`.
        ValueError: the model at `model` takes no images.
    """
    if model in VARIANTS:
        return _imagenet(str(model), device, batch_size)
    if Path(model).suffix == ".pt":
        return _torchscript(Path(model), device, batch_size)
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise OSError(
            f"{str(model)!r} is neither a folder with a model nor one that the Hub gives: {reason}"
        ) from error
    if config.model_type == "vision-text-dual-encoder":
        encoder = ImageTextEncoder.from_pretrained(model, device)
        return Extractor(_name(model), digest(encoder.model), lambda images: encoder.encode_images(images)[0], encoder)
    network = AutoModel.from_pretrained(model, dtype=torch.float32).to(device).eval()
    if network.main_input_name != "pixel_values" and not hasattr(network, "get_image_features"):
        raise ValueError(f"{model} is a {config.model_type}, which takes no images.")
    size, mean, std = _preprocessing(model, config)

    @torch.no_grad()
    def extract(images: Rows) -> Tensor:
        features = []
        for part in images.split(batch_size):
            x = to_unit(part.to(device))
            if x.shape[-2:] != (size, size):
                x = F.interpolate(x, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
            x = (x - mean.to(device)) / std.to(device)
            features.append(_pooled(network, x).flatten(1).float().cpu())
        return torch.cat(features)

    return Extractor(_name(model), digest(network), extract)


def _imagenet(variant: str, device: torch.device | str, batch_size: int) -> Extractor:
    """The last features of one of `VARIANTS`, the mean over positions."""
    model: Any = make_efficientnet(variant, 1)
    size, mean, std = preprocessing(model, model.config.image_size)
    network = model.network.to(device).eval()
    network._fc = nn.Identity()  # it has learned nothing

    @torch.no_grad()
    def extract(images: Rows) -> Tensor:
        parts = (
            network.extract_features(to_input(part.to(device), size, mean, std)) for part in images.split(batch_size)
        )
        return torch.cat([part.mean((2, 3)).float().cpu() for part in parts])

    return Extractor(variant, digest(network), extract)


def judge_extractors(judges: Judges) -> list[Extractor]:
    """Of each judge what its last layer reads the finding from, named "judge " and its name."""
    return [_judge(name, model, judges.image_size) for name, model in judges.models.items()]


def _judge(name: str, model: nn.Module, image_size: int) -> Extractor:
    last = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]
    device = next(model.parameters()).device

    @torch.no_grad()
    def extract(images: Rows) -> Tensor:
        read: list[Tensor] = []
        hook = last.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].flatten(1).float().cpu()))
        for part in images.split(128 if device.type == "cuda" else 16):
            model(to_input(part.to(device), *preprocessing(model, image_size)))
        hook.remove()
        return torch.cat(read)

    return Extractor(f"judge {name}", digest(model), extract)


def _torchscript(file: Path, device: torch.device | str, batch_size: int) -> Extractor:
    if not file.is_file():
        raise OSError(f"There is no file {file}.")
    network = torch.jit.load(file, map_location=device).eval()

    @torch.no_grad()
    def extract(images: Rows) -> Tensor:
        parts = [(to_unit(part.to(device)) * 255).round().to(torch.uint8) for part in images.split(batch_size)]
        return torch.cat([network(part, return_features=True).flatten(1).float().cpu() for part in parts])

    return Extractor(file.stem, digest(network), extract)


def _pooled(network: PreTrainedModel, x: Tensor) -> Tensor:
    if hasattr(network, "get_image_features"):
        found = network.get_image_features(pixel_values=x)
        return found if isinstance(found, Tensor) else found.pooler_output
    output = network(pixel_values=x)
    if getattr(output, "pooler_output", None) is not None:
        return output.pooler_output
    hidden = output.last_hidden_state  # [N, L, D] of a transformer, [N, D, h, w] of a convolutional network
    return hidden.mean(1) if hidden.ndim == 3 else hidden.mean((2, 3))


def _preprocessing(model, config) -> tuple[int, Tensor, Tensor]:
    """Side in pixels, mean and standard deviation [1, 3, 1, 1]: the model's own, read without its image processor.

    The processors of transformers crop the middle of what they get; medical pictures are square and are taken whole.
    """
    file = cached_file(model, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    vision = getattr(config, "vision_config", config)
    given = json.loads(Path(file).read_text()) if file else {}
    size: Any = given.get("crop_size") or given.get("size") or getattr(vision, "image_size", 224)
    if isinstance(size, dict):
        size = size.get("height") or size["shortest_edge"]
    # ImageNet's, where a model does not say.
    mean, std = given.get("image_mean", [0.485, 0.456, 0.406]), given.get("image_std", [0.229, 0.224, 0.225])
    return int(size), torch.tensor(mean).view(1, 3, 1, 1), torch.tensor(std).view(1, 3, 1, 1)


def _name(model: str | Path) -> str:
    """A Hub id as it is, of a folder its last part: reports must not tell where a machine keeps its files."""
    return Path(model).resolve().name if Path(model).exists() else str(model)


def digest(network: nn.Module) -> str:
    """16 hexadecimal digits that name the weights, whatever device and file they are in."""
    sha = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().float().numpy().tobytes())
    return sha.hexdigest()[:16]
