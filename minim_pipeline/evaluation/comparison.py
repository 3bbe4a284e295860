"""A model before and after: the same prompts and seeds from both, without the filter, read by the same judges.

What is reported of each, of the difference, and with a paired 95 % interval where images can be drawn anew:

- accuracy: what the judges of part B read, equally many images a finding, with phrasings as in training and new ones;
- rated 3: by a stand-in rater (`stand_in.py`) if one is given, of the findings that it has learned;
- KID and Fréchet distance from val images in the features of the image-text encoder, inception score of the judges'
  probabilities, MS-SSIM among images of a prompt, recall of val images, and copies of training images.

Findings that one of both models does not know are left out, and modalities of which there are no real images.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL
from PIL import ImageOps
from torch import Tensor

from .. import CAPTIONS, EMBEDDED_ENCODER, MinimPipeline, resolve_modality
from ..cache import cached_tensor
from ..contact_sheet import contact_sheet
from ..data.mapped_images import IMAGES, map_images
from ..data.splits import read_split
from ..files import atomic_path, write_report
from ..loading import model_identity
from ..options import Count, Precision, ReadingOptions, Whole, option
from .encoder import ImageTextEncoder
from .judges import Class, Families, class_of, finds_asked, load_judges
from .memorisation import ByModality, copies_in_both_spaces
from .metrics import (
    bootstrap_interval,
    drawn_within,
    frechet_distance,
    inception_score,
    interval_of,
    kernel_distance,
    ms_ssim_of_pairs,
    places,
)
from .neighbourhoods import precision_recall_density_coverage
from .sampling import by_modality, draw_planned, plan
from .stand_in import StandIn


PHRASINGS = ("train", "new")
JUDGES = str(Path(__file__).parents[2] / "research" / "judges")  # in a clone of the repository


@dataclass(kw_only=True)
class ComparisonOptions(ReadingOptions):
    """How two models are judged, before and after."""

    data: str | None = option(None, "CSV with path,Text,modality,finding[,split]: val and train images.")
    judges: str = option(JUDGES, "Of train_classifier.py.")
    encoder: str = option(str(EMBEDDED_ENCODER), "Whose features distances are measured in.")
    captions: str = option(str(CAPTIONS), "JSON with phrasings of every finding.")
    stand_in: str | None = option(None, "Folder of a stand-in, which rates both.")
    images_per_finding: Count = option(64, "With each of both sets of phrasings.")
    pairs: Count = option(400, "Pairs of images of a prompt a modality, for MS-SSIM.")
    comparison_seed: Whole = option(0, "Image i of the first set has this plus i.")
    skip_memorisation: bool = option(False, "Do not look for copies of train images.")
    batch_size: Count = option(64, "Images drawn together.")
    mixed_precision: Precision = "no"

    def real_data(self) -> str:
        """`--data`, which not every run that may compare models needs; raises ValueError where it is missing."""
        if not self.data:
            raise ValueError("--data is needed: the CSV of real images that both are compared with.")
        return self.data


@dataclass(kw_only=True)
class ComparisonConfig(ComparisonOptions):
    """Options of a comparison."""

    before: str = option(help="A pipeline.")
    after: str = option(help="Another, which came from it.")
    output_dir: str = option(help="For report.json, sheet.png, and the images as tensors.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.real_data()  # raises where there is none


def modalities_of(data: str, skip_memorisation: bool = False) -> set[str]:
    """The ids of which a CSV has what both models are compared with: val images and, for copies, train images."""
    splits = ("val",) if skip_memorisation else ("val", "train")
    rows = (read_split(data, split, check_images=False) for split in splits)
    return set.intersection(*({resolve_modality(row["modality"]).id for row in some} for some in rows))


def plan_both(options: ComparisonOptions, before: MinimPipeline, after: MinimPipeline) -> list[dict]:
    """What both draw: findings that both have learned, with each set of phrasings.

    Raises:
        ValueError: there are none, or a prompt would be drawn once only.
    """
    judges, captions = load_judges(options.judges), json.loads(Path(options.captions).read_text())
    real, known = modalities_of(options.real_data(), options.skip_memorisation), after.config.findings or {}
    learned = {
        modality: [finding for finding in findings if finding in known.get(modality, [])]
        for modality, findings in (before.config.findings or {}).items()
        if modality in real
    }
    planned = []
    for k, phrasing in enumerate(PHRASINGS):
        # Other seeds for each set, or their images would be alike, and intervals of both together too narrow.
        first = options.comparison_seed + k * 10**6
        rows = plan(judges.classes, learned, captions, phrasing, options.images_per_finding, first)
        planned += [row | {"phrasing": phrasing} for row in rows]
    if not planned:
        raise ValueError(
            f"The judges in {options.judges} know no finding that both models have learned, of a modality with images"
            f" in {options.data}."
        )
    for modality, index in places(p["modality"] for p in planned).items():
        if len({planned[i]["prompt"] for i in index}) == len(index):
            raise ValueError(
                f"--images_per_finding {options.images_per_finding} draws every prompt of {modality!r} once, and"
                " images of a prompt are compared with each other: raise it."
            )
    return planned


def draw_both(
    options: ComparisonOptions, models: dict[str, str], folder: Path, device: torch.device
) -> tuple[list[dict], dict[str, Tensor]]:
    """The plan, and by name the images uint8 [N, 3, H, W] of both `models`, which `folder` stores."""
    pipes = {name: MinimPipeline.from_pretrained(model, filter_head=None) for name, model in models.items()}
    planned, images = plan_both(options, pipes["before"], pipes["after"]), {}
    for name, pipe in pipes.items():
        pipe.set_progress_bar_config(disable=True)

        def draw(pipe: MinimPipeline = pipe, name: str = name) -> Tensor:
            pipe.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=options.mixed_precision == "bf16"):
                drawn = draw_planned(pipe, planned, options.batch_size, name)
            pipe.to("cpu")
            return drawn

        key = json.dumps([model_identity(models[name]), options.mixed_precision, planned])
        images[name] = cached_tensor(folder / f"{name}.safetensors", key, draw)
    return planned, images


def right_findings(
    probabilities: Tensor,
    classes: list[Class],
    planned: list[dict],
    merge: bool = False,
    families: Families | None = None,
) -> Tensor:
    """Whether judges find what was asked for, within the modality: bool [N]; arguments as of `finds_asked`."""
    modalities, findings = ([p[key] for p in planned] for key in ("modality", "finding"))
    return torch.from_numpy(finds_asked(probabilities, classes, modalities, findings, merge, families))


def paired(before: Tensor, after: Tensor, planned: list[dict], draws: int = 1000, seed: int = 0) -> dict:
    """Shares of two tests of the same slots, and their difference with its 95 % interval.

    Every finding counts alike within its modality, and every modality alike. The interval draws slots anew within each
    finding, the same of both.

    Args:
        before, after: bool [N].
    """
    generator = np.random.default_rng(seed)
    values = torch.stack([before, after]).double().numpy()  # [2, N]
    shares, drawn = [], []
    for index in places(p["modality"] for p in planned).values():
        own, findings = values[:, index], [planned[i]["finding"] for i in index]
        shares.append(np.mean([own[:, i].mean(1) for i in places(findings).values()], 0))
        drawn.append(np.mean([own[:, i].mean(2) for i in drawn_within(findings, draws, generator)], 0))
    share, drawn = np.mean(shares, 0), np.mean(drawn, 0)  # [2], [2, draws]
    return {
        "before": round(float(share[0]), 4),
        "after": round(float(share[1]), 4),
        "difference": round(float(share[1] - share[0]), 4),
        "interval": interval_of(drawn[1] - drawn[0]),
        "n": len(planned),
    }


def by_slot(before: Tensor, after: Tensor, planned: list[dict]) -> dict:
    """`paired` of everything, of each set of phrasings, of each modality, and shares of each finding."""
    report = paired(before, after, planned)

    def part(**wanted: str) -> dict:
        index = [i for i, p in enumerate(planned) if all(p[name] == value for name, value in wanted.items())]
        return paired(before[index], after[index], [planned[i] for i in index])

    report["phrasings"] = {name: part(phrasing=name) for name in dict.fromkeys(p["phrasing"] for p in planned)}
    report["modalities"] = {name: part(modality=name) for name in dict.fromkeys(p["modality"] for p in planned)}
    for name, finding in dict.fromkeys(map(class_of, planned)):
        found = part(modality=name, finding=finding)
        report["modalities"][name].setdefault("findings", {})[finding] = [found["before"], found["after"]]
    return report


def distances(features: dict[str, Tensor], planned: list[dict], val: dict[str, Tensor]) -> dict:
    """KID and Fréchet distance from val images, of both models: means over modalities, and each modality's.

    `difference` of KID has a paired interval: the same slots are drawn of both.
    """
    report: dict[str, Any] = {"kid": {"modalities": {}}, "frechet": {"modalities": {}}}
    differences, index = [], places(p["modality"] for p in planned)
    for modality, real in val.items():
        drawn = {when: each[index[modality]] for when, each in features.items()}
        for name, function in (("kid", kernel_distance), ("frechet", frechet_distance)):
            report[name]["modalities"][modality] = {when: round(function(real, x), 5) for when, x in drawn.items()}

        def difference(a: Tensor, b: Tensor, real: Tensor = real) -> float:
            return kernel_distance(real, b) - kernel_distance(real, a)

        low, high = bootstrap_interval(difference, *drawn.values(), paired=True, draws=200)
        report["kid"]["modalities"][modality]["interval"] = [round(low, 5), round(high, 5)]
        differences.append((difference(*drawn.values()), (high - low) / 2))
    for figures in report.values():
        for name in ("before", "after"):
            figures[name] = round(float(np.mean([m[name] for m in figures["modalities"].values()])), 5)
    middle = float(np.mean([d for d, _ in differences]))
    # Modalities are drawn independently of each other.
    half = float(np.sqrt(sum(h**2 for _, h in differences)) / len(differences))
    report["kid"] |= {"difference": round(middle, 5), "interval": [round(middle - half, 5), round(middle + half, 5)]}
    return report


def diversity(images: Tensor, features: Tensor, planned: list[dict], val: dict[str, Tensor], pairs: int) -> dict:
    """MS-SSIM among images of a prompt (low is diverse) and recall of val images, means over modalities."""
    similarity, recall = {}, {}
    for modality, index in places(p["modality"] for p in planned).items():
        x = images[index][:, :1] if resolve_modality(modality).grey else images[index]
        prompts = [planned[i]["prompt"] for i in index]
        generator = torch.Generator().manual_seed(0)
        similarity[modality] = ms_ssim_of_pairs(x, prompts, pairs, generator, batch_size=100).mean().item()
        recall[modality] = precision_recall_density_coverage(val[modality], features[index])["recall"]
    report = {"ms_ssim": similarity, "recall": recall}
    return {name: round(sum(v.values()) / len(v), 4) for name, v in report.items()} | {
        "modalities": {m: {name: round(v[m], 4) for name, v in report.items()} for m in recall}
    }


def copies(
    options: ComparisonOptions,
    images: dict[str, Tensor],
    planned: list[dict],
    val: ByModality,
    vae: AutoencoderKL,
    path: Path,
) -> dict:
    """Shares of copies of train images, of both models, in latents and in pixels.

    Args:
        val: images by modality.
        path: of the files in which train images lie for a while.
    """
    data, names = options.real_data(), [p["modality"] for p in planned]
    rows = read_split(data, "train", check_images=False)
    rows = [row for row in rows if resolve_modality(row["modality"]).id in names]
    real = map_images(path, rows, data, images["before"].shape[-1], reading=options.reading_elsewhere())
    train = by_modality(real, [resolve_modality(row["modality"]).id for row in rows])
    # A mirrored copy counts where the modality may be mirrored.
    mirror = {name: resolve_modality(name).flip for name in set(names)}
    report: dict[str, dict] = {"latents": {}, "pixels": {}}
    for when, drawn in images.items():
        for space, found in copies_in_both_spaces(by_modality(drawn, names), val, train, mirror, vae).items():
            each = {name: figures["share"] for name, figures in found["modalities"].items()}
            report[space][when] = {"share": found["share"], "n": found["n"], "modalities": each}
    return report


def at_least(images: Tensor, side: int) -> Tensor:
    """Images uint8 [N, 3, H, W], enlarged if they are smaller than `side`."""
    if images.shape[-1] >= side:
        return images
    return F.interpolate(images.float(), size=(side, side), mode="bilinear").round().to(torch.uint8)


def save_sheet(images: dict[str, Tensor], planned: list[dict], path: Path, columns: int = 6, side: int = 128) -> None:
    """Of every finding the first images: on the left before, on the right after, seeds in order, nothing picked."""
    halves = []
    for name in ("before", "after"):
        chosen = (index[:columns] for index in places(map(class_of, planned)).values())
        rows = [contact_sheet(images[name][index], columns, side, blank="white") for index in chosen]
        halves.append(ImageOps.expand(contact_sheet(rows, 1), border=(0, 0, 8, 0), fill="white"))
    with atomic_path(path) as temporary:
        contact_sheet(halves, 2).save(temporary, format="PNG", optimize=True)


def rated(stand_in: str, images: dict[str, Tensor], planned: list[dict], device: torch.device) -> dict:
    """Shares that the stand-in rates 3 and 1, of the findings that it has learned."""
    rater = StandIn.from_pretrained(stand_in, device)
    known = [i for i, p in enumerate(planned) if (p["modality"], p["finding"]) in rater.findings.classes]
    if not known:
        return {}
    slots = [planned[i] for i in known]
    asked = [p["modality"] for p in slots], [p["finding"] for p in slots]
    before, after = (torch.tensor(rater.rate(images[name][known], *asked)) for name in ("before", "after"))
    return {
        "rated_3_by_stand_in": by_slot(before == 3, after == 3, slots),
        "rated_1_by_stand_in": paired(before == 1, after == 1, slots),
    }


def compare(options: ComparisonOptions, before: str, after: str, folder: Path) -> dict:
    """The module's figures of two pipelines; `folder` stores images and report.

    Raises:
        ValueError: as `plan_both`; or `folder` holds images that were drawn with other settings.
    """
    device = Accelerator().device
    folder.mkdir(parents=True, exist_ok=True)
    planned, images = draw_both(options, {"before": before, "after": after}, folder, device)
    judges = load_judges(options.judges, device)
    encoder = ImageTextEncoder.from_pretrained(options.encoder, device)
    said = {name: judges.judge(drawn) for name, drawn in images.items()}
    right = {name: right_findings(p, judges.classes, planned) for name, p in said.items()}
    report: dict[str, Any] = {"before": Path(before).name, "after": Path(after).name, "n": len(planned)}
    report["accuracy"] = by_slot(right["before"], right["after"], planned)
    if options.stand_in:
        report |= rated(options.stand_in, images, planned, device)

    data = options.real_data()
    rows = read_split(data, "val", require=("path", "Text", "modality", "finding"))
    modalities = {p["modality"] for p in planned}
    rows = [row for row in rows if class_of(row)[0] in modalities]
    val_names = [class_of(row)[0] for row in rows]
    size, folder_of_images = images["before"].shape[-1], folder / IMAGES
    val_images = map_images(folder_of_images / "val", rows, data, size, reading=options.reading_elsewhere())
    val = by_modality(encoder.encode_images(val_images)[0], val_names)
    features = {name: encoder.encode_images(drawn)[0] for name, drawn in images.items()}
    report |= distances(features, planned, val)
    report["inception_score"] = {name: round(inception_score(p), 4) for name, p in said.items()}
    report["diversity"] = {
        # As large as MS-SSIM's coarsest scale needs.
        name: diversity(at_least(drawn, 176).to(device), features[name], planned, val, options.pairs)
        for name, drawn in images.items()
    }
    if not options.skip_memorisation:
        vae = MinimPipeline.from_pretrained(before, filter_head=None).vae.to(device).eval()
        held_out = by_modality(val_images, val_names)
        report["copies"] = copies(options, images, planned, held_out, vae, folder_of_images / "train")
    shutil.rmtree(folder_of_images)
    save_sheet(images, planned, folder / "sheet.png")
    write_report(folder / "report.json", report)
    return report


# What `summary` calls a figure, where its key does not say it as people write it.
LABELS = {"rated_3_by_stand_in": "rated 3 by the stand-in", "inception_score": "inception score", "ms_ssim": "MS-SSIM"}


def summary(report: dict) -> str:
    """The figures in some lines."""
    lines = []
    for name in ("accuracy", "rated_3_by_stand_in"):
        if name in report:
            r = report[name]
            low, high = (100 * v for v in r["interval"])
            lines.append(
                f"{LABELS.get(name, name)}: {r['before']:.3f} -> {r['after']:.3f} "
                f"({100 * r['difference']:+.1f} points [{low:+.1f}, {high:+.1f}], n {r['n']})"
            )
            for kind in ("phrasings", "modalities"):
                each = r[kind].items()
                lines.append("  " + "; ".join(f"{k} {v['before']:.3f} -> {v['after']:.3f}" for k, v in each))
    plain = {name: report[name] for name in ("kid", "frechet", "inception_score")}
    for name in ("ms_ssim", "recall"):
        plain[name] = {when: report["diversity"][when][name] for when in ("before", "after")}
    for space, r in report.get("copies", {}).items():
        plain[f"copies, {space}"] = {when: r[when]["share"] for when in ("before", "after")}
    lines += [f"{LABELS.get(name, name)}: {r['before']} -> {r['after']}" for name, r in plain.items()]
    return "\n".join(lines)
