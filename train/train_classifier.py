"""Trains the judges: two classifiers of modality and finding, of different build, from scratch, on few real images.

They are to read generated images, which are a little smoother and of slightly other colours than real ones, so colour,
contrast, sharpness and noise are varied so strongly that none of them can be relied on. A run has a fixed number of
steps and looks at the val split once, at the end: nothing is chosen by it.

    python train/train_classifier.py --train_data data.csv --output_dir runs/judges
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from image_preparation import load_images
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm
from transformers import (
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from minim_pipeline.data import read_csv
from minim_pipeline.evaluation.judges import Judges, accuracy_report, load_judges
from minim_pipeline.modalities import resolve_modality


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_data", required=True, help="CSV with path,Text,modality,finding,split,part.")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--part", default="B", help="Rows of the train split with this `part`; 'all' takes every row.")
    parser.add_argument("--architectures", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES))
    parser.add_argument("--width", type=int, default=64, help="Channels of the first stage; each later one doubles.")
    parser.add_argument("--resolution", type=int, default=192, help="What the classifiers see, in pixels.")
    parser.add_argument("--max_train_steps", type=int, default=2000)
    parser.add_argument("--train_batch_size", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--adam_weight_decay", type=float, default=0.05)
    parser.add_argument("--label_smoothing", type=float, default=0.1)
    parser.add_argument("--mix", type=float, default=0.5, help="Share of steps with mixup or CutMix.")
    parser.add_argument("--ema_decay", type=float, default=0.998)
    parser.add_argument("--min_train", type=int, default=20, help="Findings with fewer train images are left out.")
    parser.add_argument("--min_val", type=int, default=9, help="Findings with fewer val images are left out.")
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads.")
    return parser.parse_args(argv)


def make_resnet(num_labels: int, width: int) -> nn.Module:
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


def make_convnext(num_labels: int, width: int) -> nn.Module:
    """ConvNeXt V2's plan: 7x7 depthwise convolutions, layer norm, response normalisation (arXiv 2301.00808)."""
    return ConvNextV2ForImageClassification(
        ConvNextV2Config(
            hidden_sizes=[width * 5 // 8 // 8 * 8 * 2**i for i in range(4)],
            depths=[2, 2, 6, 2],
            drop_path_rate=0.1,
            num_labels=num_labels,
        )
    )


ARCHITECTURES = {"resnet": make_resnet, "convnextv2": make_convnext}


def claimed_classes(train_rows: list[dict], val_rows: list[dict], min_train: int, min_val: int) -> list:
    """(modality id, finding) of all findings with enough images, modalities in the order of the data."""

    def count(rows):
        keys = [(resolve_modality(row["modality"]).id, row["finding"]) for row in rows]
        return {key: keys.count(key) for key in sorted(set(keys))}

    train, val = count(train_rows), count(val_rows)
    return [k for k in train if train[k] >= min_train and val.get(k, 0) >= min_val]


def augment(x: torch.Tensor, size: int, may_mirror: torch.Tensor, grey: torch.Tensor, g: torch.Generator):
    """Varies place, colour, contrast, sharpness and noise of images [B, 3, H, W] in [0, 1]: [B, 3, size, size].

    Args:
        may_mirror: bool [B], images that are as plausible mirrored.
        grey: bool [B], images whose three channels have to stay equal.
    """
    batch, device = len(x), x.device

    def uniform(low, high, *shape):
        return torch.rand(batch, *shape, device=device, generator=g) * (high - low) + low

    def some(share):
        return (uniform(0, 1) < share)[:, None, None, None]

    # Position: turn by up to 12 degrees, zoom 0.8 to 1.15, aspect, shift, mirror.
    turn, zoom, aspect = uniform(-0.21, 0.21), uniform(0.8, 1.15), uniform(-0.08, 0.08).exp()
    sign = torch.where(may_mirror & (uniform(0, 1) < 0.5), -1.0, 1.0)
    shift = uniform(-1, 1, 2) * (0.05 + (1 - zoom).clamp(min=0))[:, None]
    theta = torch.stack(
        [
            torch.stack([sign * zoom * aspect * turn.cos(), -zoom * turn.sin(), shift[:, 0]], 1),
            torch.stack([sign * zoom * aspect * turn.sin(), zoom * turn.cos(), shift[:, 1]], 1),
        ],
        1,
    )
    grid = F.affine_grid(theta, (batch, 3, size, size), align_corners=False)
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


def mix(x: torch.Tensor, y: torch.Tensor, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
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


def prepare_training(model: nn.Module, args: argparse.Namespace) -> tuple:
    """Running average of the weights, AdamW that spares biases and norms, and its schedule: a rise, half a cosine."""
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema_decay), use_buffers=True)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": args.adam_weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.99))
    warmup = max(1, args.max_train_steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min(1, (s + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * s / args.max_train_steps)),
    )
    return average, optimizer, schedule


def train_one(
    model: nn.Module, images, labels, may_mirror, grey, num_classes: int, args, device, name=""
) -> nn.Module:
    """Trains on uint8 images [N, 3, H, W] for a fixed number of steps; the running average of the weights."""
    model.to(device).train()
    average, optimizer, schedule = prepare_training(model, args)
    g = torch.Generator(device).manual_seed(args.seed)
    # Every class is drawn equally often: the figures are balanced.
    frequency = 1 / torch.bincount(labels, minlength=num_classes).clamp(min=1)[labels].float()
    with tqdm(range(args.max_train_steps), name, mininterval=2) as bar:
        for step in bar:
            index = torch.multinomial(frequency, args.train_batch_size, replacement=True, generator=g)
            x = augment(images[index].float() / 255, args.resolution, may_mirror[index], grey[index], g)
            y = F.one_hot(labels[index], num_classes).float()
            if torch.rand((), device=device, generator=g).item() < args.mix:
                x, y = mix(x, y, g)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
                logits = model((x - 0.5) * 4).logits
            loss = F.cross_entropy(logits.float(), y, label_smoothing=args.label_smoothing)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            average.update_parameters(model)
            if step % 50 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    return average.module.eval()


def format_report(title: str, report: dict) -> str:
    """A table of `accuracy_report`, a line a modality."""
    lines = [f"{title}: n {report['n']}, modality {report['modality_accuracy']:.3f}"]
    for name, r in report["modalities"].items():
        low, high = r["interval"]
        findings = ", ".join(f"{k} {v['accuracy']:.2f} ({v['n']})" for k, v in r["findings"].items())
        lines.append(
            f"  {name:10s} {r['balanced_accuracy']:.3f} [{low:.2f}, {high:.2f}] chance {r['chance']:.2f} "
            f"merged {r['balanced_accuracy_merged']:.3f} modality {r['modality_accuracy']:.3f} | {findings}"
        )
        for source, s in r.get("within_source", {}).items():
            lines.append(f"    within {source}: {s['balanced_accuracy']:.3f} (chance {s['chance']:.2f}, n {s['n']})")
    lines.append(f"  {'mean':10s} {report['balanced_accuracy']:.3f} merged {report['balanced_accuracy_merged']:.3f}")
    return "\n".join(lines)


def main(argv=None) -> dict:
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    require = ("path", "Text", "modality", "finding", "split", "part")
    all_train = read_csv(args.train_data, split="train", require=require[:-1])
    val_rows = read_csv(args.train_data, split="val", require=require[:-1])
    classes = claimed_classes(all_train, val_rows, args.min_train, args.min_val)
    key = {c: i for i, c in enumerate(classes)}

    def known(rows):
        return [row for row in rows if (resolve_modality(row["modality"]).id, row["finding"]) in key]

    rows = known([row for row in all_train if args.part in ("all", row.get("part"))])
    val_rows = known(val_rows)
    # A little larger than what the classifiers see, so that zooming in finds detail.
    size = min(256, args.resolution * 5 // 4 // 8 * 8)
    images = load_images(rows, args.train_data, size).to(device)
    val_images = load_images(val_rows, args.train_data, 256)

    def modality_of(row):
        return resolve_modality(row["modality"])

    labels = torch.tensor([key[modality_of(row).id, row["finding"]] for row in rows], device=device)
    may_mirror = torch.tensor([modality_of(row).flip for row in rows], device=device)
    grey = torch.tensor([modality_of(row).grey for row in rows], device=device)

    models, seconds = {}, {}
    for name in args.architectures:
        torch.manual_seed(args.seed)
        start = time.monotonic()
        model = ARCHITECTURES[name](len(classes), args.width)
        model.config.id2label = {i: f"{m}: {f}" for i, (m, f) in enumerate(classes)}
        model.config.label2id = {label: i for i, label in model.config.id2label.items()}
        models[name] = train_one(model, images, labels, may_mirror, grey, len(classes), args, device, name)
        seconds[name] = round(time.monotonic() - start)
    # Architectures may be trained one by one: those that lie there already stay, if they say the same things.
    if (Path(args.output_dir) / "judges.json").exists():
        earlier = load_judges(args.output_dir, device)
        if (earlier.classes, earlier.image_size) == (classes, args.resolution):
            models = {**earlier.models, **models}
    judges = Judges(models, classes, args.resolution)
    judges.save_pretrained(args.output_dir)

    asked = [modality_of(row).id for row in val_rows], [row["finding"] for row in val_rows]
    sources = [row.get("source", "") for row in val_rows]
    each = judges.judge_each(val_images)
    each["judges"] = torch.stack(list(each.values())).mean(0)
    report = {
        "trained_on": {"part": args.part, "n": len(rows)},
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
        "seconds": seconds,
        "device": torch.cuda.get_device_name(0) if device.type == "cuda" else "cpu",
        "arguments": {k: v for k, v in vars(args).items() if k not in ("train_data", "output_dir", "threads")},
        "val": {name: accuracy_report(p, classes, *asked, sources=sources) for name, p in each.items()},
    }
    (Path(args.output_dir) / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    for name, figures in report["val"].items():
        print(format_report(f"{name} on val", figures))
    return report


if __name__ == "__main__":
    main()
