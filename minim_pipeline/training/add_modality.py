"""Teaches a trained pipeline one more modality, without its forgetting the others.

In stages, each in a folder of its own; a run that was stopped goes on where it was:

1. `unet`: the U-Net learns the new rows, with old ones in every batch (--replay) and the predictions for these held
   near the base's (--anchor_weight);
2. `teacher`, `filter`, `calibrated`: if the base has a filter head, it is trained on for old and new modalities
   together, with thresholds, stages and fingerprints;
3. `pipeline`: all of it, with the base's defaults; and `report.json`: what the old modalities lost, what the new one
   won.
"""

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from accelerate import PartialState

from .. import EMBEDDED_CHECKPOINT, FilterHead, MinimPipeline, Modality, register_modality, resolve_modality
from ..data.image_loading import key_of
from ..data.sources import read_dataset, resolve_path
from ..data.splits import assign_splits
from ..disk import save_model
from ..evaluation.classifier import check_architecture
from ..evaluation.judges import claimed_classes
from ..evaluation.options import Architecture
from ..files import read_report, write_csv, write_report
from ..loading import model_identity
from ..locking import locked
from ..modalities import BUILT_IN, MODALITIES, split_prefix
from .classifier import ClassifierConfig
from .classifier import train as train_classifier
from .config import Count, CsvOptions, HubOptions, Positive, PrecisionOptions, Range, Share, Weight, Whole, option
from .filter.calibration import CalibrationConfig, calibrate
from .filter.config import FilterConfig
from .filter.train import train as train_filter
from .hub import check_hub, push_pipeline
from .log import read_log
from .rows import check_known, know_modalities
from .stages import Stages
from .text_to_image import TextToImageConfig
from .text_to_image import train as train_text_to_image


# Options that may differ when a run goes on.
MAY_CHANGE = {
    *("output_dir", "push_to_hub", "hub_model_id", "max_train_steps", "max_train_minutes", "compile"),
    *("validation_steps", "checkpointing_steps", "draw_batch_size"),
}
# Options that the U-Net's trainer has under the same names; and all others.
UNET = (
    *("pretrained_model_name_or_path", "max_train_steps", "max_train_minutes", "train_batch_size", "learning_rate"),
    *("text_encoder_learning_rate", "lr_warmup_steps", "ema_decay", "caption_variants", "latent_variants", "captions"),
    *("validation_steps", "validation_samples", "checkpointing_steps", "replay", "compile"),
)
EVERY = ("fit", "window", "no_mirror", "mixed_precision", "seed")


@dataclass(kw_only=True)
class AddModalityConfig(CsvOptions, HubOptions, PrecisionOptions):
    """Options of a modality's addition."""

    pretrained_model_name_or_path: str = option(str(EMBEDDED_CHECKPOINT), "The pipeline.")
    replay: str | None = option(None, "CSV of what the model has learned already, in the same format.")
    no_replay: bool = option(
        False,
        "Train on new rows alone, to see what that costs: the model forgets what it knew. With --replay its old rows "
        "are only validated on.",
    )
    modality: str = option(help="Its id; the options from --grey to --words are for one that is not in the table.")
    grey: bool = option(False, "Its images have three equal channels.")
    color: bool = option(False, "Its images have colours.")
    flip: bool = option(False, "A mirrored image is as plausible as the original.")
    name: str | None = option(None, "As CSV files write it; default: the id.")
    aliases: list[str] = option([], "Other spellings.")
    words: str | None = option(None, "From which its token's embedding starts; default: the id's.")

    max_train_steps: Count = option(4000, "Of the U-Net, as all up to --checkpointing_steps.")
    max_train_minutes: Positive | None = None
    train_batch_size: Count = 256
    learning_rate: Weight = 1e-4
    text_encoder_learning_rate: Weight = option(1e-4, "Of a token that is added.")
    lr_warmup_steps: Whole = 100
    ema_decay: Share = 0.999
    replay_share: Share = option(0.5, "Share of every batch that is old rows.")
    anchor_weight: Weight = option(1.0, "Of the distance to the base's predictions.")
    caption_variants: Count = option(16, "Phrasings of every caption.")
    latent_variants: Count = option(8, "Augmented versions of every image.")
    captions: str | None = option(None, "JSON with phrasings of every finding; default: the package's own.")
    validation_steps: Count = 500
    validation_samples: Count = 8
    checkpointing_steps: Count = 500

    skip_filter: bool = option(False, "The new pipeline has no filter head then.")
    teacher: str | None = option(None, "Classifiers that know the new modality; default: trained here on part A.")
    teacher_architecture: Architecture = option("resnet", "Of such; efficientnet-lite starts from ImageNet.")
    teacher_steps: Count = 2000
    teacher_width: Count = 48
    teacher_resolution: Count | None = option(None, "What they see, in pixels; default: 192, from ImageNet 224.")
    ratings: str | None = option(None, "CSV of people's grades of quality, as train_filter.py takes it.")
    filter_steps: Count = 2000
    filter_minutes: Positive | None = None
    filter_batch_size: Count = 256
    filter_learning_rate: Weight = 3e-4
    drawn_images: Count = option(16_000, "Images drawn for the filter to learn from.")
    draw_batch_size: Count = 256
    prompts_per_modality: Count = option(100, "Drawn for the thresholds.")
    most_cost: Annotated[float, Range(1, 99)] = option(1.95, "As in calibrate_filter.py.")
    min_train: Count = option(20, "Findings with fewer train images are left out.")
    min_val: Whole = option(5, "Likewise with val images.")
    compile: bool = option(False, "torch.compile the U-Net in training.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.replay and not self.no_replay:
            raise ValueError(
                "--replay is missing: the rows that the model has learned from, so that it does not forget them;"
                " --no_replay to do without."
            )
        if self.grey and self.color:
            raise ValueError("--grey and --color cannot both be: its images are grey, or they have colours.")


def find_modality(config: AddModalityConfig, learned: list[str]) -> Modality:
    """The modality of the table, or the new one that the options define, which is not registered.

    Raises:
        ValueError: it is one of those that the model has learned; it is in the table and the options say otherwise; or
            it is not and they do not say whether it is grey.
    """
    # What the table knows, or knows to be ambiguous, is a prefix.
    known = resolve_modality(config.modality) if split_prefix(f"{config.modality}:")[0] is not None else None
    if known is not None and known.id in learned:
        model, names = config.pretrained_model_name_or_path, ", ".join(learned)
        raise ValueError(f"{model} has learned modality {known.id!r} already; it knows: {names}.")
    if known is None or known.id not in BUILT_IN:
        if not (config.grey or config.color):
            raise ValueError(
                f"modality {config.modality!r} is not in the table ({', '.join(MODALITIES)}): to add it, say whether"
                " its images are --grey or in --color."
            )
        name, words = config.name or config.modality, config.words or config.modality.replace("_", " ")
        return Modality(config.modality, name, words, tuple(config.aliases), config.grey, config.flip)
    if (config.grey and not known.grey) or (config.color and known.grey):
        is_so, wrong = ("grey", "--color") if known.grey else ("in colour", "--grey")
        raise ValueError(f"modality {known.id!r} is in the table, and {is_so} there: leave {wrong} out.")
    given = [f"--{name}" for name in ("flip", "name", "aliases", "words") if getattr(config, name)]
    if given:
        raise ValueError(f"modality {known.id!r} is in the table already: leave {', '.join(given)} out.")
    return known


def read_new(config: AddModalityConfig, modality: Modality) -> tuple[list[dict], Counter[str]]:
    """The rows of the modality, and how many of others were left out; images are looked at later, by the trainer.

    A row that names no modality is of this one.
    """
    options = {**config.csv_options, "check_images": False, "modality": modality.id}
    rows = read_dataset(config.train_data, require=("path", "Text"), **options)

    def fits(row: dict) -> bool:
        try:
            return resolve_modality(row["modality"]) is modality
        except ValueError:  # of another modality that nobody knows yet
            return False

    new = [row for row in rows if fits(row)]
    others = Counter(row["modality"] for row in rows if not fits(row))
    if not new:
        found = ", ".join(f"{name!r} ({count})" for name, count in others.items())
        raise ValueError(f"{config.train_data} has no rows of modality {modality.id!r}; it has: {found}.")
    new = assign_splits(new, config.train_data)
    for split in ("train", "val"):
        if not any(row["split"] == split for row in new):
            found = ", ".join(sorted({repr(row["split"]) for row in new}))
            raise ValueError(f"{config.train_data} has no {modality.id!r} of split {split!r}; its splits: {found}.")
    return new, others


Source = tuple[list[dict], str]  # rows, and the CSV that they are of


def check_filter(config: AddModalityConfig, modality: Modality, sources: list[Source]) -> None:
    """Raises ValueError if the filter could not learn from the rows of these CSV files, the new ones first.

    Raises ImportError if the teacher that is to be trained needs packages that are not installed.
    """
    lacking = [source for rows, source in sources if not all(row.get("finding") for row in rows)]
    if lacking:
        why = "which the filter needs: add it, or --skip_filter"
        raise ValueError(f"{lacking[0]} has rows without a `finding`, {why}.")
    train, val = ([row for row in sources[0][0] if row["split"] == split] for split in ("train", "val"))
    if modality.id not in dict(claimed_classes(train, val, config.min_train, config.min_val)):
        raise ValueError(
            f"{config.train_data} has no finding of {modality.id!r} with {config.min_train} train and"
            f" {config.min_val} val images, which the filter needs: lower --min_train or --min_val, or --skip_filter."
        )
    if config.teacher:
        known = dict(json.loads((Path(config.teacher) / "judges.json").read_text())["classes"])
        if modality.id not in known:
            names = ", ".join(known)
            raise ValueError(f"The classifiers of --teacher {config.teacher} know no {modality.id!r}, only {names}.")
    else:
        check_architecture(config.teacher_architecture)


def write_rows(path: Path, sources: list[Source]) -> str:
    """Rows of several CSV files as one beside which no image lies: every path leads from here to where it is."""
    rows = []
    for part, source in sources:
        # Resolved: behind a link, "../.." leads elsewhere than it reads.
        places = [os.path.relpath(resolve_path(row, source).resolve(), path.parent.resolve()) for row in part]
        rows += [row | {"path": place} for row, place in zip(part, places)]
    write_csv(path, rows)
    return str(path)


class Addition:
    """A modality's addition: what is checked before any work, and the stages."""

    def __init__(self, config: AddModalityConfig):
        self.config, self.output = config, config.output
        know_modalities(config)
        self.base = MinimPipeline.from_pretrained(config.pretrained_model_name_or_path)
        self.resolution = self.base.unet.config.sample_size * self.base.vae_scale_factor
        self.modality = find_modality(config, list(self.base.config.modalities or []))
        if self.modality.id not in BUILT_IN:
            register_modality(self.modality)
        self.new_rows, self.left_out = read_new(config, self.modality)
        self.filtered = self.base.filter_head is not None and not config.skip_filter
        self.sources = [(self.new_rows, config.train_data)]
        if config.replay:
            old_rows = assign_splits(read_dataset(config.replay, check_images=False), config.replay)
            check_known(old_rows, config.replay, self.base.config, config.pretrained_model_name_or_path)
            self.sources.append((old_rows, config.replay))
        if self.filtered:
            check_filter(config, self.modality, self.sources)
        self.stages = Stages(config, MAY_CHANGE)
        readings = config.reading, config.reading_elsewhere()
        images = [key_of(*source, reading) for source, reading in zip(self.sources, readings)]
        self.stages.require("images", images, "Images or rows of --train_data or --replay have changed")

    def run(self) -> dict:
        """Does the stages that are left, and returns the report."""
        config, output, stages = self.config, self.output, self.stages
        if self.left_out:
            names = ", ".join(f"{count} {name}" for name, count in self.left_out.items())
            print(f"left out of {config.train_data}: {names}")
        stages.save()
        stages.run("unet", train_text_to_image, self.unet_config(write_rows(output / "new.csv", self.sources[:1])))
        if self.filtered:
            self.every = write_rows(output / "all.csv", self.sources)
            # Without parts of their own, teacher, filter and thresholds have to share all rows.
            parted = all({"A", "C"} <= {row.get("part") for row in rows} for rows, _ in self.sources)
            self.parts = ("A", "C") if parted else ("all", "all")
            save_model(self.base.filter_head, output / "base_filter_head")
            if not config.teacher:
                stages.run("teacher", train_classifier, self.teacher_config())
            stages.run("filter", train_filter, self.filter_config())
            stages.run("calibrate", calibrate, self.calibration_config())
        stages.run("pipeline", self.write_pipeline)
        report = self.report()
        write_report(output / "report.json", report)
        return report

    def unet_config(self, rows: str) -> TextToImageConfig:
        options = self.config.values(*UNET, *EVERY)
        if self.config.replay:
            weights = self.config.values("replay_share", "anchor_weight")
            options |= dict.fromkeys(weights, 0.0) if self.config.no_replay else weights
        output_dir = str(self.output / "unet")
        return TextToImageConfig(train_data=rows, output_dir=output_dir, resolution=self.resolution, **options)

    def shared(self, folder: str, *names: str) -> dict:
        """Where a part of the filter learns from and writes to, and options that it has under the same names."""
        options = {"train_data": self.every, "output_dir": str(self.output / folder)}
        if folder != "teacher":
            options["pretrained_model_name_or_path"] = str(self.output / "unet" / "pipeline")
            options["teacher"] = self.config.teacher or str(self.output / "teacher")
        return options | self.config.values("min_train", *names, *EVERY)

    def teacher_config(self) -> ClassifierConfig:
        return ClassifierConfig(
            part=[self.parts[0]],
            architectures=[self.config.teacher_architecture],
            max_train_steps=self.config.teacher_steps,
            width=self.config.teacher_width,
            resolution=self.config.teacher_resolution,
            autoencoder=str(self.output / "unet" / "pipeline"),  # what it says of generated images has gone through it
            **self.shared("teacher", "min_val"),
        )

    def filter_config(self) -> FilterConfig:
        same = ("ratings", "captions", "caption_variants", "latent_variants", "drawn_images", "draw_batch_size")
        return FilterConfig(
            pretrained_filter_head=str(self.output / "base_filter_head"),
            part=self.parts[0],
            resolution=self.resolution,
            max_train_steps=self.config.filter_steps,
            max_train_minutes=self.config.filter_minutes,
            train_batch_size=self.config.filter_batch_size,
            learning_rate=self.config.filter_learning_rate,
            # No cross-validation of people's grades: the head that this one starts from has learned from them all.
            folds=0,
            **self.shared("filter", *same, "checkpointing_steps"),
        )

    def calibration_config(self) -> CalibrationConfig:
        return CalibrationConfig(
            filter_head=str(self.output / "filter" / "filter_head"),
            part=self.parts[1],
            ratings_part=self.parts[0],
            batch_size=self.config.draw_batch_size,
            candidates=max(2, self.base.config.num_candidates),
            code_bits=self.base.filter_head.config.code_size,
            **self.shared("calibrated", "ratings", "min_val", "prompts_per_modality", "most_cost"),
        )

    def write_pipeline(self) -> None:
        """The new pipeline as a whole, under its name once it is complete."""
        head = None
        if self.filtered:
            before, head = (
                FilterHead.from_pretrained(self.output / p / "filter_head") for p in ("filter", "calibrated")
            )
            # Thresholds of modalities of which no rows were at hand; nothing is known of their copies any more.
            head.register_to_config(calibration={**(before.config.calibration or {}), **head.config.calibration})
            head.half()
        defaults = {"filter_head": head, "num_candidates": self.base.config.num_candidates}
        pipe = MinimPipeline.from_pretrained(self.output / "unet" / "pipeline", **defaults)
        save_model(pipe, self.output / "pipeline")

    def validation(self) -> dict:
        """Losses on val images of the base and the new model, in the same noise; of old ones if --replay has any."""
        records = read_log(self.output / "unet")
        best = next(r["at_step"] for r in reversed(records) if r["kind"] == "best")
        after = next(r for r in reversed(records) if r["kind"] == "val" and r["step"] == best)
        moments = {"before": next((r for r in reversed(records) if r["kind"] == "base"), {}), "after": after}
        report = {"best_step": best}
        for name in after:
            if name.startswith("loss_") and name != "loss_new":
                losses = {moment: record[name] for moment, record in moments.items() if name in record}
                report["new" if name == f"loss_{self.modality.id}" else name.removeprefix("loss_")] = losses
        return report

    def report(self) -> dict:
        report = {
            "modality": asdict(self.modality),
            "model": list(model_identity(self.config.pretrained_model_name_or_path)),
            "rows": {"new": dict(Counter(row["split"] for row in self.new_rows)), "left_out": dict(self.left_out)},
            "minutes": self.stages.minutes,
            "validation_loss": self.validation(),
        }
        if self.filtered:
            made = read_report(self.output / "calibrated" / "report.json")
            report["filter"] = {"calibration": made["calibration"], "generated": made["generated"]}
        return report


def train(config: AddModalityConfig) -> dict:
    """Adds the modality, writes the new pipeline to `pipeline/` in `--output_dir`, and returns the report.

    Raises:
        ValueError: there are several processes; the model knows the modality; rows, teacher or options do not fit; or
            the folder holds another run, or one that is still going on.
    """
    if PartialState().num_processes > 1:
        raise ValueError("add_modality.py is run by one process; for several GPUs run the trainers one by one.")
    check_hub(config)
    with locked(config.output):
        report = Addition(config).run()
        push_pipeline(config, config.output / "pipeline")
    print(json.dumps({key: report[key] for key in ("minutes", "validation_loss")}, indent=2))
    return report
