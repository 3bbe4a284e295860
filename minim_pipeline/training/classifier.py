"""Trains the judges: two classifiers of modality and finding, of different build, from scratch, on few real images.

They are to read generated images, which are a little smoother and of slightly other colours than real ones, so colour,
contrast, sharpness and noise are varied so strongly that none of them can be relied on. A run has a fixed number of
steps and looks at the val split once, at the end: nothing is chosen by it.
"""

import time
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn

from ..data.image_loading import load_images
from ..evaluation.classifier import ARCHITECTURES, Recipe, stored_side, train_classifier
from ..evaluation.judges import Judges, accuracy_report, claimed_classes, class_of, format_report, load_judges
from ..files import write_report
from ..locking import locked
from ..modalities import resolve_modality
from .config import Count, CsvOptions, HubOptions, PrecisionOptions, Share, Weight, Whole, option
from .hub import check_hub, push_parts
from .rows import mirrored, of_part, read_findings, tell_mirrored, tell_repeats


# Options that name places of the machine, or its size: a report shows none of them.
PATHS = ("train_data", "image_root", "output_dir", "modalities_from", "threads")


@dataclass(kw_only=True)
class ClassifierConfig(CsvOptions, HubOptions, PrecisionOptions):
    """Options of the classifiers' training; how each is trained: `Recipe`."""

    part: list[str] = option(["B"], "Rows of the train split with these `part`s; 'all' takes every row.")
    architectures: list[str] = option(list(ARCHITECTURES), "Which are trained.", choices=list(ARCHITECTURES))
    width: Count = option(64, "Channels of the first stage; each later one doubles.")
    resolution: Count = option(Recipe.resolution, "What the classifiers see, in pixels.")
    max_train_steps: Count = Recipe.max_train_steps
    train_batch_size: Count = Recipe.train_batch_size
    learning_rate: Weight = Recipe.learning_rate
    adam_weight_decay: Weight = Recipe.adam_weight_decay
    label_smoothing: Share = Recipe.label_smoothing
    mix: Share = option(Recipe.mix, "Share of steps with mixup or CutMix.")
    ema_decay: Share = Recipe.ema_decay
    min_train: Count = option(20, "Findings with fewer train images are left out.")
    min_val: Whole = option(9, "Findings with fewer val images are left out.")
    threads: Count | None = option(None, "CPU threads.")

    @property
    def recipe(self) -> Recipe:
        return Recipe(**{field.name: getattr(self, field.name) for field in fields(Recipe)})


Class = tuple[str, str]  # modality id and finding


def read_rows(config: ClassifierConfig) -> tuple[list[dict], list[dict], list[Class]]:
    """The rows to train on, those to validate on, and the classes: findings with enough images on both sides.

    Raises:
        ValueError: one side has no rows of these parts and classes.
    """
    train_rows, val_rows = read_findings(config)
    classes = claimed_classes(train_rows, val_rows, config.min_train, config.min_val)
    rows, val_rows = (
        [row for row in some if class_of(row) in classes] for some in (of_part(train_rows, *config.part), val_rows)
    )
    if not rows or not val_rows:
        found = f"{len(rows)} train rows of part {' '.join(config.part)} and {len(val_rows)} val rows of findings"
        least = f"{config.min_train} train and {config.min_val} val images"
        raise ValueError(f"{config.train_data} has {found} with {least}: lower --min_train or --min_val.")
    tell_repeats(config.train_data, rows, val_rows)
    return rows, val_rows, classes


def train_all(
    config: ClassifierConfig, rows: list[dict], classes: list[Class], device: torch.device
) -> tuple[dict[str, nn.Module], dict[str, int]]:
    """The classifier of each architecture, and the seconds that its training took."""
    images = load_images(rows, config.train_data, stored_side(config.resolution), reading=config.reading).to(device)
    labels = torch.tensor([classes.index(class_of(row)) for row in rows], device=device)
    # The caption is not learned: only a finding with a side forbids it.
    may_mirror = mirrored(rows, config.no_mirror, said=("finding",))
    tell_mirrored(config.train_data, rows, may_mirror)
    grey = torch.tensor([resolve_modality(row["modality"]).grey for row in rows], device=device)
    flags = torch.tensor(may_mirror, device=device), grey
    models, seconds = {}, {}
    for name in config.architectures:
        torch.manual_seed(config.seed)
        start = time.monotonic()
        model = ARCHITECTURES[name](len(classes), config.width)
        model.config.id2label = {i: f"{modality}: {finding}" for i, (modality, finding) in enumerate(classes)}
        model.config.label2id = {label: i for i, label in model.config.id2label.items()}
        models[name] = train_classifier(model, images, labels, *flags, config.recipe, name)
        seconds[name] = round(time.monotonic() - start)
    return models, seconds


def validate(judges: Judges, config: ClassifierConfig, val_rows: list[dict]) -> dict[str, dict]:
    """`accuracy_report` of each classifier and, as `judges`, of their mean."""
    each = judges.judge_each(load_images(val_rows, config.train_data, 256, reading=config.reading))
    each["judges"] = torch.stack(list(each.values())).mean(0)
    modalities, findings = map(list, zip(*map(class_of, val_rows), strict=True))
    sources, classes = [row.get("source", "") for row in val_rows], judges.classes
    return {name: accuracy_report(said, classes, modalities, findings, sources) for name, said in each.items()}


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
        rows, val_rows, classes = read_rows(config)
        models, seconds = train_all(config, rows, classes, device)
        if (config.output / "judges.json").exists():
            earlier = load_judges(config.output, device)
            if (earlier.classes, earlier.image_size) == (classes, config.resolution):
                models = {**earlier.models, **models}
        judges = Judges(models, classes, config.resolution)
        judges.save_pretrained(config.output)
        report: dict[str, Any] = {
            "trained_on": {"part": " ".join(config.part), "n": len(rows)},
            "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
            "seconds": seconds,
            "device": torch.cuda.get_device_name(0) if device.type == "cuda" else "cpu",
            "arguments": {name: value for name, value in asdict(config).items() if name not in PATHS},
            "val": validate(judges, config, val_rows),
        }
        write_report(config.output / "report.json", report)
        push_parts(config, "train_classifier", *(config.output / name for name in (*models, "judges.json")))
    for name, figures in report["val"].items():
        print(format_report(f"{name} on val", figures))
    return report
