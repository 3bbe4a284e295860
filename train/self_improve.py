"""One round of self-improvement: from a pipeline to a better one, by way of ratings.

    candidates -> ratings -> filter head tuned -> preference training -> new pipeline -> before against after

    python train/self_improve.py --pretrained_model_name_or_path runs/model --output_dir runs/round-1 --data data.csv

draws images into `runs/round-1/candidates`, and stops there for people to rate them:

    python space/app.py --images runs/round-1/candidates --store runs/round-1/ratings.sqlite
    minim ratings --store runs/round-1/ratings.sqlite --images runs/round-1/candidates --output given.csv

Run again with `--ratings given.csv`, it goes on to `runs/round-1/pipeline` and `report.json`. Where no rater is at
hand, `--stand_in` names the folder of a stand-in (stand_in.py), which is called so wherever its figures appear.

Killed at any point and started again with the same arguments, a round goes on where it was. Of the ratings those of
this round's candidates are taken, each once; what a file holds of other rounds is left alone.
"""

import argparse
import json
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from transformers import HfArgumentParser

from minim_pipeline import EMBEDDED_CHECKPOINT, MinimPipeline, resolve_modality
from minim_pipeline.data.image_loading import load_images
from minim_pipeline.data.image_reader import Reading
from minim_pipeline.data.sources import read_csv, resolve_path
from minim_pipeline.disk import whole_folder
from minim_pipeline.evaluation.comparison import ComparisonOptions, compare, summary
from minim_pipeline.evaluation.sampling import draw_latents
from minim_pipeline.evaluation.stand_in import RATER, StandIn
from minim_pipeline.files import write_csv, write_json
from minim_pipeline.finite import check_weights
from minim_pipeline.generate.options import GenerateOptions
from minim_pipeline.generate.plan import plan_file
from minim_pipeline.generate.write import generate
from minim_pipeline.loading import model_identity, register_modalities
from minim_pipeline.locking import locked
from minim_pipeline.minim_filter.funnel import combine
from minim_pipeline.minim_filter.selection import Thresholds
from minim_pipeline.ratings import image_digest
from minim_pipeline.training.arguments import check_numbers
from minim_pipeline.training.captions import load_captions
from minim_pipeline.training.config import Config, parse
from minim_pipeline.training.filter.raters import read_ratings
from minim_pipeline.training.filter.thresholds import threshold
from minim_pipeline.training.filter.tune import TuningOptions, tune
from minim_pipeline.training.hub import add_hub_arguments, check_hub_arguments, push_pipeline
from minim_pipeline.training.preference.config import PreferenceConfig
from minim_pipeline.training.preference.rewards import rate
from minim_pipeline.training.preference.trainer import train


# What may differ when a round goes on: where ratings come from, how it is run, and what it is judged by.
MAY_CHANGE = {
    *("output_dir", "ratings", "stand_in", "batch_size", "num_processes", "push_to_hub", "hub_model_id"),
    # Of the comparison, whose images are kept by what they are of.
    *("data", "judges", "images_per_finding", "pairs", "comparison_seed", "skip_memorisation"),
}


def parse_args(argv=None) -> argparse.Namespace:
    parser = HfArgumentParser(
        [ComparisonOptions, TuningOptions],
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        conflict_handler="resolve",
    )
    parser.set_defaults(batch_size=128)
    add = parser.add_argument
    add("--pretrained_model_name_or_path", default=str(EMBEDDED_CHECKPOINT), help="A pipeline with a filter head.")
    add("--output_dir", required=True, help="Of this round.")
    add("--prompts", help="CSV with Text,modality,finding; default: all phrasings of what the pipeline has learned.")
    add("--candidates", type=int, default=2, help="Images of each prompt that are rated.")
    add("--ratings", help="CSV of ratings of the candidates, as `minim ratings` writes it.")
    add("--preference", default="", help="Arguments of train_preference.py as one: '--max_train_minutes 4'.")
    add("--num_processes", type=int, default=1, help="Of preference training, a GPU each, through accelerate.")
    add("--acceptance", type=float, default=0.7, help="Share of generated images that the new thresholds accept.")
    add("--calibration_images", type=int, default=200, help="Of each modality, to set the thresholds by.")
    add("--seed", type=int, default=0, help="Another one for every round: no image is to be drawn twice.")
    add_hub_arguments(parser)
    args = parser.parse_args(argv)
    options_of(args, TuningOptions)  # raises for what they cannot be
    check_numbers(parser, args, from_zero=("seed", "comparison_seed"))
    if not 0 < args.acceptance <= 1:
        raise ValueError(f"--acceptance has to be above 0 and at most 1, got {args.acceptance}.")
    if not 0 <= args.seed < 10**6:
        raise ValueError(f"--seed has to be from 0 to {10**6 - 1}, got {args.seed}.")
    preference = parse(PreferenceConfig, preference_arguments(args))
    given = {name: getattr(args, name) for name in ("data", "captions", "prompts", "ratings")}
    for name, path in (given | {"replay": preference.replay}).items():
        if path and not Path(path).is_file():
            raise ValueError(f"--{name} has to be a file, and {path!r} is none.")
    for name in ("judges", "stand_in", "encoder"):
        path = getattr(args, name)
        if path and not Path(path).is_dir():
            raise ValueError(f"--{name} has to be a folder, and {path!r} is none.")
    check_hub_arguments(args)
    return args


def options_of(args: argparse.Namespace, config: type[Config]) -> Config:
    """The options of one part of a round."""
    return config(**{field.name: getattr(args, field.name) for field in fields(config)})


def preference_arguments(args: argparse.Namespace) -> list[str]:
    folder = Path(args.output_dir)
    return [
        *("--pretrained_model_name_or_path", args.pretrained_model_name_or_path),
        *("--filter_head", str(folder / "head" / "filter_head")),
        *("--prompts", str(folder / "prompts.csv")),
        *("--output_dir", str(folder / "preference")),
        *("--mixed_precision", args.mixed_precision, "--seed", str(args.seed), "--encoder", args.encoder),
        "--fit",
        args.fit,
        *(["--window", *map(str, args.window)] if args.window else []),
        *shlex.split(args.preference),
    ]


def check_arguments(args: argparse.Namespace, folder: Path) -> None:
    """Raises ValueError if the folder holds a round of other arguments, or of a model that has changed since."""
    file = folder / "arguments.json"
    now = json.loads(json.dumps({k: v for k, v in vars(args).items() if k not in MAY_CHANGE}))
    now["model"] = list(model_identity(args.pretrained_model_name_or_path))
    if file.is_file():
        before = json.loads(file.read_text())
        other = [k for k in now if before.get(k) != now[k]]
        if other:
            told = "; ".join(f"{k} was {before.get(k)!r}, now {now[k]!r}" for k in other)
            raise ValueError(f"{folder} holds a round of other arguments: {told}. Choose another --output_dir.")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, now)


def check_taken(args: argparse.Namespace, folder: Path) -> None:
    """Raises ValueError if the round has taken its ratings already, and others are given now."""
    if args.ratings and (folder / "ratings.csv").is_file():
        taken = json.loads((folder / "taken.json").read_text())["ratings"]
        if taken != image_digest(args.ratings):
            whose = "another file" if taken else "the stand-in"
            raise ValueError(
                f"{folder} has taken its ratings from {whose} already, not from {args.ratings}: begin another round."
            )


def write_prompts(args: argparse.Namespace, folder: Path) -> None:
    """`prompts.csv`: the given ones, or all training phrasings of the findings that the pipeline has learned."""
    index = register_modalities(args.pretrained_model_name_or_path)
    if args.prompts:

        def check(row: dict) -> None:
            resolve_modality(row["modality"], index.get("modalities"))

        require = ("Text", "modality", "finding")
        rows = read_csv(args.prompts, require=require, check_images=False, check=check)
        rows = [{name: row[name] for name in require} for row in rows]
    else:
        captions = load_captions(args.captions)
        rows = [
            {"Text": text, "modality": modality, "finding": finding}
            for modality, findings in (index.get("findings") or {}).items()
            for finding in findings
            for text in captions.get(modality, {}).get(finding, {}).get("train", [])
        ]
    if not rows:
        raise ValueError("There are no prompts to draw for: give a CSV with --prompts.")
    write_csv(folder / "prompts.csv", rows)


def draw_candidates(args: argparse.Namespace, folder: Path) -> None:
    """`candidates/`: PNGs and data.csv, as `minim generate` writes them and the rating page takes them."""
    first = (args.seed + 1) * 10**9
    items = plan_file(folder / "prompts.csv", args.candidates, first)
    dtype = "bfloat16" if args.mixed_precision == "bf16" else "float32"
    model = str(args.pretrained_model_name_or_path)
    drawing = GenerateOptions(model=model, dtype=dtype, batch_size=args.batch_size, no_filter=True)
    generate(items, folder / "candidates", drawing)


def take_ratings(args: argparse.Namespace, folder: Path) -> None:
    """`ratings.csv`: each rating of a candidate once, by people or by the stand-in.

    Raises:
        ValueError: the file of ratings holds none of these candidates.
    """
    candidates = read_csv(folder / "candidates" / "data.csv", check_images=False)
    if args.ratings:
        rows, left = match_ratings(args.ratings, candidates, folder)
        if not rows:
            raise ValueError(f"{args.ratings}: none of {left} ratings is of an image in {folder / 'candidates'}.")
        print(f"{len(rows)} ratings taken; {left} of other images, or given twice, are left alone")
    else:
        rater = StandIn.from_pretrained(args.stand_in, "cuda" if torch.cuda.is_available() else "cpu")
        named = [row | {"modality": resolve_modality(row["modality"]).id} for row in candidates]
        named = [row for row in named if (row["modality"], row["finding"]) in rater.findings.classes]
        if not named:
            raise ValueError(f"The stand-in in {args.stand_in} has learned none of the findings in prompts.csv.")
        source = folder / "candidates" / "data.csv"
        reading = Reading(args.fit, tuple(args.window) if args.window else None)
        images = load_images(named, source, image_side(args), trim=False, reading=reading)
        given = rater.rate(images, [row["modality"] for row in named], [row["finding"] for row in named])
        rows = [row | {"rating": rating, "rater": RATER} for row, rating in zip(named, given, strict=True)]
        rows = [row | {"path": f"candidates/{row['path']}"} for row in rows]
    columns = ("path", "Text", "modality", "finding", "rating", "rater", "seed")
    write_json(folder / "taken.json", {"ratings": image_digest(args.ratings) if args.ratings else None})
    write_csv(folder / "ratings.csv", [{name: row[name] for name in columns} for row in rows])


def match_ratings(path: str, candidates: list[dict], folder: Path) -> tuple[list[dict], int]:
    """Ratings of the candidates, and how many are not taken.

    A picture is known by its content, of which the rating page notes a digest: every round has a 0000.png. Where there
    is no digest, it is known by its place.
    """
    places = {(folder / "candidates" / row["path"]).resolve(): row for row in candidates}
    digests = {image_digest(place): row for place, row in places.items()}
    found, rows = {}, read_ratings(path, check_images=False)
    for row in sorted(rows, key=lambda row: row.get("time") or ""):
        place = Path(resolve_path(row, path)).resolve()
        candidate = digests.get(row["digest"]) if row.get("digest") else places.get(place)
        if candidate is not None:
            # Of one and the same rating the later word counts.
            key = (row["rater"], candidate["path"], row.get("turn") or "0")
            found[key] = candidate | {"rating": row["rating"], "rater": row["rater"]}
            found[key] |= {"path": f"candidates/{candidate['path']}"}
    return list(found.values()), len(rows) - len(found)


def image_side(args: argparse.Namespace) -> int:
    pipe = MinimPipeline.from_pretrained(args.pretrained_model_name_or_path, text_encoder=None, filter_head=None)
    return pipe.unet.config.sample_size * pipe.vae_scale_factor


def load_for_drawing(args: argparse.Namespace, model: str | Path, device) -> MinimPipeline:
    dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
    pipe = MinimPipeline.from_pretrained(model, dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tune_head(args: argparse.Namespace, folder: Path) -> None:
    """`head/`: the filter head, trained on with the ratings.

    It learns from latents: their seeds draw them again. What is read back from a picture has been through the
    autoencoder twice, and is rated lower.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = read_ratings(folder / "ratings.csv")
    first = {row["path"]: row for row in rows}
    pipe = load_for_drawing(args, args.pretrained_model_name_or_path, device)
    drawn = draw_latents(
        pipe,
        [row["Text"] for row in first.values()],
        [row["modality"] for row in first.values()],
        [int(row["seed"]) for row in first.values()],
        args.batch_size,
    )
    place = {path: i for i, path in enumerate(first)}
    latents = drawn[torch.tensor([place[row["path"]] for row in rows])]
    pipe = MinimPipeline.from_pretrained(args.pretrained_model_name_or_path).to(device)
    head, report = tune(pipe, rows, latents, options_of(args, TuningOptions))
    save_whole(folder / "head", head.half(), "filter_head", report)


def save_whole(folder: Path, model, name: str, report: dict) -> None:
    """Writes `model`, if it is finite, into `folder/name` and `report.json` beside it: all of it, or nothing."""
    check_weights(model)
    with whole_folder(folder) as unfinished:
        model.save_pretrained(unfinished / name if name else unfinished)
        write_json(unfinished / "report.json", report)


def train_on_preferences(args: argparse.Namespace, folder: Path) -> None:
    """`preference/`: the U-Net, trained on the head's reward."""
    call = preference_arguments(args)
    if args.num_processes == 1:
        train(parse(PreferenceConfig, call))
    else:
        launch = ("-m", "accelerate.commands.launch", "--num_processes", str(args.num_processes))
        kind = "--multi_gpu" if torch.cuda.is_available() else "--cpu"
        script = str(Path(__file__).with_name("train_preference.py"))
        launched = subprocess.Popen([sys.executable, *launch, kind, script, *call])
        # Else the processes would go on when this one is ended; they write a checkpoint.
        before = signal.signal(signal.SIGTERM, lambda *_: launched.terminate())
        try:
            code = launched.wait()
        finally:
            signal.signal(signal.SIGTERM, before)
        if code:
            raise SystemExit(code if code > 0 else 128 - code)


def write_pipeline(args: argparse.Namespace, folder: Path) -> None:
    """`pipeline/`: the new U-Net and head, with thresholds that accept as large a share of its images as before."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipe = load_for_drawing(args, folder / "preference" / "pipeline", device)
    prompts = read_csv(folder / "prompts.csv", check_images=False, require=("Text", "modality", "finding"))
    people: Counter[str] = Counter()
    if json.loads((folder / "head" / "report.json").read_text())["taken"]:
        rated = [row for row in read_ratings(folder / "ratings.csv") if row["rater"] != RATER]
        images = {row["path"]: resolve_modality(row["modality"]).id for row in rated}
        people.update(images.values())
    thresholds = Thresholds.read(pipe.filter_head.config.calibration)
    figures = {}
    for name in dict.fromkeys(resolve_modality(row["modality"]).id for row in prompts):
        mine = spread_over([row for row in prompts if resolve_modality(row["modality"]).id == name])
        asked = [mine[i % len(mine)]["Text"] for i in range(args.calibration_images)]
        seeds = [(args.seed + 1) * 10**9 + 5 * 10**8 + i for i in range(len(asked))]
        latents = draw_latents(pipe, asked, [name] * len(asked), seeds, args.batch_size)
        rated = rate(pipe, latents, asked, [name] * len(asked))
        score, finding = combine(rated.quality, rated.finding).cpu(), rated.finding.cpu()
        before = thresholds.get(name, Thresholds())
        floor = before.finding
        least = min(threshold(score, finding, floor, args.acceptance), pipe.filter_head.config.enough[1])
        accepted = ((score >= least) & (finding >= floor)).double().mean().item()
        thresholds[name] = replace(before, score=round(least, 4), ratings=before.ratings + people[name])
        figures[name] = {"threshold": round(least, 4), "accepted": round(accepted, 4), "n": len(asked)}
    made = MinimPipeline.from_pretrained(folder / "preference" / "pipeline")
    made.filter_head.register_to_config(calibration={name: asdict(found) for name, found in thresholds.items()})
    save_whole(folder / "pipeline", made, "", figures)
    (folder / "pipeline" / "report.json").replace(folder / "thresholds.json")


def spread_over(prompts: list[dict]) -> list[dict]:
    """Prompts of one modality with the findings in turn."""
    queues = {f: [p for p in prompts if p["finding"] == f] for f in dict.fromkeys(p["finding"] for p in prompts)}
    most = max(map(len, queues.values()))
    return [queue[turn % len(queue)] for turn in range(most) for queue in queues.values()]


def evaluate(args: argparse.Namespace, folder: Path) -> None:
    """`comparison/report.json`: before against after."""
    options = options_of(args, ComparisonOptions)
    compare(options, str(args.pretrained_model_name_or_path), str(folder / "pipeline"), folder / "comparison")


# In order: what a stage is, and the file that is there, whole, once it is done.
STAGES: list[tuple[str, Callable, str]] = [
    ("prompts", write_prompts, "prompts.csv"),
    ("candidates", draw_candidates, "candidates/grid.png"),
    ("ratings", take_ratings, "ratings.csv"),
    ("head", tune_head, "head/report.json"),
    ("preference", train_on_preferences, "preference/pipeline/model_index.json"),
    ("pipeline", write_pipeline, "thresholds.json"),
    ("comparison", evaluate, "comparison/report.json"),
]


def write_report(folder: Path, minutes: dict[str, float]) -> dict:
    """`report.json`: the figures of all stages."""

    def read(name: str) -> dict | None:
        return json.loads((folder / name).read_text()) if (folder / name).is_file() else None

    ratings = read_csv(folder / "ratings.csv", check_images=False)
    log = [json.loads(line) for line in (folder / "preference" / "log.jsonl").read_text().splitlines()]
    arguments = read("arguments.json")
    report = {
        "model": arguments.pop("model"),
        "seed": arguments["seed"],
        "minutes": minutes | {"all": round(sum(minutes.values()), 2)},
        "ratings": {
            "raters": dict(Counter(row["rater"] for row in ratings)),
            "given": {str(k): sum(row["rating"] == str(k) for row in ratings) for k in (1, 2, 3)},
        },
        "head": read("head/report.json"),
        "preference": {
            "best": next(record for record in reversed(log) if record["kind"] == "best"),
            "looks": [record for record in log if record["kind"] == "val"],
            "arguments": arguments["preference"],
        },
        "thresholds": read("thresholds.json"),
        "comparison": read("comparison/report.json"),
    }
    write_json(folder / "report.json", report)
    return report


def main(argv=None) -> dict:
    args = parse_args(argv)
    with locked(args.output_dir):
        return improve(args)


def improve(args: argparse.Namespace) -> dict:
    """Runs the stages of a round that `--output_dir` lacks, and returns the report."""
    folder = Path(args.output_dir)
    index = register_modalities(args.pretrained_model_name_or_path)
    if (index.get("filter_head") or [None])[0] is None:
        raise ValueError(f"{args.pretrained_model_name_or_path} has no filter head: train_filter.py makes one.")
    check_arguments(args, folder)
    check_taken(args, folder)
    file = folder / "minutes.json"
    minutes = json.loads(file.read_text()) if file.is_file() else {}
    for name, stage, made in STAGES:
        if (folder / made).is_file() or (name == "comparison" and not args.data):
            continue
        if name == "ratings" and not (args.ratings or args.stand_in):
            images, store = folder / "candidates", folder / "ratings.sqlite"
            print(
                f"Now {images} has to be rated, 1 to 3. On a page in the browser, and from there into a CSV:\n"
                f"    python space/app.py --images {images} --store {store}\n"
                f"    minim ratings --store {store} --images {images} --output {folder / 'given.csv'}\n"
                "Then run this again with --ratings; or with --stand_in, where nobody is at hand."
            )
            return {"waiting for": "ratings"}
        print(f"round: {name}")
        begun = time.monotonic()
        try:
            stage(args, folder)
        finally:  # what is stopped and goes on has taken both times, unless it was killed outright
            minutes[name] = round(minutes.get(name, 0.0) + (time.monotonic() - begun) / 60, 2)
            write_json(file, minutes)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    report = write_report(folder, minutes)
    if report["comparison"]:
        print(summary(report["comparison"]))
    if report["preference"]["best"]["at_step"] == 0:
        print("No step of preference training was better than none: the U-Net is what it was.")
    print(f"The new pipeline is in {folder / 'pipeline'}, and what it is worth in {folder / 'report.json'}.")
    push_pipeline(args, folder / "pipeline")
    return report


if __name__ == "__main__":
    main()
