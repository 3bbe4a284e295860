"""Small classifiers of modality and finding, trained on few images from scratch or from ImageNet, and how.

They judge what a generator drew (judges.py), and what its images are worth as training data (downstream.py). Colour,
contrast, sharpness and noise are varied strongly, so that they do not go by the camera, the scanner or the decoder.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm
from transformers import (
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)

from ..finite import FiniteLoss, check_weights
from ..mapped import Rows
from .efficientnet import VARIANTS, check_installed, make_efficientnet


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained; the defaults suit one from scratch, `recipe_of` knows what suits another.

    Args:
        resolution: side in pixels of what it sees.
        mix: share of the steps with mixup or CutMix.
        bf16: bfloat16 where autocast allows it.
    """

    max_train_steps: int = 2000
    train_batch_size: int = 128
    learning_rate: float = 1e-3
    adam_weight_decay: float = 0.05
    label_smoothing: float = 0.1
    mix: float = 0.5
    ema_decay: float = 0.998
    resolution: int = 192
    bf16: bool = False
    seed: int = 0


def make_resnet(num_labels: int, width: int) -> PreTrainedModel:
    """ResNet-18's plan: two plain 3x3 blocks a stage, batch norm (arXiv 1512.03385)."""
    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=width,
            hidden_sizes=[width * 2**i for i in range(4)],
            depths=[2, 2, 2, 2],
            layer_type="basic",
            num_labels=num_labels,
        )
    )


def make_convnext(num_labels: int, width: int) -> PreTrainedModel:
    """ConvNeXt V2's plan: 7x7 depthwise convolutions, layer norm, response normalisation (arXiv 2301.00808)."""
    return ConvNextV2ForImageClassification(
        ConvNextV2Config(
            hidden_sizes=[width * 5 // 8 // 8 * 8 * 2**i for i in range(4)],
            depths=[2, 2, 6, 2],
            drop_path_rate=0.1,
            num_labels=num_labels,
        )
    )


ARCHITECTURES = {"resnet": make_resnet, "convnextv2": make_convnext}  # from scratch; `VARIANTS` start from ImageNet
# Of what starts from ImageNet: less has to be learned, and less of it kept from being learned by heart.
PRETRAINED: dict[str, Any] = {
    "max_train_steps": 1500,
    "train_batch_size": 64,
    "adam_weight_decay": 0.02,
    "label_smoothing": 0.05,
    "mix": 0.0,
    "ema_decay": 0.99,
    "resolution": 224,
}


def make_classifier(architecture: str, num_labels: int, width: int) -> PreTrainedModel:
    """A classifier to train, of `ARCHITECTURES` or `VARIANTS`.

    Args:
        width: channels of the first stage; those that start from ImageNet have their own.

    Raises:
        ImportError: the packages with the network and its weights are missing.
    """
    if architecture in VARIANTS:
        return make_efficientnet(architecture, num_labels)
    return ARCHITECTURES[architecture](num_labels, width)


def check_architecture(architecture: str) -> None:
    """Raises ImportError as `make_classifier`, for those who have much to do before."""
    if architecture in VARIANTS:
        check_installed(architecture)


def recipe_of(architecture: str, **given: Any) -> Recipe:
    """How a classifier is trained, by its architecture; `given` replaces that, where it is not None."""
    defaults = PRETRAINED if architecture in VARIANTS else {}
    return Recipe(**defaults | {name: value for name, value in given.items() if value is not None})


def preprocessing(model: PreTrainedModel, image_size: int) -> tuple[int, float, float]:
    """What a classifier sees: side in pixels, and mean and standard deviation to normalise [0, 1] by.

    From its config; one that does not say it sees `image_size` px, from -2 to 2.
    """
    config = model.config
    if hasattr(config, "image_mean"):
        return config.image_size, config.image_mean, config.image_std
    return image_size, 0.5, 0.25


def stored_side(resolution: int) -> int:
    """Side in pixels that train images are held at: a little larger than what is seen, for zooming in."""
    return min(256, resolution * 5 // 4 // 8 * 8)


def augment(x: Tensor, size: int, may_mirror: Tensor, grey: Tensor, g: torch.Generator) -> Tensor:
    """Varies place, colour, contrast, sharpness and noise of images [B, 3, H, W] in [0, 1]: [B, 3, size, size].

    Args:
        may_mirror: bool [B], images that are as plausible mirrored.
        grey: bool [B], images whose three channels have to stay equal.
    """
    batch, device = len(x), x.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(batch, *shape, device=device, generator=g) * (high - low) + low

    def some(share: float) -> Tensor:
        return (uniform(0, 1) < share)[:, None, None, None]

    # Position: turn by up to 12 degrees, zoom 0.8 to 1.15, aspect, shift, mirror.
    turn, zoom, aspect = uniform(-0.21, 0.21), uniform(0.8, 1.15), uniform(-0.08, 0.08).exp()
    sign = torch.where(may_mirror & (uniform(0, 1) < 0.5), -1.0, 1.0)
    shift = uniform(-1, 1, 2) * (0.05 + (1 - zoom).clamp(min=0))[:, None]
    across = torch.stack([sign * zoom * aspect * turn.cos(), -zoom * turn.sin(), shift[:, 0]], 1)
    down = torch.stack([sign * zoom * aspect * turn.sin(), zoom * turn.cos(), shift[:, 1]], 1)
    theta = torch.stack([across, down], 1)
    grid = F.affine_grid(theta, [batch, 3, size, size], align_corners=False)
    x = F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)

    # Tone: gamma, contrast about the mean, brightness.
    x = x.clamp(1e-4, 1) ** uniform(-0.45, 0.45).exp()[:, None, None, None]
    mean = x.mean((1, 2, 3), keepdim=True)
    x = (x - mean) * uniform(-0.4, 0.35).exp()[:, None, None, None] + mean + uniform(-0.12, 0.12)[:, None, None, None]
    # Colour: a random matrix near the identity (hue, saturation, white balance), or none at all.
    matrix = torch.eye(3, device=device) + 0.12 * torch.randn(batch, 3, 3, device=device, generator=g)
    coloured = torch.einsum("bij,bjhw->bihw", matrix, x)
    saturation = uniform(0.5, 1.4)[:, None, None, None]
    luma = coloured.mean(1, keepdim=True)
    coloured = luma + (coloured - luma) * saturation
    no_colour = grey[:, None, None, None] | some(0.15)
    x = torch.where(no_colour, x.mean(1, keepdim=True), coloured)

    # Sharpness: a mixture of the image, its blurred versions, and what is left after shrinking it.
    blurred = F.avg_pool2d(F.pad(x, (1,) * 4, mode="replicate"), 3, 1)
    very = F.avg_pool2d(F.pad(blurred, (2,) * 4, mode="replicate"), 5, 1)
    weight = uniform(-0.4, 1)[:, None, None, None]  # below 0: sharpened
    soft = torch.where(some(0.5), blurred, very)
    x = torch.where(some(0.7), x + weight * (soft - x), x)
    small = round(size * (0.4 + 0.5 * torch.rand((), device=device, generator=g).item()))
    shrunk = F.interpolate(x, size=(small, small), mode="bilinear", antialias=True)
    shrunk = F.interpolate(shrunk, size=(size, size), mode="bilinear")
    x = torch.where(some(0.3), shrunk, x)

    # Noise: fine and coarse, the same in all channels, as in the grey images.
    fine = torch.randn(batch, 1, size, size, device=device, generator=g)
    coarse = torch.randn(batch, 1, size // 2, size // 2, device=device, generator=g)
    coarse = F.interpolate(coarse, size=(size, size), mode="bilinear")
    noise = torch.where(some(0.5), fine, coarse) * uniform(0, 0.06)[:, None, None, None]
    return torch.where(some(0.5), x + noise, x).clamp(0, 1)


def mix(x: Tensor, y: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mixup (arXiv 1710.09412) or CutMix (arXiv 1905.04899) of a batch with itself in another order."""
    order = torch.randperm(len(x), device=x.device, generator=g)
    a, b, top, left = torch.rand(4, device=x.device, generator=g).tolist()
    if a < 0.5:
        share = b**2 / 2  # mostly one of the two
        return x.lerp(x[order], share), y.lerp(y[order], share)
    side = int(x.shape[-1] * math.sqrt(0.5 * b))
    i, j = int(top * (x.shape[-1] - side)), int(left * (x.shape[-1] - side))
    x = x.clone()
    x[:, :, i : i + side, j : j + side] = x[order, :, i : i + side, j : j + side]
    return x, y.lerp(y[order], (side / x.shape[-1]) ** 2)


def prepare_training(
    model: nn.Module, max_train_steps: int, learning_rate: float, weight_decay: float, ema_decay: float
) -> tuple:
    """Running average of the weights, AdamW that spares biases and norms, and one cycle: a rise, half a cosine."""
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema_decay), use_buffers=True)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.99))
    warmup = max(1, max_train_steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * s / max_train_steps))
    )
    return average, optimizer, schedule


def train_classifier(
    model: PreTrainedModel,
    images: Rows,
    labels: Tensor,
    may_mirror: Tensor,
    grey: Tensor,
    recipe: Recipe,
    name: str = "",
    origin: Tensor | None = None,
) -> nn.Module:
    """Trains for a fixed number of steps where the labels lie; gives the running average of the weights.

    Args:
        model: a classifier of transformers, whose config is told what it sees: `preprocessing`.
        images: uint8 [N, 3, H, W], in memory, on the device or on disk.
        labels: int64 [N]; every class that occurs is drawn equally often, since what is measured is balanced.
        may_mirror, grey: bool [N], see `augment`.
        name: what the progress bar is called.
        origin: int64 [N], where each image comes from; of every class, images of each origin are drawn equally often.

    Raises:
        ValueError: the loss, or a weight in the end, is not finite.
    """
    device, num_classes = labels.device, model.config.num_labels
    _, mean, std = preprocessing(model, recipe.resolution)
    model.config.update({"image_size": recipe.resolution, "image_mean": mean, "image_std": std})
    model.to(device).train()
    average, optimizer, schedule = prepare_training(
        model, recipe.max_train_steps, recipe.learning_rate, recipe.adam_weight_decay, recipe.ema_decay
    )
    g = torch.Generator(device).manual_seed(recipe.seed)
    kinds = labels if origin is None else labels + num_classes * origin
    frequency = 1 / torch.bincount(kinds)[kinds].float()
    losses = FiniteLoss()
    with tqdm(range(recipe.max_train_steps), name, mininterval=2) as bar:
        for step in bar:
            index = torch.multinomial(frequency, recipe.train_batch_size, replacement=True, generator=g)
            x = images[index.to(images.device)].to(device).float() / 255
            x = augment(x, recipe.resolution, may_mirror[index], grey[index], g)
            y = F.one_hot(labels[index], num_classes).float()
            if torch.rand((), device=device, generator=g).item() < recipe.mix:
                x, y = mix(x, y, g)
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bf16):
                logits = model((x - mean) / std).logits
            loss = F.cross_entropy(logits.float(), y, label_smoothing=recipe.label_smoothing)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            average.update_parameters(model)
            losses.add(loss, step + 1)
            if step % 50 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    losses.check()
    check_weights(average.module)
    return average.module.eval()
