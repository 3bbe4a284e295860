"""Trains the judges: two classifiers of modality and finding, of different build, from scratch, on few real images.

They are to read generated images, which are a little smoother and of slightly other colours than real ones, so colour,
contrast, sharpness and noise are varied so strongly that none of them can be relied on. A run has a fixed number of
steps and looks at the val split once, at the end: nothing is chosen by it.

    python train/train_classifier.py --train_data data.csv --output_dir runs/judges
"""

import argparse
import time
from pathlib import Path

import torch

from minim_pipeline.data.image_loading import load_images
from minim_pipeline.data.image_reader import add_reading_arguments, reading_of
from minim_pipeline.data.splits import read_splits
from minim_pipeline.evaluation.classifier import ARCHITECTURES, Recipe, train_classifier
from minim_pipeline.evaluation.judges import Judges, accuracy_report, claimed_classes, load_judges
from minim_pipeline.files import write_json
from minim_pipeline.modalities import resolve_modality
from minim_pipeline.training.arguments import check_numbers, check_shares
from minim_pipeline.training.common import add_modalities_argument, know_modalities
from minim_pipeline.training.hub import add_hub_arguments, check_hub_arguments, push_parts
from minim_pipeline.training.rows import (
    add_csv_arguments,
    add_mirror_argument,
    csv_options,
    image_paths,
    mirrored,
    tell_mirrored,
    tell_repeats,
)


# Arguments that name places of the machine, or its size: a report shows none of them.
PATHS = ("train_data", "image_root", "output_dir", "modalities_from", "threads")


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_data", required=True, help="CSV with path,Text,modality,finding[,split,part].")
    add_csv_arguments(parser)
    add_mirror_argument(parser)
    add_modalities_argument(parser)
    parser.add_argument("--output_dir", required=True)
    add_reading_arguments(parser)
    parser.add_argument(
        "--part", nargs="+", default=["B"], help="Rows of the train split with these `part`s; 'all' takes every row."
    )
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
    add_hub_arguments(parser)
    args = parser.parse_args(argv)
    check_numbers(parser, args, from_zero=("seed", "min_val"))
    check_shares(args, "mix", "ema_decay", "label_smoothing")
    check_hub_arguments(args)
    return args


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
    know_modalities(args)
    require = ("path", "Text", "modality", "finding")
    all_train, val_rows = read_splits(args.train_data, require=require, **csv_options(args))
    classes = claimed_classes(all_train, val_rows, args.min_train, args.min_val)
    key = {c: i for i, c in enumerate(classes)}

    def known(rows):
        return [row for row in rows if (resolve_modality(row["modality"]).id, row["finding"]) in key]

    rows = known([row for row in all_train if "all" in args.part or row.get("part") in args.part])
    val_rows = known(val_rows)
    if not rows or not val_rows:
        raise ValueError(
            f"{args.train_data} has {len(rows)} train rows of part {' '.join(args.part)} and {len(val_rows)} val rows"
            f" of findings with {args.min_train} train and {args.min_val} val images: lower --min_train or --min_val."
        )
    tell_repeats(args.train_data, image_paths(rows, args.train_data), image_paths(val_rows, args.train_data))
    # A little larger than what the classifiers see, so that zooming in finds detail.
    size = min(256, args.resolution * 5 // 4 // 8 * 8)
    images = load_images(rows, args.train_data, size, reading=reading_of(args)).to(device)
    val_images = load_images(val_rows, args.train_data, 256, reading=reading_of(args))

    def modality_of(row):
        return resolve_modality(row["modality"])

    labels = torch.tensor([key[modality_of(row).id, row["finding"]] for row in rows], device=device)
    # The caption is not learned: only a finding with a side forbids it.
    may_mirror = mirrored(rows, args.no_mirror, said=("finding",))
    tell_mirrored(args.train_data, rows, may_mirror)
    may_mirror = torch.tensor(may_mirror, device=device)
    grey = torch.tensor([modality_of(row).grey for row in rows], device=device)

    recipe = Recipe(
        max_train_steps=args.max_train_steps,
        train_batch_size=args.train_batch_size,
        learning_rate=args.learning_rate,
        adam_weight_decay=args.adam_weight_decay,
        label_smoothing=args.label_smoothing,
        mix=args.mix,
        ema_decay=args.ema_decay,
        resolution=args.resolution,
        bf16=args.mixed_precision == "bf16",
        seed=args.seed,
    )
    models, seconds = {}, {}
    for name in args.architectures:
        torch.manual_seed(args.seed)
        start = time.monotonic()
        model = ARCHITECTURES[name](len(classes), args.width)
        model.config.id2label = {i: f"{m}: {f}" for i, (m, f) in enumerate(classes)}
        model.config.label2id = {label: i for i, label in model.config.id2label.items()}
        models[name] = train_classifier(model, images, labels, may_mirror, grey, len(classes), recipe, name)
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
        "trained_on": {"part": " ".join(args.part), "n": len(rows)},
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
        "seconds": seconds,
        "device": torch.cuda.get_device_name(0) if device.type == "cuda" else "cpu",
        "arguments": {k: v for k, v in vars(args).items() if k not in PATHS},
        "val": {name: accuracy_report(p, classes, *asked, sources=sources) for name, p in each.items()},
    }
    output = Path(args.output_dir)
    write_json(output / "report.json", report)
    push_parts(args, "train_classifier", *(output / name for name in judges.models), output / "judges.json")
    for name, figures in report["val"].items():
        print(format_report(f"{name} on val", figures))
    return report


if __name__ == "__main__":
    main()
