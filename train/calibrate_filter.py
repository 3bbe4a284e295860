"""Sets what a trained filter head decides by: thresholds, when to drop candidates, and fingerprints against copies.

Thresholds are found on images that the pipeline draws for captions of part C, which neither the head nor the judges
learned from: for each modality those at which an asked-for share is accepted (--acceptance), or at which an asked-for
share of the accepted ones shows what it should, as read by classifiers (--precision, --teacher). The finding has a
floor of its own. When candidates are dropped follows from how well scores at every noise level foretell the final
one, within the cost allowed (--most_cost). Fingerprints are made of all images of the train split.

    python train/calibrate_filter.py --filter_head runs/filter/filter_head --train_data data.csv \
        --ratings ratings.csv --output_dir runs/calibrated

Writes `filter_head`, `report.json`, `acceptance.png` (the acceptance curve of each modality) and `noise.png`.
"""

import argparse
import itertools
import json
import math
from collections import Counter
from pathlib import Path

import torch
from accelerate import Accelerator
from matplotlib.figure import Figure

from minim_pipeline import EMBEDDED_CHECKPOINT, FilterHead, MinimPipeline, resolve_modality
from minim_pipeline.data.image_loading import load_images
from minim_pipeline.data.image_reader import add_reading_arguments, reading_of
from minim_pipeline.data.sources import read_csv
from minim_pipeline.data.splits import assign_splits
from minim_pipeline.disk import save_model
from minim_pipeline.evaluation.judges import Judges, claimed_classes, class_of, load_judges, read
from minim_pipeline.files import write_json
from minim_pipeline.generate.command import read_model_index
from minim_pipeline.training.arguments import check_numbers, check_shares
from minim_pipeline.training.filter.candidates import Candidates, draw_candidates, follow
from minim_pipeline.training.filter.copies import (
    fingerprints,
    fit_code,
    plant,
    pooled_features,
    version_features,
    veto_report,
)
from minim_pipeline.training.filter.raters import learned_from
from minim_pipeline.training.filter.report import auroc
from minim_pipeline.training.hub import add_hub_arguments, check_hub_arguments, push_parts
from minim_pipeline.training.rows import add_csv_arguments, csv_options, image_paths, tell_repeats


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--filter_head", required=True, help="A trained head, as train_filter.py writes it.")
    parser.add_argument("--pretrained_model_name_or_path", default=str(EMBEDDED_CHECKPOINT), help="The pipeline.")
    parser.add_argument("--train_data", required=True, help="CSV with path,Text,modality,finding[,split,part].")
    add_csv_arguments(parser)
    parser.add_argument("--part", default="C", help="Whose captions are drawn; 'all' takes every row.")
    parser.add_argument("--ratings", help="The CSV that the head learned from: tells who has enough ratings.")
    parser.add_argument("--ratings_part", default="A", help="The part of them that it learned from, or 'all'.")
    parser.add_argument("--output_dir", required=True)
    add_reading_arguments(parser)
    parser.add_argument("--min_train", type=int, default=20, help="Findings with fewer train images are not drawn.")
    parser.add_argument("--min_val", type=int, default=8, help="Likewise with val images.")
    parser.add_argument("--prompts_per_modality", type=int, default=100)
    parser.add_argument("--candidates", type=int, default=4, help="Drawn for each prompt.")
    parser.add_argument("--acceptance", type=float, default=0.7, help="Share of generated images to accept, or more.")
    parser.add_argument("--precision", type=float, help="Instead: share of accepted ones that is to be right.")
    parser.add_argument("--teacher", help="Classifiers that read what the images show, for --precision.")
    parser.add_argument("--finding_floor", type=float, default=2.0, help="Least rating of the finding, 1 to 3.")
    parser.add_argument(
        "--most_cost",
        type=float,
        default=1.95,
        help="Of a returned image, in plain images by samples of the U-Net; in seconds it is some 3 %% more.",
    )
    parser.add_argument(
        "--copy_false_alarms",
        type=float,
        default=0.05,
        help="Share of val images that may pass for copies: some of them are, as data sets repeat patients.",
    )
    parser.add_argument("--code_bits", type=int, default=224, help="Of a fingerprint, a multiple of 8.")
    parser.add_argument("--code_versions", type=int, default=6, help="Of each image, for the code to learn from.")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--seed", type=int, default=0)
    add_hub_arguments(parser)
    args = parser.parse_args(argv)
    check_numbers(parser, args)
    check_shares(args, "copy_false_alarms")
    check_hub_arguments(args)
    if args.candidates < 2:
        raise ValueError(f"--candidates has to be at least 2, to choose from, got {args.candidates}.")
    if args.precision is not None and args.teacher is None:
        raise ValueError("--precision needs --teacher: classifiers that read what the images show.")
    if args.code_bits < 8 or args.code_bits % 8:
        raise ValueError(f"--code_bits has to be a positive multiple of 8, got {args.code_bits}.")
    for name, low, high in (("acceptance", 0, 1), ("precision", 0, 1), ("finding_floor", 1, 3), ("most_cost", 1, 99)):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{name} has to be between {low} and {high}, got {value}.")
    return args


def plan_prompts(rows: list[dict], count: int, candidates: int, seed: int) -> list[dict]:
    """`count` rows of each modality, findings in turn, each as often as it has candidates; with a `seed` each."""
    planned = []
    for modality in dict.fromkeys(class_of(row)[0] for row in rows):
        mine = [row for row in rows if class_of(row)[0] == modality]
        findings = list(dict.fromkeys(row["finding"] for row in mine))
        queues = {f: itertools.cycle([row for row in mine if row["finding"] == f]) for f in findings}
        planned += [next(queues[findings[i % len(findings)]]) for i in range(count)]
    first = (seed + 1) * 10**9
    return [row | {"seed": first + i * candidates + j} for i, row in enumerate(planned) for j in range(candidates)]


def threshold(
    score: torch.Tensor, finding: torch.Tensor, floor: float, acceptance: float, right=None, precision=None
) -> float:
    """The score from which images are accepted, given that their finding reaches its floor.

    Args:
        score, finding: [N], of generated images.
        acceptance: share of all N to accept; less are accepted if the floor leaves less.
        right: bool [N], whether they show what they should; with `precision`, the share of accepted ones that has to.

    Raises:
        ValueError: no threshold reaches the precision with at least 20 images accepted.
    """
    reached = finding >= floor
    if precision is None:
        ranked = score.masked_fill(~reached, 1.0).sort(descending=True).values
        return ranked[max(1, round(acceptance * len(score))) - 1].item()
    order = score[reached].argsort(descending=True)
    share = right[reached][order].double().cumsum(0) / torch.arange(1, len(order) + 1)
    enough = ((share >= precision) & (torch.arange(1, len(order) + 1) >= 20)).nonzero()[:, 0]
    if not len(enough):
        best = share[19:].max().item() if len(share) >= 20 else math.nan
        raise ValueError(f"No threshold reaches a precision of {precision} with 20 images; the most is {best:.3f}.")
    return score[reached][order][enough[-1]].item()


def choose_stages(
    drawn: Candidates, candidates: int, most_cost: float, head: FilterHead
) -> tuple[list[tuple[float, float]], list[dict]]:
    """When to drop candidates: of all plans of one or two stages within the cost, that whose final ratings are best.

    Returns:
        Stages as in the head's config, and of the best plan of each cost: `gain`, the share it has of what is won by
        drawing all candidates to their end, and `cost` in plain images.
    """
    score = drawn.rank(head).view(-1, candidates, drawn.score.shape[1])
    guided = (drawn.guidance > 0).any(0)
    plain = int(guided.sum()) + len(guided)
    final = score[:, :, -1]
    levels = drawn.levels.tolist()
    plans = [[(i, 1)] for i in range(len(guided))]
    plans += [[(i, k), (j, 1)] for i, j in itertools.combinations(range(len(guided)), 2) for k in range(2, candidates)]
    best = {}
    for plan in plans:
        stages = [(min(levels[i], 1e3), k) for i, k in plan]
        chosen, samples = follow(score, drawn.levels.clamp(max=1e3), guided, stages)
        won = final.gather(1, chosen[:, None]).mean() - final.mean()
        gain = (won / (final.amax(1).mean() - final.mean())).item()
        if samples / plain not in best or gain > best[samples / plain][0]:
            best[samples / plain] = gain, plan
    affordable = [(gain, -cost, plan) for cost, (gain, plan) in best.items() if cost <= most_cost]
    if not affordable:
        raise ValueError(f"No plan of {candidates} candidates costs at most {most_cost} plain images.")
    plan = max(affordable)[2]  # of equals the cheaper
    # Between a step's level and that before it, so that another number of steps finds its place.
    stages = [
        (
            round(math.sqrt(min(levels[i], 1e3) * min(levels[i - 1], 1e3)) if i else 1e3, 2),
            0.0 if k == 1 else k / candidates,
        )
        for i, k in plan
    ]
    table = [{"cost": round(cost, 3), "gain": round(best[cost][0], 4), "plan": best[cost][1]} for cost in sorted(best)]
    return stages, table


def foretelling(drawn: Candidates, right: torch.Tensor | None, known: torch.Tensor | None) -> list[dict]:
    """By noise level: how well a score tells the better half of final scores, and what classifiers read (AUROC)."""
    table = []
    for i, level in enumerate(drawn.levels.tolist()):
        row = {"level": round(min(level, 1e3), 3)}
        row["final score"] = auroc(drawn.score[:, i], drawn.score[:, -1] > drawn.score[:, -1].median())
        if right is not None:
            row["right finding"] = auroc(drawn.finding[known, i], right[known])
        table.append(row)
    return table


def read_right(teacher: Judges, drawn: Candidates, planned: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether classifiers find in each image what was asked for, within its modality, and whether they know that.

    Both bool [N].
    """
    said, right = teacher.judge(drawn.images), torch.zeros(len(planned), dtype=torch.bool)
    known = torch.tensor([class_of(row) in teacher.classes for row in planned])
    for modality in dict.fromkeys(class_of(row)[0] for row in planned):
        mine = [i for i, row in enumerate(planned) if class_of(row)[0] == modality]
        found = read(said[mine], teacher.classes, modality, [planned[i]["finding"] for i in mine])
        right[mine] = torch.from_numpy(found)
    return right, known


def acceptance_curves(drawn: Candidates, modalities: list[str], calibration: dict, path: Path) -> None:
    """Share of generated images accepted against the score asked for, a line for each modality."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    score, finding = drawn.score[:, -1], drawn.finding[:, -1]
    asked = torch.linspace(1, 3, 201)
    for i, name in enumerate(calibration):
        mine = torch.tensor([m == name for m in modalities])
        able = score[mine].masked_fill(finding[mine] < calibration[name]["finding"], 0)
        share = [(able >= s).double().mean().item() * 100 for s in asked]
        axes.plot(asked, share, color=f"C{i}", label=resolve_modality(name).name)
        at = calibration[name]["score"]
        axes.plot([at], [(able >= at).double().mean().item() * 100], "o", color=f"C{i}")
    axes.set(xlabel="score asked for (1 to 3)", ylabel="generated images accepted (%)", xlim=(1, 3), ylim=(0, 100))
    axes.grid(alpha=0.2)
    axes.legend(title="modality; dots: thresholds")
    figure.savefig(path, dpi=120)


def noise_curves(table: list[dict], stages, path: Path) -> None:
    """How well scores foretell, against the noise level; where candidates are dropped."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, label in (("final score", "final score above its median"), ("right finding", "finding read as right")):
        if name in table[0]:
            points = [(row["level"], row[name]) for row in table if 0 < row["level"] < 1e3]
            axes.plot(*zip(*points, strict=True), "o-", markersize=3, label=label)
    for level, _ in stages:
        axes.axvline(
            level, color="0.5", linestyle=":", label="candidates are dropped" if level == stages[0][0] else None
        )
    axes.set(xscale="log", xlabel="noise level (sigma / alpha)", ylabel="AUROC of the score at that level")
    axes.invert_xaxis()
    axes.grid(alpha=0.2)
    axes.legend()
    figure.savefig(path, dpi=120)


def main(argv=None) -> dict:
    args = parse_args(argv)
    device, bf16 = Accelerator().device, args.mixed_precision == "bf16"
    # Before any row is read: it may be of a modality that only the pipeline knows.
    read_model_index(args.pretrained_model_name_or_path)
    require = ("path", "Text", "modality", "finding")
    every = assign_splits(read_csv(args.train_data, require=require, **csv_options(args)), args.train_data)
    train = [row for row in every if row["split"] == "train"]
    val = [row for row in every if row["split"] == "val"]
    tell_repeats(args.train_data, image_paths(train, args.train_data), image_paths(val, args.train_data))
    rows = [row for row in train if args.part in ("all", row.get("part"))]
    if not rows:
        raise ValueError(f"{args.train_data} has no train rows of part {args.part!r}.")
    head = FilterHead.from_pretrained(args.filter_head).eval()
    model = args.pretrained_model_name_or_path
    pipe = MinimPipeline.from_pretrained(model, filter_head=head).to(device)
    pipe.set_progress_bar_config(disable=True)
    # Findings of too few images, which the generator cannot draw, would use up what may be rejected.
    claimed = claimed_classes(train, val, args.min_train, args.min_val if val else 0)
    rows = [row for row in rows if class_of(row) in claimed]
    if not rows:
        raise ValueError(
            f"No finding of part {args.part!r} has {args.min_train} train and {args.min_val} val images in"
            f" {args.train_data}: lower --min_train or --min_val."
        )
    teacher = load_judges(args.teacher, device) if args.teacher else None
    people = Counter()
    if args.ratings:
        ratings = [row for row in read_csv(args.ratings, check_images=False) if learned_from(row, args.ratings_part)]
        people.update(resolve_modality(row["modality"]).id for row in ratings)

    planned = plan_prompts(rows, args.prompts_per_modality, args.candidates, args.seed)
    modalities = [class_of(row)[0] for row in planned]
    drawn = draw_candidates(
        pipe, [r["Text"] for r in planned], modalities, [r["seed"] for r in planned], args.batch_size, bf16
    )
    right = known = None
    if teacher is not None:
        right, known = read_right(teacher, drawn, planned)
    score, finding = drawn.score[:, -1], drawn.finding[:, -1]
    calibration, figures = {}, {}
    for name in dict.fromkeys(modalities):
        mine = torch.tensor([m == name for m in modalities])
        if args.precision is not None:
            mine &= known
        seen = right[mine] if right is not None else None
        least = threshold(score[mine], finding[mine], args.finding_floor, args.acceptance, seen, args.precision)
        if args.precision is None:
            # What is as good as it counts is not rejected because others are still better.
            least = min(least, head.config.enough[1])
        passed = (score >= least) & (finding >= args.finding_floor)
        calibration[name] = {"score": round(least, 4), "finding": args.finding_floor, "ratings": people[name]}
        figures[name] = {"n": int(mine.sum()), "accepted": round(passed[mine].double().mean().item(), 4)}
        if right is not None:
            mine &= known
            figures[name] |= {"right": round(right[mine].double().mean().item(), 4)}
            figures[name] |= {"right of accepted": round(right[mine & passed].double().mean().item(), 4)}
    stages, plans = choose_stages(drawn, args.candidates, args.most_cost, head)
    table = foretelling(drawn, right, known)

    resolution = pipe.unet.config.sample_size * pipe.vae_scale_factor
    images = load_images(train, args.train_data, resolution, reading=reading_of(args))
    features = version_features(head, pipe, train, images, args.code_versions, args.seed, bf16)
    # Part A is what the head has learned from; of the others copies are planted.
    unseen = [i for i, row in enumerate(train) if row.get("part") != "A"]
    learned = [i for i, row in enumerate(train) if row.get("part") == "A"] or unseen
    code = fit_code(features[learned], args.code_bits)
    prints = fingerprints(code, features[:, 0])
    head.set_fingerprints(code, prints)
    copies = {}
    if val and unseen:
        some = unseen[:: max(1, len(unseen) // 500)]
        limits, copies = veto_report(
            code,
            prints,
            pooled_features(head, pipe, load_images(val, args.train_data, resolution, reading=reading_of(args)), bf16),
            [class_of(row)[0] for row in val],
            {name: pooled_features(head, pipe, x, bf16) for name, x in plant(images[some]).items()},
            [class_of(train[i])[0] for i in some],
            args.copy_false_alarms,
        )
        for name in calibration:
            calibration[name]["copy"] = limits.get(name, -1)
    head.register_to_config(calibration=calibration, stages=stages)

    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    acceptance_curves(drawn, modalities, calibration, output / "acceptance.png")
    noise_curves(table, stages, output / "noise.png")
    save_model(head.half(), output / "filter_head")
    report = {"arguments": vars(args), "calibration": calibration, "generated": figures, "copies": copies}
    report |= {"stages": stages, "plans": plans, "noise": table}
    write_json(output / "report.json", json.loads(json.dumps(report, default=str)))
    push_parts(args, "calibrate_filter", output / "filter_head")
    print(json.dumps({key: value for key, value in report.items() if key not in ("arguments", "plans")}, indent=2))
    return report


if __name__ == "__main__":
    main()
