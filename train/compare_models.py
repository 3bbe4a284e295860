"""A model before and after: the same prompts and seeds from both, without the filter, read by the same judges.

What is reported of each, of the difference, and with a paired 95 % interval where images can be drawn anew:

- accuracy: what the judges of part B read, equally many images a finding, with phrasings as in training and new ones;
- rated 3: by a stand-in rater (stand_in.py) if one is given, of the findings that it has learned;
- KID and Fréchet distance from val images in the features of the image-text encoder, inception score of the judges'
  probabilities, MS-SSIM among images of a prompt, recall of val images, and copies of training images.

Findings that one of both models does not know are left out, and modalities of which there are no real images.

    python train/compare_models.py --before runs/old --after runs/new --data data.csv --output_dir runs/comparison
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from evaluate_filter import diversity
from PIL import Image
from report_model import by_modality, plan
from stand_in import StandIn

from minim_pipeline import EMBEDDED_ENCODER, MinimPipeline, resolve_modality
from minim_pipeline.data.image_loading import load_images
from minim_pipeline.data.image_reader import add_reading_arguments, reading_of
from minim_pipeline.data.splits import read_split
from minim_pipeline.evaluation.encoder import ImageTextEncoder
from minim_pipeline.evaluation.judges import class_of, load_judges, read
from minim_pipeline.evaluation.memorisation import latent_features, memorisation_report, pixel_features
from minim_pipeline.evaluation.metrics import bootstrap_interval, frechet_distance, inception_score, kernel_distance
from minim_pipeline.evaluation.sampling import draw_images, kept
from minim_pipeline.files import atomic_path, write_json
from minim_pipeline.generate.command import model_identity
from minim_pipeline.training.arguments import check_numbers
from minim_pipeline.training.captions import CAPTIONS


PHRASINGS = ("train", "new")


def add_comparison_arguments(parser: argparse.ArgumentParser) -> None:
    judging = parser.add_argument_group("judging before and after")
    judging.add_argument("--data", help="CSV with path,Text,modality,finding[,split]: val and train images.")
    add_reading_arguments(judging)
    judging.add_argument("--judges", default=str(Path(__file__).parent / "judges"), help="Of train_classifier.py.")
    judging.add_argument("--encoder", default=str(EMBEDDED_ENCODER), help="Whose features distances are measured in.")
    judging.add_argument("--captions", default=str(CAPTIONS))
    judging.add_argument("--stand_in", help="Folder of stand_in.py, which rates both.")
    judging.add_argument("--images_per_finding", type=int, default=64, help="With each of both sets of phrasings.")
    judging.add_argument("--pairs", type=int, default=400, help="Pairs of images of a prompt a modality, for MS-SSIM.")
    judging.add_argument("--comparison_seed", type=int, default=0, help="Image i of the first set has this plus i.")
    judging.add_argument("--skip_memorisation", action="store_true", help="Do not look for copies of train images.")


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, help="A pipeline.")
    parser.add_argument("--after", required=True, help="Another, which came from it.")
    parser.add_argument("--output_dir", required=True, help="For report.json, sheet.png, and the images as tensors.")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    add_comparison_arguments(parser)
    args = parser.parse_args(argv)
    check_numbers(parser, args, from_zero=("comparison_seed",))
    if not args.data:
        raise ValueError("--data is needed: the CSV of real images that both are compared with.")
    return args


def modalities_of(args) -> set[str]:
    """The ids of which --data has what both models are compared with: val images and, for copies, train images."""
    found = []
    for split in ("val",) if args.skip_memorisation else ("val", "train"):
        rows = read_split(args.data, split, check_images=False)
        found.append({resolve_modality(row["modality"]).id for row in rows})
    return set.intersection(*found)


def draw_both(args, before: str, after: str, folder: Path, device) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """The plan and the images uint8 [N, 3, H, W] of both models, kept in `folder`."""
    judges, captions = load_judges(args.judges), json.loads(Path(args.captions).read_text())
    models = {"before": before, "after": after}
    planned, images, pipes = [], {}, {}
    for name, model in models.items():
        pipes[name] = MinimPipeline.from_pretrained(model, filter_head=None)
        pipes[name].set_progress_bar_config(disable=True)
    known, real = pipes["before"].config.findings or {}, modalities_of(args)
    learned = {
        modality: [f for f in findings if f in (pipes["after"].config.findings or {}).get(modality, [])]
        for modality, findings in known.items()
        if modality in real
    }
    for k, phrasing in enumerate(PHRASINGS):
        # Other seeds for each set, or their images would be alike, and intervals of both together too narrow.
        first = args.comparison_seed + k * 10**6
        mine = plan(judges.classes, learned, captions, phrasing, args.images_per_finding, first)
        planned += [row | {"phrasing": phrasing} for row in mine]
    if not planned:
        raise ValueError(
            f"The judges in {args.judges} know no finding that both models have learned, of a modality with images in"
            f" {args.data}."
        )
    for modality in dict.fromkeys(p["modality"] for p in planned):
        prompts = [p["prompt"] for p in planned if p["modality"] == modality]
        if len(set(prompts)) == len(prompts):
            raise ValueError(
                f"--images_per_finding {args.images_per_finding} draws every prompt of {modality!r} once, and images"
                " of a prompt are compared with each other: raise it."
            )
    for name, pipe in pipes.items():

        def draw(pipe=pipe, name=name):
            pipe.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
                drawn = draw_images(
                    pipe,
                    [p["prompt"] for p in planned],
                    [p["modality"] for p in planned],
                    [p["seed"] for p in planned],
                    args.batch_size,
                    name=name,
                )
            pipe.to("cpu")
            return drawn

        key = json.dumps([model_identity(models[name]), args.mixed_precision, planned])
        images[name] = kept(folder / f"{name}.npz", key, draw)
    return planned, images


def right_findings(said: torch.Tensor, classes, planned: list[dict]) -> torch.Tensor:
    """Whether judges find what was asked for, within the modality: bool [N]."""
    right = torch.zeros(len(planned), dtype=torch.bool)
    for modality in dict.fromkeys(p["modality"] for p in planned):
        mine = [i for i, p in enumerate(planned) if p["modality"] == modality]
        right[mine] = torch.from_numpy(read(said[mine], classes, modality, [planned[i]["finding"] for i in mine]))
    return right


def paired(before: torch.Tensor, after: torch.Tensor, planned: list[dict], draws: int = 1000, seed: int = 0) -> dict:
    """Shares of two tests of the same slots, and their difference with its 95 % interval.

    Every finding counts alike within its modality, and every modality alike. The interval draws slots anew within each
    finding, the same of both (Efron and Tibshirani, An Introduction to the Bootstrap, 1993).

    Args:
        before, after: bool [N].
    """
    g = np.random.default_rng(seed)
    slots: dict[str, dict[str, list[int]]] = {}
    for i, p in enumerate(planned):
        slots.setdefault(p["modality"], {}).setdefault(p["finding"], []).append(i)
    values = torch.stack([before, after]).double().numpy()  # [2, N]

    def mean(choose) -> np.ndarray:
        return np.mean([np.mean([choose(np.array(m)) for m in kinds.values()], 0) for kinds in slots.values()], 0)

    share = mean(lambda mine: values[:, mine].mean(1))  # [2]
    drawn = mean(lambda mine: values[:, mine[g.integers(0, len(mine), (draws, len(mine)))]].mean(2))  # [2, draws]
    low, high = np.quantile(drawn[1] - drawn[0], [0.025, 0.975])
    return {
        "before": round(float(share[0]), 4),
        "after": round(float(share[1]), 4),
        "difference": round(float(share[1] - share[0]), 4),
        "interval": [round(float(low), 4), round(float(high), 4)],
        "n": len(planned),
    }


def by_slot(before: torch.Tensor, after: torch.Tensor, planned: list[dict]) -> dict:
    """`paired` of everything, of each set of phrasings, of each modality, and shares of each finding."""
    report = paired(before, after, planned)

    def part(**wanted):
        mine = [i for i, p in enumerate(planned) if all(p[name] == value for name, value in wanted.items())]
        return paired(before[mine], after[mine], [planned[i] for i in mine])

    report["phrasings"] = {name: part(phrasing=name) for name in dict.fromkeys(p["phrasing"] for p in planned)}
    report["modalities"] = {name: part(modality=name) for name in dict.fromkeys(p["modality"] for p in planned)}
    for name, figures in report["modalities"].items():
        findings = dict.fromkeys(p["finding"] for p in planned if p["modality"] == name)
        each = {finding: part(modality=name, finding=finding) for finding in findings}
        figures["findings"] = {f: [v["before"], v["after"]] for f, v in each.items()}
    return report


def distances(features: dict[str, torch.Tensor], planned: list[dict], val: dict[str, torch.Tensor]) -> dict:
    """KID and Fréchet distance from val images, of both models: means over modalities, and each modality's.

    `difference` of KID has a paired interval: the same slots are drawn of both.
    """
    report = {"kid": {"modalities": {}}, "frechet": {"modalities": {}}}
    differences = []
    for modality, real in val.items():
        mine = [i for i, p in enumerate(planned) if p["modality"] == modality]
        before, after = features["before"][mine], features["after"][mine]
        for name, function in (("kid", kernel_distance), ("frechet", frechet_distance)):
            report[name]["modalities"][modality] = {
                "before": round(function(real, before), 5),
                "after": round(function(real, after), 5),
            }

        def difference(a, b, real=real):
            return kernel_distance(real, b) - kernel_distance(real, a)

        low, high = bootstrap_interval(difference, before, after, paired=True, draws=200)
        report["kid"]["modalities"][modality]["interval"] = [round(low, 5), round(high, 5)]
        differences.append((difference(before, after), (high - low) / 2))
    for figures in report.values():
        for name in ("before", "after"):
            figures[name] = round(float(np.mean([m[name] for m in figures["modalities"].values()])), 5)
    middle = float(np.mean([d for d, _ in differences]))
    # Modalities are drawn independently of each other.
    half = float(np.sqrt(sum(h**2 for _, h in differences)) / len(differences))
    report["kid"] |= {"difference": round(middle, 5), "interval": [round(middle - half, 5), round(middle + half, 5)]}
    return report


def copies(args, images: dict[str, torch.Tensor], planned: list[dict], val, val_names, vae, device) -> dict:
    """Shares of copies of train images, of both models, in latents and in pixels."""
    rows = read_split(args.data, "train", check_images=False)
    names = [p["modality"] for p in planned]
    wanted = set(names)
    rows = [row for row in rows if resolve_modality(row["modality"]).id in wanted]
    size = next(iter(images.values())).shape[-1]
    real = load_images(rows, args.data, size, reading=reading_of(args))
    train = by_modality(real, [resolve_modality(r["modality"]).id for r in rows])
    real = by_modality(val, val_names)
    # A mirrored copy counts where the modality may be mirrored.
    mirror = {name: resolve_modality(name).flip for name in wanted}
    report = {}
    for space, extract, centre in (
        ("latents", lambda x: latent_features(x, vae), True),
        ("pixels", lambda x: pixel_features(x.to(device)), False),
    ):
        report[space] = {}
        for when, mine in images.items():
            found = memorisation_report(by_modality(mine, names), real, train, extract, mirror, remove_mean=centre)
            each = {name: figures["share"] for name, figures in found["modalities"].items()}
            report[space][when] = {"share": found["share"], "n": found["n"], "modalities": each}
    return report


def at_least(images: torch.Tensor, side: int) -> torch.Tensor:
    """Images uint8 [N, 3, H, W], enlarged if they are smaller than `side`."""
    if images.shape[-1] >= side:
        return images
    return F.interpolate(images.float(), size=(side, side), mode="bilinear").round().to(torch.uint8)


def sheet(images: dict[str, torch.Tensor], planned: list[dict], path: Path, columns: int = 6, side: int = 128) -> None:
    """Of every finding the first images: on the left before, on the right after, seeds in order, nothing picked."""
    keys = list(dict.fromkeys((p["modality"], p["finding"]) for p in planned))
    whole = Image.new("RGB", (2 * columns * side + 8, len(keys) * side), "white")
    for y, key in enumerate(keys):
        mine = [i for i, p in enumerate(planned) if (p["modality"], p["finding"]) == key][:columns]
        for x, name in enumerate(("before", "after")):
            for place, i in enumerate(mine):
                picture = Image.fromarray(images[name][i].permute(1, 2, 0).numpy()).resize((side, side), Image.LANCZOS)
                whole.paste(picture, (x * (columns * side + 8) + place * side, y * side))
    with atomic_path(path) as temporary:
        whole.save(temporary, format="PNG", optimize=True)


def compare(args, before: str, after: str, folder: Path) -> dict:
    """The module's figures of two pipelines; images and report are kept in `folder`."""
    device = Accelerator().device
    folder.mkdir(parents=True, exist_ok=True)
    planned, images = draw_both(args, before, after, folder, device)
    judges = load_judges(args.judges, device)
    encoder = ImageTextEncoder.from_pretrained(args.encoder, device)
    modalities = list(dict.fromkeys(p["modality"] for p in planned))
    said = {name: judges.judge(mine) for name, mine in images.items()}
    right = {name: right_findings(p, judges.classes, planned) for name, p in said.items()}
    report = {"before": Path(before).name, "after": Path(after).name, "n": len(planned)}
    report["accuracy"] = by_slot(right["before"], right["after"], planned)
    if args.stand_in:
        rater = StandIn.from_pretrained(args.stand_in, device)
        knows = [i for i, p in enumerate(planned) if (p["modality"], p["finding"]) in rater.findings.classes]
        if knows:
            slots = [planned[i] for i in knows]
            asked = [p["modality"] for p in slots], [p["finding"] for p in slots]
            rated = {name: torch.tensor(rater.rate(mine[knows], *asked)) for name, mine in images.items()}
            report["rated 3 by the stand-in"] = by_slot(rated["before"] == 3, rated["after"] == 3, slots)
            report["rated 1 by the stand-in"] = paired(rated["before"] == 1, rated["after"] == 1, slots)

    rows = read_split(args.data, "val", require=("path", "Text", "modality", "finding"))
    rows = [row for row in rows if class_of(row)[0] in modalities]
    val_names = [class_of(row)[0] for row in rows]
    val_images = load_images(rows, args.data, images["before"].shape[-1], reading=reading_of(args))
    val = by_modality(encoder.encode_images(val_images)[0], val_names)
    features = {name: encoder.encode_images(mine)[0] for name, mine in images.items()}
    report |= distances(features, planned, val)
    report["inception score"] = {name: round(inception_score(p), 4) for name, p in said.items()}
    for name, mine in images.items():
        large = at_least(mine, 176).to(device)  # what MS-SSIM's coarsest scale needs
        report.setdefault("diversity", {})[name] = diversity(large, features[name], planned, val, args.pairs)
    if not args.skip_memorisation:
        vae = MinimPipeline.from_pretrained(before, filter_head=None).vae.to(device).eval()
        report["copies"] = copies(args, images, planned, val_images, val_names, vae, device)
    sheet(images, planned, folder / "sheet.png")
    write_json(folder / "report.json", report)
    return report


def summary(report: dict) -> str:
    """The figures in some lines."""
    lines = []
    for name in ("accuracy", "rated 3 by the stand-in"):
        if name in report:
            r = report[name]
            low, high = (100 * v for v in r["interval"])
            lines.append(
                f"{name}: {r['before']:.3f} -> {r['after']:.3f} "
                f"({100 * r['difference']:+.1f} points [{low:+.1f}, {high:+.1f}], n {r['n']})"
            )
            for kind in ("phrasings", "modalities"):
                each = r[kind].items()
                lines.append("  " + "; ".join(f"{k} {v['before']:.3f} -> {v['after']:.3f}" for k, v in each))
    for name in ("kid", "frechet", "inception score"):
        lines.append(f"{name}: {report[name]['before']} -> {report[name]['after']}")
    for name in ("MS-SSIM", "recall"):
        lines.append(f"{name}: {report['diversity']['before'][name]} -> {report['diversity']['after'][name]}")
    for space, r in report.get("copies", {}).items():
        lines.append(f"copies, {space}: {r['before']['share']} -> {r['after']['share']}")
    return "\n".join(lines)


def main(argv=None) -> dict:
    args = parse_args(argv)
    report = compare(args, args.before, args.after, Path(args.output_dir))
    print(summary(report))
    return report


if __name__ == "__main__":
    main()
