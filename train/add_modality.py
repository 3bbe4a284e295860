"""Teaches a trained pipeline one more modality, without its forgetting the others.

In stages, each in a folder of its own; a run that was stopped goes on where it was:

1. `unet`: `train_text_to_image.py` on the new rows, with old ones in every batch (--replay) and the predictions for
   these held near the base's (--anchor_weight);
2. `teacher`, `filter`, `calibrated`: if the base has a filter head, it is trained on for old and new modalities
   together, with thresholds, stages and fingerprints;
3. `pipeline`: all of it, with the base's defaults; and `report.json`: what the old modalities lost, what the new one
   won.

A modality of the package's table needs no more than its name:

    python train/add_modality.py --modality breast_mri \
        --train_data new_domain.csv --replay data.csv --output_dir runs/breast_mri --mixed_precision bf16 --compile

Any other has to be defined, and the pipeline takes the definition along:

    python train/add_modality.py --pretrained_model_name_or_path runs/breast_mri/pipeline \
        --modality dermoscopy --color --flip --aliases dermatoscopy "skin lesion" \
        --words "color photograph of a skin lesion" \
        --train_data skin.csv --replay data.csv --output_dir runs/dermoscopy
"""

import argparse
import gc
import json
import os
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch
import train_classifier
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState

from minim_pipeline import (
    EMBEDDED_CHECKPOINT,
    FilterHead,
    MinimPipeline,
    Modality,
    register_modality,
    resolve_modality,
    split_prefix,
)
from minim_pipeline.data.image_loading import key_of
from minim_pipeline.data.sources import read_csv, resolve_path
from minim_pipeline.data.splits import assign_splits
from minim_pipeline.disk import save_model
from minim_pipeline.evaluation.judges import claimed_classes
from minim_pipeline.files import write_csv, write_json
from minim_pipeline.loading import model_identity
from minim_pipeline.modalities import BUILT_IN, MODALITIES
from minim_pipeline.options import ReadingOptions, TableOptions, add_options, options_from
from minim_pipeline.training.arguments import check_numbers, check_shares
from minim_pipeline.training.filter.calibration import CalibrationConfig, calibrate
from minim_pipeline.training.filter.train import FilterConfig
from minim_pipeline.training.filter.train import train as train_filter
from minim_pipeline.training.hub import add_hub_arguments, check_hub_arguments, push_pipeline
from minim_pipeline.training.replay import check_known
from minim_pipeline.training.rows import add_mirror_argument
from minim_pipeline.training.text_to_image import TextToImageConfig
from minim_pipeline.training.text_to_image import train as train_text_to_image


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_model_name_or_path", default=str(EMBEDDED_CHECKPOINT), help="The pipeline.")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--train_data", required=True, help="CSV with path,Text,modality[,split,finding,part].")
    parser.add_argument("--image_root", help="Look for the images of --train_data here, as the trainers do.")
    add_mirror_argument(parser)
    parser.add_argument("--replay", help="CSV of what the model has learned already, in the same format.")
    parser.add_argument(
        "--no_replay",
        action="store_true",
        help="Train on new rows alone, to see what that costs: the model forgets what it knew. With --replay its old "
        "rows are only validated on.",
    )
    add_options(parser, ReadingOptions)
    kind = parser.add_argument_group("the modality")
    kind.add_argument("--modality", required=True, help="Its id; all below is for one that is not in the table.")
    channels = kind.add_mutually_exclusive_group()
    channels.add_argument("--grey", action="store_true", help="Its images have three equal channels.")
    channels.add_argument("--color", action="store_true", help="Its images have colours.")
    kind.add_argument("--flip", action="store_true", help="A mirrored image is as plausible as the original.")
    kind.add_argument("--name", help="As CSV files write it; default: the id.")
    kind.add_argument("--aliases", nargs="+", default=[], help="Other spellings.")
    kind.add_argument("--words", help="From which its token's embedding starts; default: the id's.")
    unet = parser.add_argument_group("U-Net (train_text_to_image.py)")
    unet.add_argument("--max_train_steps", type=int, default=4000)
    unet.add_argument("--max_train_minutes", type=float)
    unet.add_argument("--train_batch_size", type=int, default=256)
    unet.add_argument("--learning_rate", type=float, default=1e-4)
    unet.add_argument("--text_encoder_learning_rate", type=float, default=1e-4, help="Of a token that is added.")
    unet.add_argument("--lr_warmup_steps", type=int, default=100)
    unet.add_argument("--ema_decay", type=float, default=0.999)
    unet.add_argument("--replay_share", type=float, default=0.5, help="Share of every batch that is old rows.")
    unet.add_argument("--anchor_weight", type=float, default=1.0, help="Of the distance to the base's predictions.")
    unet.add_argument("--caption_variants", type=int, default=16, help="Phrasings of every caption.")
    unet.add_argument("--latent_variants", type=int, default=8, help="Augmented versions of every image.")
    unet.add_argument("--captions", help="JSON with phrasings of every finding; default: the package's own.")
    unet.add_argument("--validation_steps", type=int, default=500)
    unet.add_argument("--validation_samples", type=int, default=8)
    unet.add_argument("--checkpointing_steps", type=int, default=500)
    head = parser.add_argument_group("filter (train_classifier.py, train_filter.py, calibrate_filter.py)")
    head.add_argument("--skip_filter", action="store_true", help="The new pipeline has no filter head then.")
    head.add_argument("--teacher", help="Classifiers that know the new modality; default: trained here on part A.")
    head.add_argument("--teacher_steps", type=int, default=2000)
    head.add_argument("--teacher_width", type=int, default=48)
    head.add_argument("--teacher_resolution", type=int, default=192)
    head.add_argument("--ratings", help="CSV of people's grades of quality, as train_filter.py takes it.")
    head.add_argument("--filter_steps", type=int, default=2000)
    head.add_argument("--filter_minutes", type=float)
    head.add_argument("--filter_batch_size", type=int, default=256)
    head.add_argument("--filter_learning_rate", type=float, default=3e-4)
    head.add_argument("--drawn_images", type=int, default=16_000, help="Images drawn for the filter to learn from.")
    head.add_argument("--draw_batch_size", type=int, default=256)
    head.add_argument("--prompts_per_modality", type=int, default=100, help="Drawn for the thresholds.")
    head.add_argument("--most_cost", type=float, default=1.95, help="As in calibrate_filter.py.")
    head.add_argument("--min_train", type=int, default=20, help="Findings with fewer train images are left out.")
    head.add_argument("--min_val", type=int, default=5, help="Likewise with val images.")
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--compile", action="store_true", help="torch.compile the U-Net in training.")
    parser.add_argument("--seed", type=int, default=0)
    add_hub_arguments(parser)
    args = parser.parse_args(argv)
    check_numbers(parser, args, from_zero=("seed", "lr_warmup_steps", "min_val"))
    check_hub_arguments(args)
    if not args.replay and not args.no_replay:
        raise ValueError(
            "--replay is missing: the rows that the model has learned from, so that it does not forget them;"
            " --no_replay to do without."
        )
    check_shares(args, "ema_decay", "replay_share")
    for name in ("max_train_minutes", "filter_minutes"):
        if getattr(args, name) == 0:
            raise ValueError(f"--{name} has to be above 0, got 0.")
    return args


def define(args: argparse.Namespace, trained: list[str]) -> Modality:
    """The modality of the table, or the new one that the arguments define, registered.

    Raises:
        ValueError: the model has learned it already; it is in the table and the arguments say otherwise; it is not and
            they do not say whether it is grey; or what `register_modality` raises.
    """
    # What the table knows, or knows to be ambiguous, is a prefix.
    known = resolve_modality(args.modality) if split_prefix(f"{args.modality}:")[0] is not None else None
    if known is not None and known.id in trained:
        raise ValueError(
            f"{args.pretrained_model_name_or_path} has learned modality {known.id!r} already; it knows:"
            f" {', '.join(trained)}."
        )
    if known is None or known.id not in BUILT_IN:
        if not (args.grey or args.color):
            raise ValueError(
                f"modality {args.modality!r} is not in the table ({', '.join(MODALITIES)}): to add it, say whether its"
                " images are --grey or in --color."
            )
        words = args.words or args.modality.replace("_", " ")
        name = args.name or args.modality
        return register_modality(Modality(args.modality, name, words, tuple(args.aliases), args.grey, args.flip))
    if (args.grey and not known.grey) or (args.color and known.grey):
        is_so, said = ("grey", "--color") if known.grey else ("in colour", "--grey")
        raise ValueError(f"modality {known.id!r} is in the table, and {is_so} there: leave {said} out.")
    given = [f"--{name}" for name in ("flip", "name", "aliases", "words") if getattr(args, name)]
    if given:
        raise ValueError(f"modality {known.id!r} is in the table already: leave {', '.join(given)} out.")
    return known


def read_new(args: argparse.Namespace, modality: Modality) -> tuple[list[dict], Counter]:
    """The rows of the modality, and how many of others were left out; images are looked at later, by the trainer.

    A row that names no modality is of this one.
    """
    new = {"require": ("path", "Text"), "check_images": False, "modality": modality.id}
    rows = read_csv(args.train_data, image_root=args.image_root, **new)

    def fits(row):
        try:
            return resolve_modality(row["modality"]) is modality
        except ValueError:  # of another modality that nobody knows yet
            return False

    mine = [row for row in rows if fits(row)]
    others = Counter(row["modality"] for row in rows if not fits(row))
    if not mine:
        found = ", ".join(f"{name!r} ({count})" for name, count in others.items())
        raise ValueError(f"{args.train_data} has no rows of modality {modality.id!r}; it has: {found}.")
    mine = assign_splits(mine, args.train_data)
    for split in ("train", "val"):
        if not any(row["split"] == split for row in mine):
            found = ", ".join(sorted({repr(row["split"]) for row in mine}))
            raise ValueError(f"{args.train_data} has no {modality.id!r} of split {split!r}; its splits: {found}.")
    return mine, others


def check_filter(args, modality: Modality, sources: list[tuple[list[dict], str]]) -> None:
    """Raises ValueError if the filter could not learn from the rows of these CSV files, the new ones first."""
    for rows, source in sources:
        if not all(row.get("finding") for row in rows):
            raise ValueError(
                f"{source} has rows without a `finding`, which the filter needs: add it, or --skip_filter."
            )
    rows = sources[0][0]
    splits = ([row for row in rows if row["split"] == split] for split in ("train", "val"))
    if not [name for name, _ in claimed_classes(*splits, args.min_train, args.min_val) if name == modality.id]:
        raise ValueError(
            f"{args.train_data} has no finding of {modality.id!r} with {args.min_train} train and {args.min_val} val"
            " images, which the filter needs: lower --min_train or --min_val, or --skip_filter."
        )
    if args.teacher:
        known = json.loads((Path(args.teacher) / "judges.json").read_text())["classes"]
        if modality.id not in {name for name, _ in known}:
            names = ", ".join(dict.fromkeys(name for name, _ in known))
            raise ValueError(f"The classifiers of --teacher {args.teacher} know no {modality.id!r}, only {names}.")


def write_rows(path: Path, sources: list[tuple[list[dict], str]]) -> Path:
    """Rows of several CSV files as one beside which no image lies: every path leads from here to where it is."""
    rows = []
    for mine, source in sources:
        # Resolved: behind a link, "../.." leads elsewhere than it reads.
        places = [os.path.relpath(resolve_path(row, source).resolve(), path.parent.resolve()) for row in mine]
        rows += [row | {"path": place} for row, place in zip(mine, places)]
    write_csv(path, rows)
    return path


class Progress:
    """Which stages are finished, in `stages.json`, with the minutes that each took, and keys of the images."""

    # What may differ when a run goes on.
    MAY_CHANGE = {
        *("output_dir", "push_to_hub", "hub_model_id", "max_train_steps", "max_train_minutes", "compile"),
        *("validation_steps", "checkpointing_steps", "draw_batch_size"),
    }

    def __init__(self, args: argparse.Namespace, images: list[str]):
        self.path, self.images = Path(args.output_dir) / "stages.json", images
        self.arguments = {k: v for k, v in vars(args).items() if k not in self.MAY_CHANGE}
        self.minutes: dict[str, float] = {}
        if self.path.is_file():
            held = json.loads(self.path.read_text())
            now, before = json.loads(json.dumps(self.arguments)), held["arguments"]
            told = "; ".join(f"--{k} was {before.get(k)!r}, now {now[k]!r}" for k in now if before.get(k) != now[k])
            if told:
                raise ValueError(f"{args.output_dir} holds a run with other arguments: {told}.")
            if held.get("images", images) != images:
                raise ValueError(
                    f"Images or rows of --train_data or --replay have changed since the run in {args.output_dir}"
                    " began: choose another --output_dir."
                )
            self.minutes = held["minutes"]

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"arguments": self.arguments, "images": self.images, "minutes": self.minutes})

    def run(self, name: str, stage, *args) -> None:
        """Runs a stage unless it is finished."""
        if name in self.minutes:
            print(f"[{name}] is finished already")
            return
        print(f"[{name}]")
        # Each trainer starts its own Accelerator, maybe of another precision, and begins with an empty device.
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        gc.collect()
        torch.cuda.empty_cache()
        start = time.monotonic()
        stage(*args)
        self.minutes[name] = round((time.monotonic() - start) / 60, 2)
        self.save()


def options(args: argparse.Namespace, *names: str) -> list[str]:
    """Arguments that a trainer has under the same names; those that were not given are left out."""
    values = {name: getattr(args, name) for name in names}
    return [part for name, value in values.items() if value is not None for part in (f"--{name}", str(value))]


def mirror(args: argparse.Namespace) -> list[str]:
    return ["--no_mirror"] if args.no_mirror else []


def train_unet(args, output: Path, new: Path, resolution: int) -> None:
    same = ("max_train_steps", "max_train_minutes", "train_batch_size", "learning_rate", "text_encoder_learning_rate")
    same += ("lr_warmup_steps", "ema_decay", "caption_variants", "latent_variants", "captions", "validation_steps")
    same += ("validation_samples", "checkpointing_steps", "mixed_precision", "seed", "fit", "window", "compile")
    replay = {}
    if args.replay:
        share, weight = (0.0, 0.0) if args.no_replay else (args.replay_share, args.anchor_weight)
        replay = {"replay": args.replay, "replay_share": share, "anchor_weight": weight}
    config = TextToImageConfig(
        pretrained_model_name_or_path=args.pretrained_model_name_or_path,
        train_data=str(new),
        output_dir=str(output / "unet"),
        resolution=resolution,
        no_mirror=args.no_mirror,
        **{name: getattr(args, name) for name in same},
        **replay,
    )
    train_text_to_image(config)


def train_teacher(args, output: Path, every: Path, part: str) -> None:
    call = ["--train_data", every, "--output_dir", output / "teacher", "--part", part, "--architectures", "resnet"]
    call += ["--max_train_steps", args.teacher_steps, "--width", args.teacher_width]
    call += [
        "--resolution",
        args.teacher_resolution,
        *mirror(args),
        "--fit",
        args.fit,
        *(["--window", *map(str, args.window)] if args.window else []),
    ]
    train_classifier.main([*map(str, call), *options(args, "min_train", "min_val", "mixed_precision", "seed")])


def train_head(args, output: Path, every: Path, part: str, teacher: Path, resolution: int) -> None:
    same = ("ratings", "captions", "drawn_images", "draw_batch_size", "min_train", "latent_variants", "fit", "window")
    same += ("caption_variants", "checkpointing_steps", "mixed_precision", "seed", "no_mirror")
    config = FilterConfig(
        pretrained_model_name_or_path=str(output / "unet" / "pipeline"),
        pretrained_filter_head=str(output / "base_filter_head"),
        teacher=str(teacher),
        train_data=str(every),
        output_dir=str(output / "filter"),
        part=part,
        resolution=resolution,
        max_train_steps=args.filter_steps,
        max_train_minutes=args.filter_minutes,
        train_batch_size=args.filter_batch_size,
        learning_rate=args.filter_learning_rate,
        # No cross-validation of people's grades: the head that this one starts from has learned from all of them.
        folds=0,
        **{name: getattr(args, name) for name in same},
    )
    train_filter(config)


def calibrate_head(args, output: Path, every: Path, parts: tuple[str, str], teacher: Path, base) -> None:
    same = ("ratings", "min_train", "min_val", "prompts_per_modality", "most_cost", "fit", "window", "no_mirror")
    config = CalibrationConfig(
        filter_head=str(output / "filter" / "filter_head"),
        pretrained_model_name_or_path=str(output / "unet" / "pipeline"),
        teacher=str(teacher),
        train_data=str(every),
        output_dir=str(output / "calibrated"),
        part=parts[1],
        ratings_part=parts[0],
        batch_size=args.draw_batch_size,
        candidates=max(2, base.config.num_candidates),
        code_bits=base.filter_head.config.code_size,
        mixed_precision=args.mixed_precision,
        seed=args.seed,
        **{name: getattr(args, name) for name in same},
    )
    calibrate(config)


def write_pipeline(output: Path, base: MinimPipeline, filtered: bool) -> None:
    """The new pipeline as a whole, under its name once it is complete."""
    head = None
    if filtered:
        head = FilterHead.from_pretrained(output / "calibrated" / "filter_head")
        # Thresholds of modalities of which no rows were at hand; nothing is known of their copies any more.
        earlier = FilterHead.from_pretrained(output / "filter" / "filter_head").config.calibration or {}
        head.register_to_config(calibration={**earlier, **head.config.calibration})
    pipe = MinimPipeline.from_pretrained(
        output / "unet" / "pipeline", filter_head=head, num_candidates=base.config.num_candidates
    )
    if head is not None:
        pipe.filter_head.half()
    save_model(pipe, output / "pipeline")


def validation(output: Path, modality: Modality) -> dict:
    """Losses on val images of the base and of the new model, in the same noise; of old ones where --replay has any."""
    records = [json.loads(line) for line in (output / "unet" / "log.jsonl").read_text().splitlines()]
    best = next(r["at_step"] for r in reversed(records) if r["kind"] == "best")
    moments = {
        "before": next((r for r in reversed(records) if r["kind"] == "base"), {}),
        "after": next(r for r in reversed(records) if r["kind"] == "val" and r["step"] == best),
    }
    report = {"best step": best}
    names = [name for name in moments["after"] if name.startswith("loss_") and name != "loss_new"]
    for name in names:
        losses = {moment: record[name] for moment, record in moments.items() if name in record}
        report["new" if name == f"loss_{modality.id}" else name.removeprefix("loss_")] = losses
    return report


def main(argv=None) -> dict:
    args = parse_args(argv)
    if PartialState().num_processes > 1:
        raise ValueError("add_modality.py is run by one process; for several GPUs run the trainers one by one.")
    base = MinimPipeline.from_pretrained(args.pretrained_model_name_or_path)
    modality = define(args, list(base.config.modalities or []))
    new_rows, others = read_new(args, modality)
    filtered = base.filter_head is not None and not args.skip_filter
    sources = [(new_rows, args.train_data)]
    if args.replay:
        old_rows = assign_splits(read_csv(args.replay, check_images=False), args.replay)
        check_known(old_rows, args.replay, base.config, args.pretrained_model_name_or_path)
        sources.append((old_rows, args.replay))
    reading = options_from(TableOptions, args)
    readings = [reading.reading, reading.reading_elsewhere()][: len(sources)]
    if filtered:
        check_filter(args, modality, sources)
    progress = Progress(args, [key_of(rows, source, reading) for (rows, source), reading in zip(sources, readings)])
    if others:
        print(f"left out of {args.train_data}: " + ", ".join(f"{count} {name}" for name, count in others.items()))

    output = Path(args.output_dir)
    progress.save()
    resolution = base.unet.config.sample_size * base.vae_scale_factor
    new = write_rows(output / "new.csv", sources[:1])
    progress.run("unet", train_unet, args, output, new, resolution)
    if filtered:
        every = write_rows(output / "all.csv", sources)
        # Without parts of their own, teacher, filter and thresholds have to share all rows.
        parted = all({"A", "C"} <= {row.get("part") for row in rows} for rows, _ in sources)
        parts = ("A", "C") if parted else ("all", "all")
        teacher = Path(args.teacher or output / "teacher")
        save_model(base.filter_head, output / "base_filter_head")
        if not args.teacher:
            progress.run("teacher", train_teacher, args, output, every, parts[0])
        progress.run("filter", train_head, args, output, every, parts[0], teacher, resolution)
        progress.run("calibrate", calibrate_head, args, output, every, parts, teacher, base)
    progress.run("pipeline", write_pipeline, output, base, filtered)

    splits = Counter(row["split"] for row in new_rows)
    report = {
        "modality": asdict(modality),
        "model": list(model_identity(args.pretrained_model_name_or_path)),
        "rows": {"new": dict(splits), "left out": dict(others)},
        "minutes": progress.minutes,
        "validation loss": validation(output, modality),
    }
    if filtered:
        made = json.loads((output / "calibrated" / "report.json").read_text())
        report["filter"] = {"calibration": made["calibration"], "generated": made["generated"]}
    write_json(output / "report.json", report)
    push_pipeline(args, output / "pipeline")
    print(json.dumps({key: report[key] for key in ("minutes", "validation loss")}, indent=2))
    return report


if __name__ == "__main__":
    main()
