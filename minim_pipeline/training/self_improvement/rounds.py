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
from ...data.sources import read_csv
from ...disk import save_model
from ...evaluation.comparison import compare, summary
from ...evaluation.sampling import draw_latents
from ...evaluation.stand_in import RATER
from ...files import atomic_path, read_report, write_json, write_report
from ...loading import model_identity, register_modalities
from ...locking import locked
from ...minim_filter.funnel import combine
from ...minim_filter.selection import Thresholds
from ...ratings import image_digest
from ..filter.raters import read_ratings
from ..filter.thresholds import threshold
from ..filter.tune import tune
from ..hub import check_hub, push_pipeline
from ..log import read_log
from ..preference.rewards import rate
from ..preference.trainer import train as train_preference
from ..stages import Stages
from .config import SelfImproveConfig
from .ratings import PROMPT, draw_candidates, take_ratings, write_prompts


# What may differ when a round goes on: where ratings come from, how it is run, and what it is judged by.
MAY_CHANGE = {
    *("output_dir", "ratings", "stand_in", "batch_size", "num_processes", "push_to_hub", "hub_model_id"),
    # Of the comparison, whose images are kept by what they are of.
    *("data", "judges", "images_per_finding", "pairs", "comparison_seed", "skip_memorisation"),
}


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
    launch = ("-m", "accelerate.commands.launch", "--num_processes", str(config.num_processes))
    kind = "--multi_gpu" if torch.cuda.is_available() else "--cpu"
    module = ("--module", "minim_pipeline.training.preference", str(options))
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
    prompts = read_csv(folder / "prompts.csv", check_images=False, require=PROMPT)
    by_modality: dict[str, list[dict]] = {}
    for row in prompts:
        by_modality.setdefault(resolve_modality(row["modality"]).id, []).append(row)
    people: Counter[str] = Counter()
    if read_report(folder / "head" / "report.json")["taken"]:
        rated = [row for row in read_ratings(folder / "ratings.csv") if row["rater"] != RATER]
        images = {row["path"]: resolve_modality(row["modality"]).id for row in rated}
        people.update(images.values())
    thresholds, figures = Thresholds.read(pipe.filter_head.config.calibration), {}
    for name, rows in by_modality.items():
        before = thresholds.get(name, Thresholds())
        least, accepted = find_threshold(config, pipe, name, spread_over(rows), before.finding)
        thresholds[name] = replace(before, score=round(least, 4), ratings=before.ratings + people[name])
        figures[name] = {"threshold": round(least, 4), "accepted": accepted, "n": config.calibration_images}
    made = MinimPipeline.from_pretrained(folder / "preference" / "pipeline")
    made.filter_head.register_to_config(calibration={name: asdict(found) for name, found in thresholds.items()})
    save_model(made, folder / "pipeline")
    write_json(folder / "thresholds.json", figures)


def find_threshold(
    config: SelfImproveConfig, pipe: MinimPipeline, modality: str, prompts: list[dict], floor: float
) -> tuple[float, float]:
    """The least score of a modality's images, whose finding has to reach `floor`; and the share that is accepted."""
    count = config.calibration_images
    asked, names = [prompts[i % len(prompts)]["Text"] for i in range(count)], [modality] * count
    seeds = [config.first_seed + 5 * 10**8 + i for i in range(count)]
    rated = rate(pipe, draw_latents(pipe, asked, names, seeds, config.batch_size), asked, names)
    score, finding = combine(rated.quality, rated.finding).cpu(), rated.finding.cpu()
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
    folder = config.output
    compare(config, config.pretrained_model_name_or_path, str(folder / "pipeline"), folder / "comparison")


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


def check_taken(config: SelfImproveConfig) -> None:
    """Raises ValueError if the round has taken its ratings already, and others are given now."""
    if config.ratings and (config.output / "ratings.csv").is_file():
        taken = json.loads((config.output / "taken.json").read_text())["ratings"]
        if taken != image_digest(config.ratings):
            whose = "another file" if taken else "the stand-in"
            raise ValueError(
                f"{config.output_dir} has taken its ratings from {whose} already, not from {config.ratings}: begin"
                " another round."
            )


def write_round_report(config: SelfImproveConfig, minutes: dict[str, float]) -> dict:
    """`report.json`: the figures of all stages."""
    folder, compared = config.output, config.output / "comparison" / "report.json"
    ratings = read_csv(folder / "ratings.csv", check_images=False)
    log = read_log(folder / "preference")
    report = {
        "model": list(model_identity(config.pretrained_model_name_or_path)),
        "seed": config.seed,
        "minutes": minutes | {"all": round(sum(minutes.values()), 2)},
        "ratings": {
            "raters": dict(Counter(row["rater"] for row in ratings)),
            "given": {str(k): sum(row["rating"] == str(k) for row in ratings) for k in (1, 2, 3)},
        },
        "head": read_report(folder / "head" / "report.json"),
        "preference": {
            "best": next(record for record in reversed(log) if record["kind"] == "best"),
            "looks": [record for record in log if record["kind"] == "val"],
            "arguments": config.preference,
        },
        "thresholds": json.loads((folder / "thresholds.json").read_text()),
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
    check_taken(config)
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
