"""Trains the judges: two classifiers of modality and finding, of different build, on few real images.

They are to read generated images, which are a little smoother and of slightly other colours than real ones, so colour,
contrast, sharpness and noise are varied so strongly that none of them can be relied on. A run has a fixed number of
steps and looks at the val split once, at the end: nothing is chosen by it.

They learn from scratch, or start from ImageNet (`efficientnet-lite0` and its like), which takes fewer steps and reads
more of the findings. With `--autoencoder`, half of what they see has gone through the autoencoder of a pipeline, as
all has that is generated.
"""

import shutil
import time
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any, get_args

import torch
from torch import nn

from ..data.image_loading import key_of
from ..data.mapped_images import IMAGES, map_images
from ..evaluation.classifier import (
    ARCHITECTURES,
    Recipe,
    check_architecture,
    make_classifier,
    recipe_of,
    stored_side,
    train_classifier,
)
from ..evaluation.judges import (
    Class,
    Families,
    Judges,
    accuracy_report,
    claimed_classes,
    class_of,
    families_of,
    format_report,
    load_judges,
)
from ..evaluation.options import Architecture
from ..evaluation.sampling import reconstruct
from ..files import write_report
from ..loading import model_identity
from ..locking import locked
from ..mapped import MappedTensor, Rows, map_parts
from ..modalities import resolve_modality
from ..pipeline_minim import MinimPipeline
from .config import Count, CsvOptions, HubOptions, PrecisionOptions, Share, Weight, Whole, option
from .hub import check_hub, push_parts
from .memory import hold
from .rows import mirrored, of_part, read_findings, tell_mirrored, tell_repeats


# Options that name places of the machine, or its size: a report shows none of them.
PATHS = ("train_data", "autoencoder", "image_root", "output_dir", "modalities_from", "threads")


@dataclass(kw_only=True)
class ClassifierConfig(CsvOptions, HubOptions, PrecisionOptions):
    """Options of the classifiers' training; how each is trained, unless that is given: `recipe_of`."""

    part: list[str] = option(["B"], "Rows of the train split with these `part`s; 'all' takes every row.")
    architectures: list[str] = option(list(ARCHITECTURES), "Which are trained.", choices=list(get_args(Architecture)))
    width: Count = option(64, "Channels of the first stage of those from scratch; each later one doubles.")
    autoencoder: str | None = option(None, "A pipeline, through whose autoencoder half of what is seen goes.")
    resolution: Count | None = option(None, "What they see, in pixels; default: 192, from ImageNet 224.")
    max_train_steps: Count | None = option(None, "Default: 2000, from ImageNet 1500.")
    train_batch_size: Count | None = option(None, "Default: 128, from ImageNet 64.")
    learning_rate: Weight = Recipe.learning_rate
    adam_weight_decay: Weight | None = option(None, "Default: 0.05, from ImageNet 0.02.")
    label_smoothing: Share | None = option(None, "Default: 0.1, from ImageNet 0.05.")
    mix: Share | None = option(None, "Share of steps with mixup or CutMix; default: 0.5, from ImageNet 0.")
    ema_decay: Share | None = option(None, "Default: 0.998, from ImageNet 0.99.")
    min_train: Count = option(20, "Findings with fewer train images are left out.")
    min_val: Whole = option(9, "Findings with fewer val images are left out.")
    threads: Count | None = option(None, "CPU threads.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.architectures:
            check_architecture(name)

    def recipe(self, architecture: str) -> Recipe:
        return recipe_of(architecture, **self.values(*(field.name for field in fields(Recipe))))


def read_rows(config: ClassifierConfig) -> tuple[list[dict], list[dict], list[Class], Families]:
    """The rows to train on, to validate on, the classes (findings with enough images on both sides), and families.

    Raises:
        ValueError: one side has no rows of these parts and classes.
    """
    train_rows, val_rows = read_findings(config)
    families = families_of(train_rows + val_rows)
    classes = claimed_classes(train_rows, val_rows, config.min_train, config.min_val)
    rows, val_rows = (
        [row for row in some if class_of(row) in classes] for some in (of_part(train_rows, *config.part), val_rows)
    )
    if not rows or not val_rows:
        found = f"{len(rows)} train rows of part {' '.join(config.part)} and {len(val_rows)} val rows of findings"
        least = f"{config.min_train} train and {config.min_val} val images"
        raise ValueError(f"{config.train_data} has {found} with {least}: lower --min_train or --min_val.")
    tell_repeats(config.train_data, rows, val_rows)
    return rows, val_rows, classes, families


def load_seen(config: ClassifierConfig, name: str, rows: list[dict], side: int, device: torch.device) -> MappedTensor:
    """The images of `rows`, uint8 [N, 3, side, side]; with an autoencoder [2 N, ...], all again as that makes them.

    `name`: of the files.
    """
    folder, modalities = config.output / IMAGES, [row["modality"] for row in rows]
    images = map_images(folder / name, rows, config.train_data, side, reading=config.reading)
    if config.autoencoder is None:
        return images
    pipe = MinimPipeline.from_pretrained(config.autoencoder, filter_head=None).to(device)
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    own = images
    if size != side:
        own = map_images(folder / f"{name}-whole", rows, config.train_data, size, reading=config.reading)
    through = partial(reconstruct, pipe, resolution=side)
    decoded = map_parts(
        folder / f"{name}-decoded",
        [model_identity(config.autoencoder), key_of(rows, config.train_data, config.reading), side],
        len(rows),
        64,
        lambda parts: (through(own[part], modalities[part]) for part in parts),
    )
    return images.join(decoded[0])


def train_all(
    config: ClassifierConfig, rows: list[dict], classes: list[Class], device: torch.device
) -> tuple[dict[str, nn.Module], dict[str, int]]:
    """The classifier of each architecture, and the seconds that its training took."""
    # The caption is not learned: only a finding with a side forbids it.
    may_mirror = mirrored(rows, config.no_mirror, said=("finding",))
    tell_mirrored(config.train_data, rows, may_mirror)
    labels = [classes.index(class_of(row)) for row in rows]
    grey = [resolve_modality(row["modality"]).grey for row in rows]
    models: dict[str, nn.Module] = {}
    seconds: dict[str, int] = {}
    seen: dict[int, Rows] = {}
    for name in config.architectures:
        side = stored_side(config.recipe(name).resolution)
        if side not in seen:
            seen[side] = hold(load_seen(config, f"train-{side}", rows, side, device), device)
        copies = len(seen[side]) // len(rows)
        y, flip, is_grey = (torch.tensor(v, device=device).repeat(copies) for v in (labels, may_mirror, grey))
        torch.manual_seed(config.seed)
        start = time.monotonic()
        model = make_classifier(name, len(classes), config.width)
        model.config.id2label = {i: f"{modality}: {finding}" for i, (modality, finding) in enumerate(classes)}
        model.config.label2id = {label: i for i, label in model.config.id2label.items()}
        models[name] = train_classifier(model, seen[side], y, flip, is_grey, config.recipe(name), name)
        seconds[name] = round(time.monotonic() - start)
    return models, seconds


def validate(judges: Judges, config: ClassifierConfig, val_rows: list[dict]) -> dict[str, dict]:
    """By classifier, and as `judges` of their mean, `accuracy_report` of `val` and `val_reconstructed` images."""
    each = judges.judge_each(load_seen(config, "val", val_rows, 256, judges.device))
    each["judges"] = torch.stack(list(each.values())).mean(0)
    modalities, findings = map(list, zip(*map(class_of, val_rows), strict=True))
    asked = modalities, findings, [row.get("source", "") for row in val_rows], judges.families
    report: dict[str, dict] = {"val": {}} | ({"val_reconstructed": {}} if config.autoencoder else {})
    for name, said in each.items():
        for part, probabilities in zip(report.values(), said.split(len(val_rows)), strict=True):
            part[name] = accuracy_report(probabilities, judges.classes, *asked)
    return report


def train(config: ClassifierConfig) -> dict:
    """Trains the classifiers, writes them to `--output_dir` as `load_judges` reads them, and gives the report.

    Architectures may be trained one by one: those that lie there already stay, if they say the same things.

    Raises:
        ValueError: as `read_rows`; another run has the folder; or the result could not be published.
    """
    check_hub(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with locked(config.output):
        rows, val_rows, classes, families = read_rows(config)
        models, seconds = train_all(config, rows, classes, device)
        image_size = config.recipe(config.architectures[0]).resolution
        if (config.output / "judges.json").exists():
            earlier = load_judges(config.output, device)
            if earlier.classes == classes:
                models, image_size = {**earlier.models, **models}, earlier.image_size
        judges = Judges(models, classes, image_size, families)
        judges.save_pretrained(config.output)
        report: dict[str, Any] = {
            "trained_on": {"part": " ".join(config.part), "n": len(rows)},
            "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
            "seconds": seconds,
            "device": torch.cuda.get_device_name(0) if device.type == "cuda" else "cpu",
            "arguments": {name: value for name, value in asdict(config).items() if name not in PATHS},
            "recipes": {name: asdict(config.recipe(name)) for name in config.architectures},
            **validate(judges, config, val_rows),
        }
        shutil.rmtree(config.output / IMAGES)
        write_report(config.output / "report.json", report)
        push_parts(config, "train_classifier", *(config.output / name for name in (*models, "judges.json")))
    for name, figures in report["val"].items():
        print(format_report(f"{name} on val", figures))
    return report
