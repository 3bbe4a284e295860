"""One round of self-improvement: from a pipeline to a better one, by way of ratings.

    candidates -> ratings -> filter head tuned -> preference training -> new pipeline -> before against after

Where neither people's ratings nor a stand-in are given, it stops after the candidates, to be gone on with. Of the
ratings those of this round's candidates are taken, each once; what a file holds of other rounds is left alone.
"""

import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
import yaml

from ... import MinimPipeline, resolve_modality
from ...data.image_loading import load_images
from ...data.sources import read_dataset, resolve_path
from ...disk import save_model
from ...evaluation.comparison import compare, summary
from ...evaluation.sampling import draw_latents
from ...evaluation.stand_in import RATER, StandIn
from ...files import atomic_path, read_report, write_csv, write_json, write_report
from ...generate.options import GenerateOptions
from ...generate.plan import plan_file
from ...generate.write import generate
from ...loading import model_identity, register_modalities
from ...locking import locked
from ...minim_filter.funnel import combine
from ...minim_filter.selection import Thresholds, look_real
from ...ratings import image_digest
from ..captions import load_captions
from ..filter.candidates import threshold
from ..filter.raters import read_ratings
from ..filter.tune import tune
from ..hub import check_hub, push_pipeline
from ..log import read_log
from ..preference.rewards import rate
from ..preference.trainer import train as train_preference
from ..stages import Stages
from .config import SelfImproveConfig


# What may differ when a round goes on: where ratings come from, how it is run, and what it is judged by.
MAY_CHANGE = {
    *("output_dir", "ratings", "stand_in", "batch_size", "num_processes", "push_to_hub", "hub_model_id"),
    # Of the comparison, whose images are kept by what they are of.
    *("data", "judges", "images_per_finding", "pairs", "comparison_seed", "skip_memorisation"),
}
PROMPT = ("Text", "modality", "finding")  # columns of prompts


def write_prompts(config: SelfImproveConfig) -> None:
    """`prompts.csv`: the given ones, or all training phrasings of the findings that the pipeline has learned."""
    index = register_modalities(config.pretrained_model_name_or_path)
    if config.prompts:

        def check(row: dict) -> None:
            resolve_modality(row["modality"], index.get("modalities"))

        rows = read_dataset(config.prompts, require=PROMPT, check_images=False, check=check)
        rows = [{name: row[name] for name in PROMPT} for row in rows]
    else:
        captions = load_captions(config.captions)
        rows = [
            {"Text": text, "modality": modality, "finding": finding}
            for modality, findings in (index.get("findings") or {}).items()
            for finding in findings
            for text in captions.get(modality, {}).get(finding, {}).get("train", [])
        ]
    if not rows:
        raise ValueError("There are no prompts to draw for: give a CSV with --prompts.")
    write_csv(config.output / "prompts.csv", rows)


def draw_candidates(config: SelfImproveConfig) -> None:
    """`candidates/`: PNGs and data.csv, as `minim generate` writes them and the rating page takes them."""
    items = plan_file(config.output / "prompts.csv", config.candidates, config.first_seed)
    dtype = str(config.dtype).removeprefix("torch.")
    model = config.pretrained_model_name_or_path
    drawing = GenerateOptions(model=model, dtype=dtype, batch_size=config.batch_size, no_filter=True)
    generate(items, config.output / "candidates", drawing)


def take_ratings(config: SelfImproveConfig) -> None:
    """`ratings.csv`: each rating of a candidate once, by people or by the stand-in.

    Raises:
        ValueError: none of the ratings is of a candidate, or the stand-in knows none of their findings.
    """
    rows = match_ratings(config, config.ratings) if config.ratings else rate_by_stand_in(config, str(config.stand_in))
    columns = ("path", *PROMPT, "rating", "rater", "seed")
    write_json(config.output / "taken.json", {"ratings": image_digest(config.ratings) if config.ratings else None})
    rows = [{name: row[name] for name in columns} | {"path": f"candidates/{row['path']}"} for row in rows]
    write_csv(config.output / "ratings.csv", rows)


def match_ratings(config: SelfImproveConfig, ratings: str) -> list[dict]:
    """The candidates that people rated, once for each rating.

    A picture is known by its content, of which the rating page notes a digest: every round has a 0000.png. Where there
    is no digest, it is known by its place.
    """
    folder = config.output / "candidates"
    candidates = read_dataset(folder / "data.csv", check_images=False)
    places = {(folder / row["path"]).resolve(): row for row in candidates}
    digests = {image_digest(place): row for place, row in places.items()}
    found, rows = {}, read_ratings(ratings, check_images=False)
    for row in sorted(rows, key=lambda row: row.get("time") or ""):
        place = Path(resolve_path(row, ratings)).resolve()
        candidate = digests.get(row["digest"]) if row.get("digest") else places.get(place)
        if candidate is not None:
            # Of one and the same rating the later word counts.
            key = (row["rater"], candidate["path"], row.get("turn") or "0")
            found[key] = candidate | {"rating": row["rating"], "rater": row["rater"]}
    left = len(rows) - len(found)
    if not found:
        raise ValueError(f"{ratings}: none of {left} ratings is of an image in {folder}.")
    print(f"{len(found)} ratings taken; {left} of other images, or given twice, are left alone")
    return list(found.values())


def rate_by_stand_in(config: SelfImproveConfig, stand_in: str) -> list[dict]:
    """The candidates of findings that the stand-in has learned, with its ratings."""
    rater = StandIn.from_pretrained(stand_in, "cuda" if torch.cuda.is_available() else "cpu")
    source = config.output / "candidates" / "data.csv"
    rows = read_dataset(source, check_images=False)
    rows = [row | {"modality": resolve_modality(row["modality"]).id} for row in rows]
    rows = [row for row in rows if (row["modality"], row["finding"]) in rater.findings.classes]
    if not rows:
        raise ValueError(f"The stand-in in {stand_in} has learned none of the findings in prompts.csv.")
    model = config.pretrained_model_name_or_path
    pipe = MinimPipeline.from_pretrained(model, text_encoder=None, filter_head=None)
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    images = load_images(rows, source, size, trim=False, reading=config.reading_elsewhere())
    ratings = rater.rate(images, [row["modality"] for row in rows], [row["finding"] for row in rows])
    return [row | {"rating": rating, "rater": RATER} for row, rating in zip(rows, ratings, strict=True)]


def load_for_drawing(model: str | Path, dtype: torch.dtype) -> MinimPipeline:
    pipe = MinimPipeline.from_pretrained(model, dtype=dtype).to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tune_head(config: SelfImproveConfig) -> None:
    """`head/`: the filter head, trained on with the ratings.

    It learns from latents: their seeds draw them again. What is read back from a picture has been through the
    autoencoder twice, and is rated lower.
    """
    rows = read_ratings(config.output / "ratings.csv")
    first = {row["path"]: row for row in rows}
    pipe = load_for_drawing(config.pretrained_model_name_or_path, config.dtype)
    texts, modalities, seeds = ([row[name] for row in first.values()] for name in ("Text", "modality", "seed"))
    drawn = draw_latents(pipe, texts, modalities, [*map(int, seeds)], config.batch_size)
    place = {path: i for i, path in enumerate(first)}
    latents = drawn[torch.tensor([place[row["path"]] for row in rows])]
    pipe = MinimPipeline.from_pretrained(config.pretrained_model_name_or_path).to(pipe.device)
    head, report = tune(pipe, rows, latents, config)
    save_model(head.half(), config.output / "head" / "filter_head")
    write_report(config.output / "head" / "report.json", report)


def train_on_preferences(config: SelfImproveConfig) -> None:
    """`preference/`: the U-Net, trained on the head's reward."""
    if config.num_processes == 1:
        train_preference(config.preference_config)
        return
    options = config.output / "preference.yaml"
    with atomic_path(options) as temporary:
        temporary.write_text(yaml.safe_dump(asdict(config.preference_config)))
    launch = f"-m accelerate.commands.launch --num_processes {config.num_processes}".split()
    kind = "--multi_gpu" if torch.cuda.is_available() else "--cpu"
    module = ("--module", "minim_pipeline.training.preference.trainer", str(options))
    launched = subprocess.Popen([sys.executable, *launch, kind, *module])
    # Else the processes would go on when this one is ended; they write a checkpoint.
    before = signal.signal(signal.SIGTERM, lambda *_: launched.terminate())
    try:
        code = launched.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
    if code:
        raise SystemExit(code if code > 0 else 128 - code)


def write_pipeline(config: SelfImproveConfig) -> None:
    """`pipeline/`: the new U-Net and head, with thresholds that accept as large a share of its images as before."""
    folder = config.output
    pipe = load_for_drawing(folder / "preference" / "pipeline", config.dtype)
    by_modality: dict[str, list[dict]] = {}
    for row in read_dataset(folder / "prompts.csv", check_images=False, require=PROMPT):
        by_modality.setdefault(resolve_modality(row["modality"]).id, []).append(row)
    people: Counter[str] = Counter()
    if read_report(folder / "head" / "report.json")["taken"]:
        rated = [row for row in read_ratings(folder / "ratings.csv") if row["rater"] != RATER]
        people.update({row["path"]: resolve_modality(row["modality"]).id for row in rated}.values())
    thresholds, figures = Thresholds.read(pipe.filter_head.config.calibration), {}
    for name, rows in by_modality.items():
        before = thresholds.get(name, Thresholds())
        least, accepted = find_threshold(config, pipe, name, spread_over(rows), before)
        thresholds[name] = replace(before, score=round(least, 4), ratings=before.ratings + people[name])
        figures[name] = {"threshold": round(least, 4), "accepted": accepted, "n": config.calibration_images}
    made = MinimPipeline.from_pretrained(folder / "preference" / "pipeline")
    made.filter_head.register_to_config(calibration={name: found.entry() for name, found in thresholds.items()})
    save_model(made, folder / "pipeline")
    write_json(folder / "thresholds.json", figures)


def find_threshold(
    config: SelfImproveConfig, pipe: MinimPipeline, modality: str, prompts: list[dict], before: Thresholds
) -> tuple[float, float]:
    """The least score of a modality's images, and the share of them that is accepted.

    Finding and realism have to reach what they had to `before`.
    """
    count = config.calibration_images
    asked, names = [prompts[i % len(prompts)]["Text"] for i in range(count)], [modality] * count
    seeds = [config.first_seed + 5 * 10**8 + i for i in range(count)]
    rated = rate(pipe, draw_latents(pipe, asked, names, seeds, config.batch_size), asked, names)
    score, floor = combine(rated.quality, rated.finding).cpu(), before.finding
    finding = rated.finding.masked_fill(~look_real(rated, [before] * count), 0).cpu()  # no score saves those
    least = min(threshold(score, finding, floor, config.acceptance), pipe.filter_head.config.enough[1])
    accepted = ((score >= least) & (finding >= floor)).double().mean().item()
    return least, round(accepted, 4)


def spread_over(prompts: list[dict]) -> list[dict]:
    """Prompts of one modality with the findings in turn."""
    queues = {f: [p for p in prompts if p["finding"] == f] for f in dict.fromkeys(p["finding"] for p in prompts)}
    most = max(map(len, queues.values()))
    return [queue[turn % len(queue)] for turn in range(most) for queue in queues.values()]


def evaluate(config: SelfImproveConfig) -> None:
    """`comparison/report.json`: before against after."""
    before, after = config.pretrained_model_name_or_path, str(config.output / "pipeline")
    compare(config, before, after, config.output / "comparison")


# In this order; the comparison only where there is --data.
STAGES: dict[str, Callable[[SelfImproveConfig], None]] = {
    "prompts": write_prompts,
    "candidates": draw_candidates,
    "ratings": take_ratings,
    "head": tune_head,
    "preference": train_on_preferences,
    "pipeline": write_pipeline,
    "comparison": evaluate,
}


def write_round_report(config: SelfImproveConfig, minutes: dict[str, float]) -> dict:
    """`report.json`: the figures of all stages."""

    compared = config.output / "comparison" / "report.json"
    ratings = read_dataset(config.output / "ratings.csv", check_images=False)
    log = read_log(config.output / "preference")
    report = {
        "model": list(model_identity(config.pretrained_model_name_or_path)),
        "seed": config.seed,
        "minutes": minutes | {"all": round(sum(minutes.values()), 2)},
        "ratings": {
            "raters": dict(Counter(row["rater"] for row in ratings)),
            "given": {str(k): sum(row["rating"] == str(k) for row in ratings) for k in (1, 2, 3)},
        },
        "head": read_report(config.output / "head" / "report.json"),
        "preference": {
            "best": next(record for record in reversed(log) if record["kind"] == "best"),
            "looks": [record for record in log if record["kind"] == "val"],
            "arguments": config.preference,
        },
        "thresholds": json.loads((config.output / "thresholds.json").read_text()),
        "comparison": read_report(compared) if compared.is_file() else None,
    }
    write_report(config.output / "report.json", report)
    return report


def train(config: SelfImproveConfig) -> dict:
    """Runs the stages of a round that `--output_dir` lacks, and returns the report, or that ratings are waited for.

    Raises:
        ValueError: the pipeline has no filter head; the folder holds another round, or one that is still going on; or
            prompts or ratings are of no use.
    """
    check_hub(config)
    with locked(config.output):
        return improve(config)


def improve(config: SelfImproveConfig) -> dict:
    folder, model = config.output, config.pretrained_model_name_or_path
    index = register_modalities(model)
    if (index.get("filter_head") or [None])[0] is None:
        raise ValueError(f"{model} has no filter head: train_filter.py makes one.")
    stages = Stages(config, MAY_CHANGE)
    stages.require("model", list(model_identity(model)), f"{model} has changed")
    if config.ratings and (folder / "ratings.csv").is_file():
        taken = json.loads((folder / "taken.json").read_text())["ratings"]
        if taken != image_digest(config.ratings):
            whose = f"{'another file' if taken else 'the stand-in'} already, not from {config.ratings}"
            raise ValueError(f"{config.output_dir} has taken its ratings from {whose}: begin another round.")
    for name, stage in STAGES.items():
        if name == "comparison" and not config.data:
            continue
        if name == "ratings" and name not in stages.minutes and not (config.ratings or config.stand_in):
            images, store = folder / "candidates", folder / "ratings.sqlite"
            print(
                f"Now {images} has to be rated, 1 to 3. On a page in the browser, and from there into a CSV:\n"
                f"    python space/app.py --images {images} --store {store}\n"
                f"    minim ratings --store {store} --images {images} --output {folder / 'given.csv'}\n"
                "Then run this again with --ratings; or with --stand_in, where nobody is at hand."
            )
            return {"waiting_for": "ratings"}
        stages.run(name, stage, config)
    report = write_round_report(config, stages.minutes)
    if report["comparison"]:
        print(summary(report["comparison"]))
    if report["preference"]["best"]["at_step"] == 0:
        print("No step of preference training was better than none: the U-Net is what it was.")
    print(f"The new pipeline is in {folder / 'pipeline'}, and what it is worth in {folder / 'report.json'}.")
    push_pipeline(config, folder / "pipeline")
    return report
