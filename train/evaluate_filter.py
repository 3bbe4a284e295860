"""What the filter is worth: images with it and without it on the same seeds, read by judges that it never met.

For every finding that the judges know, --images_per_finding images with --candidates candidates each are drawn to the
end, once; from the ratings along the way follows what each way of choosing gives back:

- off: the first candidate;
- filter: the funnel of the head's config, and at the end the best of what is left, accepted ones first;
- best rated: the same, without the limit `enough` from which on more does not count;
- filter, best rated at the end: both, but no candidate is dropped on the way;
- CFG-Rejection (arXiv 2505.23343), high and low: candidates are kept by the accumulated difference between the
  predictions with and without the prompt, at the same steps and the same cost, and no head is needed.

Reported are wrong findings as read by the judges of part B, diversity (MS-SSIM among images of a prompt, recall of
val images), cost, what the filter rejects of pictures that it should reject, and how often it rejects good ones.

    python train/evaluate_filter.py --model runs/model --data data.csv --output_dir docs/filter
"""

import argparse
import json
import platform
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from minim_pipeline import EMBEDDED_CHECKPOINT, EMBEDDED_ENCODER, MinimPipeline, resolve_modality
from minim_pipeline.data.image_loading import load_images
from minim_pipeline.data.image_reader import add_reading_arguments, reading_of
from minim_pipeline.data.splits import read_split
from minim_pipeline.evaluation.agreement import weighted_kappa
from minim_pipeline.evaluation.comparison import JUDGES, diversity
from minim_pipeline.evaluation.encoder import ImageTextEncoder
from minim_pipeline.evaluation.judges import class_of, load_judges, read
from minim_pipeline.evaluation.metrics import bootstrap_interval
from minim_pipeline.evaluation.planned import plan
from minim_pipeline.minim_filter import FilterHeadOutput
from minim_pipeline.minim_filter.funnel import plan_stages
from minim_pipeline.training.arguments import check_numbers
from minim_pipeline.training.captions import CAPTIONS
from minim_pipeline.training.filter.candidates import Candidates, draw_candidates, follow
from minim_pipeline.training.filter.raters import learned_from, read_ratings
from minim_pipeline.training.filter.report import other_findings, quality_report, rate


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(EMBEDDED_CHECKPOINT), help="A pipeline with a filter head.")
    parser.add_argument("--judges", default=JUDGES, help="Of train_classifier.py.")
    parser.add_argument("--encoder", default=str(EMBEDDED_ENCODER), help="Whose features recall is measured in.")
    parser.add_argument("--data", required=True, help="CSV with path,Text,modality,finding[,split].")
    parser.add_argument("--captions", default=str(CAPTIONS))
    parser.add_argument("--ratings", help="CSV of people's grades, as train_filter.py takes them.")
    parser.add_argument("--ratings_part", default="A", help="Part whose grades the head has learned from.")
    parser.add_argument("--output_dir", required=True, help="For report.json and sheet.png.")
    add_reading_arguments(parser)
    parser.add_argument("--images_per_finding", type=int, default=64)
    parser.add_argument("--candidates", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=400, help="Pairs of images of a prompt, for MS-SSIM.")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    check_numbers(parser, args)
    return args


def judged(pipe: MinimPipeline, drawn: Candidates, modalities: list[str]) -> tuple[torch.Tensor, list[str | None]]:
    """Whether the pipeline accepts each finished candidate, bool [N], and if not, why not."""
    device = pipe.filter_head.device
    quality, finding = drawn.quality[:, -1].to(device), drawn.finding[:, -1].to(device)
    finished = FilterHeadOutput(quality, finding, None, None, None, drawn.code.to(device))
    _, accepted, reasons = pipe.judge(finished, [resolve_modality(name) for name in modalities])
    return accepted.cpu(), reasons


def choices(drawn: Candidates, accepted: torch.Tensor, head, candidates: int) -> dict[str, dict]:
    """By the name of a way to choose: `index` [M] of the candidate that comes back, and `samples` of the U-Net."""
    guided = (drawn.guidance > 0).any(0)
    score, every = (values.view(-1, candidates, values.shape[1]).clone() for values in (drawn.rank(head), drawn.score))
    for values in (score, every):
        values[:, :, -1] += 4 * accepted.view(-1, candidates)  # at the end accepted ones go first
    sums = drawn.guidance_sum.view_as(score)
    plans = plan_stages(head.config.stages, candidates)
    ways = {"filter": (score, plans), "filter at the end": (score, [])}
    ways |= {"best rated": (every, plans), "best rated at the end": (every, [])}
    ways |= {"CFG-Rejection, high": (sums, plans), "CFG-Rejection, low": (-sums, plans)}
    plain = int(guided.sum()) + len(guided)
    made = {"off": {"index": torch.zeros(len(score), dtype=torch.long), "samples": plain}}
    for name, (values, mine) in ways.items():
        index, samples = follow(values, drawn.levels, guided, mine)
        made[name] = {"index": index, "samples": samples}
    return made


def wrong_findings(said: torch.Tensor, classes, planned: list[dict], merge: bool = False) -> torch.Tensor:
    """Whether judges find something else than what was asked for, within the modality: bool [N]."""
    wrong = torch.zeros(len(planned), dtype=torch.bool)
    for modality in dict.fromkeys(p["modality"] for p in planned):
        mine = [i for i, p in enumerate(planned) if p["modality"] == modality]
        wrong[mine] = torch.from_numpy(
            ~read(said[mine], classes, modality, [planned[i]["finding"] for i in mine], merge)
        )
    return wrong


def removed(off: torch.Tensor, on: torch.Tensor) -> float:
    """Share of the wrong images without a filter that are right with it, less those that it made wrong."""
    return 1 - (on.double().mean() / off.double().mean().clamp(min=1e-9)).item()


def compare(off: torch.Tensor, on: torch.Tensor) -> dict:
    """Wrong findings, bool [M] each, of the same slots; `None` for what too few of them tell nothing of."""
    figures = {"wrong": round(on.double().mean().item(), 4), "removed": None, "interval": None}
    if off.any():
        figures["removed"] = round(removed(off, on), 4)
    # Of fewer a half may hold none, and a share of none is no number.
    if off.sum() >= 20:
        interval = bootstrap_interval(removed, off, on, paired=True, draws=1000)
        figures["interval"] = [round(value, 4) for value in interval]
    return figures


def rejections(pipe: MinimPipeline, rows: list[dict], images: torch.Tensor, seed: int) -> dict:
    """Share of pictures that the filter rejects: of those that it should, and of real val images as they are."""
    g = torch.Generator().manual_seed(seed)
    n, texts = len(rows), [row["Text"] for row in rows]
    modalities = [class_of(row)[0] for row in rows]
    level = torch.rand(n, 1, 1, 1, generator=g).expand(n, 3, *images.shape[2:])
    names = list(dict.fromkeys(modalities))
    # Another modality's image, chosen at random, for the caption of this one.
    others = [[j for j in range(n) if modalities[j] != m] for m in names]
    other = [
        others[names.index(m)][int(torch.randint(len(others[names.index(m)]), (1,), generator=g))] for m in modalities
    ]
    wrong = other_findings(rows, seed)
    wrong_texts = [texts[j] if j >= 0 else text for j, text in zip(wrong, texts, strict=True)]
    real = images.float() / 255
    cases = {
        "noise": (torch.rand(real.shape, generator=g), texts),
        "flat": (level, texts),
        "another modality": (real[other], texts),
        "another finding's caption": (real, wrong_texts),
        "real, own caption (false rejection)": (real, texts),
    }
    report = {}
    for name, (x, captions) in cases.items():
        rejected, reasons = [], []
        for part in torch.arange(n).split(32):
            i = part.tolist()
            rated = pipe.score(x[part], [captions[j] for j in i], [modalities[j] for j in i])
            rejected += [not accepted for accepted in rated.accepted]
            reasons += [reason for reason in rated.reasons if reason]
        report[name] = {"rejected": round(sum(rejected) / n, 4), "n": n}
        report[name] |= {"reasons": {reason: reasons.count(reason) for reason in sorted(set(reasons))}}
        report[name]["modalities"] = {
            m: round(float(np.mean([r for r, k in zip(rejected, modalities, strict=True) if k == m])), 4)
            for m in names
        }
    return report


def people(pipe: MinimPipeline, rows: list[dict], images: torch.Tensor) -> dict:
    """The head's quality against people's grades of images uint8 [N, 3, H, W]: areas under ROC curves, and kappa."""
    with torch.no_grad():
        latents = torch.cat([pipe.encode_images(x.to(pipe.device) / 127.5 - 1) for x in images.split(32)])
    quality = rate(pipe.filter_head, latents)
    said, grades = quality.round().long().tolist(), [int(row["rating"]) for row in rows]
    return {"auroc": quality_report(rows, quality), "kappa": weighted_kappa(said, grades), "n": len(rows)}


def sheet(
    images: torch.Tensor, made: dict, wrong: torch.Tensor, planned: list[dict], candidates: int, path: Path
) -> None:
    """Above, without the filter; below, with it: 12 slots of each modality, evenly from those that differ."""
    rows = []
    size = 128
    for modality in dict.fromkeys(p["modality"] for p in planned):
        mine = [i for i, p in enumerate(planned) if p["modality"] == modality]
        chosen = made["filter"]["index"]
        mine = [i for i in mine if chosen[i] != 0]
        mine = [mine[int(k)] for k in np.linspace(0, len(mine) - 1, min(12, len(mine)))]
        for name in ("off", "filter"):
            row = Image.new("RGB", (12 * size, size + 6), "white")
            for place, i in enumerate(mine):
                j = i * candidates + int(made[name]["index"][i])
                picture = Image.fromarray(images[j].permute(1, 2, 0).numpy()).resize((size, size), Image.LANCZOS)
                # A bar below: green where the judges find what was asked for.
                colour = (200, 60, 50) if wrong[j] else (40, 150, 80)
                row.paste(picture, (place * size, 0))
                row.paste(Image.new("RGB", (size - 2, 4), colour), (place * size + 1, size))
            rows.append(row)
    whole = Image.new("RGB", (12 * size, sum(row.height + 4 for row in rows)), "white")
    top = 0
    for i, row in enumerate(rows):
        whole.paste(row, (0, top))
        top += row.height + (8 if i % 2 else 0)
    whole.save(path)


def main(argv=None) -> dict:
    args = parse_args(argv)
    device, bf16 = Accelerator().device, args.mixed_precision == "bf16"
    pipe = MinimPipeline.from_pretrained(args.model).to(device)
    if pipe.filter_head is None or not pipe.filter_head.config.calibration:
        raise ValueError(f"{args.model} has no calibrated filter head: see calibrate_filter.py.")
    pipe.set_progress_bar_config(disable=True)
    judges = load_judges(args.judges, device)
    encoder = ImageTextEncoder.from_pretrained(args.encoder, device)
    captions = json.loads(Path(args.captions).read_text())
    val_rows = [row for row in read_split(args.data, "val") if class_of(row) in judges.classes]
    rated_rows = (
        [row for row in read_ratings(args.ratings) if not learned_from(row, args.ratings_part)] if args.ratings else []
    )

    planned = plan(judges.classes, pipe.config.findings or {}, captions, "train", args.images_per_finding, args.seed)
    seeds = pipe.draw_seeds(
        list(range(len(planned))), args.candidates, [torch.Generator().manual_seed(p["seed"]) for p in planned]
    )
    each = [p for p in planned for _ in range(args.candidates)]
    modalities = [p["modality"] for p in each]
    drawn = draw_candidates(pipe, [p["prompt"] for p in each], modalities, seeds, args.batch_size, bf16)
    accepted, reasons = judged(pipe, drawn, modalities)
    said = judges.judge(drawn.images)
    wrong, merged = (wrong_findings(said, judges.classes, each, merge) for merge in (False, True))
    features = encoder.encode_images(drawn.images)[0].cpu()
    val_images = load_images(val_rows, args.data, drawn.images.shape[-1], reading=reading_of(args))
    val_features = encoder.encode_images(val_images)[0].cpu()
    val = {
        name: val_features[[i for i, row in enumerate(val_rows) if class_of(row)[0] == name]]
        for name in dict.fromkeys(modalities)
    }

    stages = pipe.filter_head.config.stages
    made = choices(drawn, accepted, pipe.filter_head, args.candidates)
    first = torch.arange(len(planned)) * args.candidates
    off, plain = first, made["off"]["samples"]
    ways = {}
    for name, choice in made.items():
        mine = first + choice["index"]
        ways[name] = {"cost": round(choice["samples"] / plain, 3), "samples": choice["samples"]}
        ways[name] |= compare(wrong[off], wrong[mine])
        ways[name]["merged look-alikes"] = compare(merged[off], merged[mine])
        ways[name]["accepted"] = round(accepted[mine].double().mean().item(), 4)
        ways[name]["mean score"] = round(drawn.score[mine, -1].mean().item(), 4)
        ways[name] |= diversity(drawn.images[mine].to(device), features[mine], planned, val, args.pairs)
        for modality in ways[name]["modalities"]:
            index = torch.tensor([p["modality"] == modality for p in planned])
            ways[name]["modalities"][modality] |= compare(wrong[off][index], wrong[mine][index])
    most = max(ways[name]["removed"] or 0.0 for name in ("filter at the end", "best rated at the end"))
    gain = ways["filter"]["removed"] / most if most > 0 else None
    good = ~wrong & (drawn.quality[:, -1] >= 2)
    report = {
        "arguments": vars(args),
        "made": {"device": torch.cuda.get_device_name(0) if device.type == "cuda" else platform.machine()},
        "n": len(planned),
        "candidates": args.candidates,
        "stages": [list(stage) for stage in stages],
        "ways": ways,
        "gain of the filter, share of that at the end": gain and round(gain, 4),
        "cost of an accepted image": round(ways["filter"]["cost"] / max(1e-9, ways["filter"]["accepted"]), 3),
        "wrong of all candidates": round(wrong.double().mean().item(), 4),
        "candidates taken for copies": round(reasons.count("copy") / len(reasons), 4),
        "candidates accepted": round(accepted.double().mean().item(), 4),
        "candidates whose finding is read as right": {
            "n": int((~wrong).sum()),
            "rejected": round((~accepted[~wrong]).double().mean().item(), 4),
        },
        "candidates read as right and of quality 2 and more": {
            "n": int(good.sum()),
            "rejected": round((~accepted[good]).double().mean().item(), 4),
        },
        "candidates whose finding is read as wrong": {
            "n": int(wrong.sum()),
            "rejected": round((~accepted[wrong]).double().mean().item(), 4),
        },
        "rejected": rejections(pipe, val_rows, val_images, args.seed),
    }
    if rated_rows:
        rated_images = load_images(rated_rows, args.ratings, drawn.images.shape[-1], reading=reading_of(args))
        report["people"] = people(pipe, rated_rows, rated_images)
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    sheet(drawn.images, made, wrong, planned, args.candidates, output / "sheet.png")
    (output / "report.json").write_text(json.dumps(report, indent=2, default=str) + "\n")
    np.savez_compressed(
        output / "candidates.npz",
        quality=drawn.quality.half().numpy(),
        finding=drawn.finding.half().numpy(),
        guidance=drawn.guidance.numpy(),
        levels=drawn.levels.numpy(),
        accepted=accepted.numpy(),
        wrong=wrong.numpy(),
        chosen=made["filter"]["index"].numpy(),
        said=said.half().numpy(),
    )
    print(json.dumps({key: value for key, value in report.items() if key != "arguments"}, indent=2))
    return report


if __name__ == "__main__":
    main()
