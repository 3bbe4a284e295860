"""A stand-in for a clinician, where none is at hand: two networks of part C give a generated image 1, 2 or 3.

A classifier says whether the image shows the finding, a judge of realism whether it could be real. Both learn from
part C of the train split, which neither the filter head (part A) nor the judges (part B) learn from. What a stand-in
says is not what a clinician would say, and wherever its ratings appear they are called a stand-in's.

How real an image looks is the share of real images of its finding that look less real, to judges that have not seen
them: part C goes in two halves, each half is judged by a network that learned from the other, and a generated image
by both. Real images go through the pipeline's autoencoder first, or its marks would be learned.

- 3: the finding is read as right, and the image looks as real as 30 % of the real ones.
- 1: the finding is read as less than half as likely as another (look-alikes do not count), or nine in ten real images
  look more real.
- 2: everything between.

    python train/stand_in.py --train_data data.csv --output_dir runs/stand_in
"""

import argparse
import json
from pathlib import Path

import torch
import train_classifier

from minim_pipeline import EMBEDDED_CHECKPOINT, MinimPipeline, resolve_modality
from minim_pipeline.data.image_loading import load_images
from minim_pipeline.data.image_reader import add_reading_arguments, reading_of, reading_options
from minim_pipeline.data.splits import read_split
from minim_pipeline.evaluation.classifier import Recipe, make_resnet
from minim_pipeline.evaluation.classifier import train_classifier as fit
from minim_pipeline.evaluation.judges import LOOK_ALIKE, Judges, class_of, load_judges, read
from minim_pipeline.evaluation.sampling import draw_images
from minim_pipeline.files import write_json
from minim_pipeline.generate.command import read_model_index
from minim_pipeline.training.arguments import check_numbers
from minim_pipeline.training.filter.report import auroc
from minim_pipeline.training.hub import add_hub_arguments, check_hub_arguments, push_parts
from minim_pipeline.training.rows import add_csv_arguments, add_mirror_argument, csv_options


RATER = "stand-in"
# Shares of real images: below the first an image is rated 1, from the second on it may be rated 3.
LIMITS = (0.1, 0.3)
KINDS = [("any", "generated"), ("any", "real")]
FOLDS = 2
FEWEST = 8  # real images of a finding, for a scale of its own; below, that of the modality


class StandIn:
    """Rates images by the module's rule.

    Args:
        findings: the classifier of findings.
        realism: for each half of part C, the judge that has not seen it.
        scales: for each half, by "modality: finding" and by modality, its real images' realism in ascending order.
    """

    def __init__(self, findings: Judges, realism: list[Judges], scales: list[dict[str, list[float]]]):
        self.findings, self.realism, self.scales = findings, realism, scales

    @classmethod
    def from_pretrained(cls, path: str | Path, device: torch.device | str = "cpu") -> "StandIn":
        folder = Path(path)
        realism = [load_judges(folder / f"realism-{k}", device) for k in range(FOLDS)]
        scales = json.loads((folder / "scales.json").read_text())
        return cls(load_judges(folder / "findings", device), realism, scales)

    def save_pretrained(self, path: str | Path) -> None:
        """Writes all but the classifier of findings, which `train_classifier.py` has written."""
        for k, judge in enumerate(self.realism):
            judge.save_pretrained(Path(path) / f"realism-{k}")
        (Path(path) / "scales.json").write_text(json.dumps(self.scales) + "\n")

    def looks_real(self, images: torch.Tensor, modalities: list[str], findings: list[str]) -> torch.Tensor:
        """The share of real images that look less real than each of these: [N] in [0, 1]."""
        shares = []
        for judge, scales in zip(self.realism, self.scales, strict=True):
            found = realism_of(judge, images)
            for i, (modality, finding) in enumerate(zip(modalities, findings, strict=True)):
                scale = torch.tensor(scales.get(f"{modality}: {finding}") or scales[modality])
                found[i] = (scale < found[i]).double().mean()
            shares.append(found)
        return torch.stack(shares).mean(0)

    def rate(self, images: torch.Tensor, modalities: list[str], findings: list[str]) -> list[int]:
        """Ratings, 1 to 3, of images uint8 [N, 3, H, W] for the findings asked for.

        Raises:
            ValueError: it has not learned a finding.
        """
        for key in dict.fromkeys(zip(modalities, findings, strict=True)):
            if key not in self.findings.classes:
                raise ValueError(f"This stand-in has not learned the finding {key[1]!r} of {key[0]!r}.")
        said, real = self.findings.judge(images), self.looks_real(images, modalities, findings)
        ratings = []
        for i, (modality, finding) in enumerate(zip(modalities, findings, strict=True)):
            mine, others = 0.0, 0.0
            for (name, other), probability in zip(self.findings.classes, said[i].tolist(), strict=True):
                if name == modality and look_alike(modality, other) == look_alike(modality, finding):
                    mine = max(mine, probability)
                elif name == modality:
                    others = max(others, probability)
            right = read(said[i : i + 1], self.findings.classes, modality, [finding])[0]
            if mine < others / 2 or real[i] < LIMITS[0]:
                ratings.append(1)
            else:
                ratings.append(3 if right and real[i] >= LIMITS[1] else 2)
        return ratings


def look_alike(modality: str, finding: str) -> str:
    return LOOK_ALIKE.get((modality, finding), finding)


def realism_of(judge: Judges, images: torch.Tensor) -> torch.Tensor:
    """The log odds that images are real: fp32 [N]."""
    return torch.special.logit(judge.judge(images)[:, 1], eps=1e-6)


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_data", required=True, help="CSV with path,Text,modality,finding,part[,split,group].")
    add_csv_arguments(parser)
    add_mirror_argument(parser)
    parser.add_argument("--pretrained_model_name_or_path", default=str(EMBEDDED_CHECKPOINT), help="What is judged.")
    parser.add_argument("--output_dir", required=True)
    add_reading_arguments(parser)
    parser.add_argument("--part", default="C", help="Rows of the train split with this `part`.")
    parser.add_argument("--classifier_steps", type=int, default=1600)
    parser.add_argument("--realism_steps", type=int, default=600)
    parser.add_argument("--width", type=int, default=48)
    parser.add_argument("--images_per_caption", type=int, default=2, help="Drawn to tell real from generated by.")
    parser.add_argument("--min_train", type=int, default=20, help="Findings with fewer train images are left out.")
    parser.add_argument("--min_val", type=int, default=9, help="Findings with fewer val images are left out.")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--seed", type=int, default=0)
    add_hub_arguments(parser)
    args = parser.parse_args(argv)
    check_numbers(parser, args, from_zero=("seed", "min_val"))
    check_hub_arguments(args)
    return args


@torch.no_grad()
def through_the_autoencoder(pipe: MinimPipeline, rows, images: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Images uint8 [N, 3, H, W] as the pipeline would deliver them."""
    result = []
    for part in torch.arange(len(images)).split(batch_size):
        latents = pipe.encode_images(images[part].to(pipe.device) / 127.5 - 1)
        decoded = pipe.decode_latents(latents, [resolve_modality(rows[i]["modality"]) for i in part.tolist()])
        result.append(((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu())
    return torch.cat(result)


def train_realism(args, rows: list[dict], device) -> tuple[list[Judges], list[dict], dict]:
    """The judges of realism, the scales of the halves they have not seen, and how well they tell there (AUROC)."""
    pipe = MinimPipeline.from_pretrained(args.pretrained_model_name_or_path, filter_head=None).to(device)
    pipe.set_progress_bar_config(disable=True)
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    images = load_images(rows, args.train_data, size, reading=reading_of(args))
    real = through_the_autoencoder(pipe, rows, images, args.batch_size)
    asked = [row for row in rows for _ in range(args.images_per_caption)]
    seeds = [(args.seed + 1) * 10**8 + i for i in range(len(asked))]
    with torch.autocast(device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
        drawn = draw_images(pipe, [r["Text"] for r in asked], [r["modality"] for r in asked], seeds, args.batch_size)
    of = rows + asked
    images, label = torch.cat([real, drawn]), torch.tensor([1] * len(real) + [0] * len(drawn))
    groups = sorted({row.get("group") or row["path"] for row in rows})
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(args.seed)).tolist()
    fold_of = {groups[i]: place % FOLDS for place, i in enumerate(order)}
    fold = torch.tensor([fold_of[row.get("group") or row["path"]] for row in of])
    kinds = [resolve_modality(row["modality"]) for row in of]
    names = list(dict.fromkeys(kind.id for kind in kinds))
    bf16 = args.mixed_precision == "bf16"
    recipe = Recipe(max_train_steps=args.realism_steps, mix=0.0, seed=args.seed, bf16=bf16)
    judges, scales, found = [], [], torch.zeros(len(of))
    for k in range(FOLDS):
        mine = (fold != k).nonzero()[:, 0]
        torch.manual_seed(args.seed)
        model = fit(
            make_resnet(2, args.width // 2),
            images[mine].to(device),
            label[mine].to(device),
            torch.tensor([kinds[i].flip and not args.no_mirror for i in mine.tolist()], device=device),
            torch.tensor([kinds[i].grey for i in mine.tolist()], device=device),
            2,
            recipe,
            f"realism {k + 1} of {FOLDS}",
            origin=torch.tensor([names.index(kinds[i].id) for i in mine.tolist()], device=device),
        )
        judges.append(Judges({"resnet": model}, KINDS, recipe.resolution))
        found[fold == k] = realism_of(judges[k], images[fold == k])
        scale: dict[str, list[float]] = {}
        for i in ((fold == k) & (label == 1)).nonzero()[:, 0].tolist():
            for name in (kinds[i].id, f"{kinds[i].id}: {of[i]['finding']}"):
                scale.setdefault(name, []).append(round(found[i].item(), 4))
        scales.append({name: sorted(v) for name, v in scale.items() if ":" not in name or len(v) >= FEWEST})
    report = {}
    for name in names:
        mine = torch.tensor([kind.id == name for kind in kinds])
        truth = label[mine] == 1
        report[name] = {"auroc": round(auroc(found[mine], truth), 4), "real": int(truth.sum()), "n": int(mine.sum())}
    return judges, scales, report


def main(argv=None) -> dict:
    args = parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    output = Path(args.output_dir)
    # Before any row is read: it may be of a modality that only the pipeline knows.
    read_model_index(args.pretrained_model_name_or_path)
    require = ("path", "Text", "modality", "finding", "part")
    rows = read_split(args.train_data, "train", require=require, **csv_options(args))
    rows = [row for row in rows if row["part"] == args.part]
    if not rows:
        raise ValueError(f"{args.train_data} has no train rows of part {args.part!r}.")
    precision = ["--mixed_precision", args.mixed_precision]
    sizes = ["--max_train_steps", str(args.classifier_steps), "--width", str(args.width), "--seed", str(args.seed)]
    least = ["--min_train", str(args.min_train), "--min_val", str(args.min_val)]
    where = ["--train_data", args.train_data, "--part", args.part, "--output_dir", str(output / "findings")]
    for name in ("modality", "image_root"):
        where += [f"--{name}", getattr(args, name)] if getattr(args, name) else []
    where += [*["--no_mirror"] * args.no_mirror, *reading_options(args)]
    findings = train_classifier.main([*where, *sizes, *least, *precision, "--architectures", "resnet"])
    known = load_judges(output / "findings").classes
    rows = [row for row in rows if class_of(row) in known]
    judges, scales, realism = train_realism(args, rows, device)
    StandIn(load_judges(output / "findings"), judges, scales).save_pretrained(output)
    report = {"findings, val": findings["val"]["resnet"], "realism, unseen halves": realism}
    write_json(output / "report.json", report)
    parts = ["findings", *(f"realism-{k}" for k in range(FOLDS)), "scales.json"]
    push_parts(args, "stand_in", *(output / part for part in parts))
    print(json.dumps(report["realism, unseen halves"], indent=2))
    return report


if __name__ == "__main__":
    main()
