"""The figures of a trained model: its autoencoder, what judges see in its images, copies, and sheets to look at.

    python research/report_model.py --model minim_pipeline/checkpoints/minim-256 --data data.csv \
        --output report.json --sheets docs/sheets

- Autoencoder, on val images as they are delivered (bars not trimmed): mean PSNR, and energy in the highest octave of
  reconstructions over that of originals (`highest_octave` in minim_pipeline/training/autoencoder.py).
- Judges (train_classifier.py): equally many images of each finding, at the model's default settings, for phrasings as
  in training and for new ones (`--phrasings test`: for those of other styles); beside the judges' own accuracy on
  val images. The images are the generator's own, or with `--drawn` what `minim generate` drew for the prompts of
  `plan_prompts.py`, with the filter, and which share that accepted.
- Memorisation (minim_pipeline/evaluation/memorisation.py), in latents and in pixels.
- Checks: equal channels, letterboxes, specks; and a sheet a modality, seeds in order, nothing picked.

Findings that the judges do not know (too few images) are left out, and modalities without val images.
"""

import itertools
import json
import platform
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKL
from torch import Tensor

from minim_pipeline import CAPTIONS, MODALITIES, MinimPipeline, resolve_modality
from minim_pipeline.cache import cached_tensor
from minim_pipeline.contact_sheet import contact_sheet
from minim_pipeline.data.image_loading import load_images, trim_letterbox
from minim_pipeline.data.sources import read_dataset
from minim_pipeline.data.splits import read_split
from minim_pipeline.evaluation.comparison import JUDGES
from minim_pipeline.evaluation.images import to_unit
from minim_pipeline.evaluation.judges import Judges, accuracy_report, class_of, format_report, load_judges
from minim_pipeline.evaluation.memorisation import copies_in_both_spaces, format_memorisation
from minim_pipeline.evaluation.metrics import places
from minim_pipeline.evaluation.report import ImageSet, acceptance
from minim_pipeline.evaluation.sampling import by_modality, draw_planned, plan
from minim_pipeline.files import write_report
from minim_pipeline.loading import model_identity
from minim_pipeline.training.autoencoder import reconstruction_figures
from minim_pipeline.training.captions import load_captions
from minim_pipeline.training.config import Count, ReadingOptions, Share, Weight, Whole, option, parse


# The call's arguments that the report may be asked to change.
SAMPLING = ("num_inference_steps", "guidance_scale", "guidance_rescale", "guidance_interval")
SHEET = (5, 8)  # rows and columns


@dataclass(kw_only=True)
class ReportConfig(ReadingOptions):
    """Options of the report."""

    model: str = option(help="A MinimPipeline's folder or Hub id.")
    judges: str = option(JUDGES, "The output_dir of train_classifier.py.")
    data: str = option(help="CSV with path,Text,modality,finding[,split].")
    captions: str = option(str(CAPTIONS), "JSON with phrasings of every finding.")
    output: str = option(help="The report, JSON.")
    sheets: str | None = option(None, "Folder for a sheet of 5 x 8 generated images a modality.")
    save_images: str | None = option(None, "Folder for the generated images; found there, they are not made again.")
    phrasings: list[str] = option(
        ["train", "new"],
        "Sets to draw with: as in training, new ones, and those of other styles, which are for final figures.",
        choices=["train", "new", "test"],
    )
    drawn: list[str] = option(
        [], "Instead of drawing: CSV files of `minim generate` with the column finding, each named by its folder."
    )
    images_per_finding: Count = 64
    num_inference_steps: Count | None = option(None, "Default: the model's.")
    guidance_scale: Weight | None = option(None, "Default: the model's.")
    guidance_rescale: Weight | None = option(None, "Default: the model's.")
    guidance_interval: list[Share] | None = option(None, "Two numbers; default: the model's.")
    batch_size: Count = 64
    seed: Whole = option(0, "Image i of each set of phrasings has this seed plus i.")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    compile: bool = option(False, "torch.compile U-Net and decoder.")
    skip_autoencoder: bool = False
    skip_memorisation: bool = False
    threads: Count | None = option(None, "CPU threads.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guidance_interval and len(self.guidance_interval) != 2:
            raise ValueError(f"--guidance_interval has to be two numbers, got {self.guidance_interval}.")


class RealImages:
    """The val images of what the model has learned, uint8, and how the others are read."""

    def __init__(self, config: ReportConfig, pipe: MinimPipeline):
        self.config, self.size = config, pipe.unet.config.sample_size * pipe.vae_scale_factor
        self.rows, self.names = self.rows_of("val")
        self.images = self.load(self.rows)
        # Of a modality without real images there is nothing to compare with.
        self.learned = {name: found for name, found in pipe.config.findings.items() if name in self.names}
        left_out = [name for name in pipe.config.findings if name not in self.learned]
        names = ", ".join(left_out)
        if not self.learned:
            raise ValueError(f"{config.data} has no val images of what {config.model} has learned: {names}.")
        if left_out:
            print(f"left out, without val images in {config.data}: {names}")

    def rows_of(self, split: str) -> tuple[list[dict], list[str]]:
        require = ("path", "Text", "modality", "finding")
        rows = read_split(self.config.data, split, require=require, check_images=False)
        return rows, [resolve_modality(row["modality"]).id for row in rows]

    def load(self, rows: list[dict], trim: bool = True) -> Tensor:
        return load_images(rows, self.config.data, self.size, trim=trim, reading=self.config.reading_elsewhere())


def settings_report(config: ReportConfig, pipe: MinimPipeline, device: torch.device) -> dict:
    return {
        "model": re.sub(r".*/", "", config.model.rstrip("/")),
        "settings": {
            **{k: pipe.config[k] if getattr(config, k) is None else getattr(config, k) for k in SAMPLING},
            "scheduler": type(pipe.scheduler).__name__,
            **config.values("seed", "batch_size", "dtype"),
            "compiled": config.compile,
        },
        "versions": {
            "python": platform.python_version(),
            **{package.__name__: package.__version__ for package in (torch, diffusers, transformers)},
        },
        "device": torch.cuda.get_device_name(0) if device.type == "cuda" else "cpu",
    }


def real_report(config: ReportConfig, pipe: MinimPipeline, judges: Judges, real: RealImages) -> dict:
    """What autoencoder and judges make of real images."""
    report = {}
    if not config.skip_autoencoder:
        figures = reconstruction_figures(pipe.vae, real.load(real.rows, trim=False), real.names)
        report["autoencoder"] = {**figures, "n": len(real.rows)}
        print("autoencoder on val:", json.dumps(figures))
    known = [i for i, row in enumerate(real.rows) if (real.names[i], row["finding"]) in judges.classes]
    rows = [real.rows[i] for i in known]
    asked = [real.names[i] for i in known], [row["finding"] for row in rows]
    sources = [row.get("source", "") for row in rows]
    report["judges_on_val"] = accuracy_report(
        judges.judge(real.images[known]), judges.classes, *asked, sources, judges.families
    )
    print(format_report("judges on val images", report["judges_on_val"]))
    return report


def generate(
    pipe: MinimPipeline, planned: list[dict], batch_size: int, settings: dict, cache: Path | None = None
) -> Tensor:
    """The planned images, uint8 [N, 3, H, W]; stored in the file `cache`, and made only if that is missing.

    Raises:
        ValueError: `cache` holds images of another model, or of other settings.
    """

    def draw() -> Tensor:
        sampling = {name: settings[name] for name in SAMPLING if name in settings}
        return draw_planned(pipe, planned, batch_size, **sampling)

    return cached_tensor(cache, json.dumps({"settings": settings, "images": planned}), draw) if cache else draw()


def drawn_sets(
    config: ReportConfig, pipe: MinimPipeline, judges: Judges, real: RealImages, settings: dict
) -> Iterator[tuple[str, list[dict], Tensor]]:
    """Name, rows with modality and finding, and images uint8 [N, 3, H, W] of every set of generated images."""
    for path in config.drawn:
        rows = [row for row in read_dataset(path, require=("finding",)) if class_of(row) in judges.classes]
        images = load_images(rows, path, real.size, trim=False, reading=config.reading_elsewhere())
        yield Path(path).resolve().parent.name, rows, images
    captions, settings = load_captions(config.captions), settings | {"model": model_identity(config.model)}
    for phrasing in config.phrasings if not config.drawn else ():
        planned = plan(judges.classes, real.learned, captions, phrasing, config.images_per_finding, config.seed)
        cache = Path(config.save_images) / f"{phrasing}.safetensors" if config.save_images else None
        yield phrasing, planned, generate(pipe, planned, config.batch_size, settings, cache)


def generated_report(
    config: ReportConfig, pipe: MinimPipeline, judges: Judges, real: RealImages, settings: dict
) -> tuple[dict, dict[str, Tensor]]:
    """What judges see in generated images, for each set of phrasings, and all images by modality."""
    report, generated, names = {}, [], []
    begun = time.monotonic()
    for phrasing, rows, images in drawn_sets(config, pipe, judges, real, settings):
        asked = tuple(map(list, zip(*map(class_of, rows), strict=True)))
        each = judges.judge_each(images)
        figures, *alone = (
            accuracy_report(said, judges.classes, *asked, families=judges.families)
            for said in (torch.stack(list(each.values())).mean(0), *each.values())
        )
        figures["each_judge"] = {name: of["balanced_accuracy"] for name, of in zip(each, alone, strict=True)}
        figures["seconds"] = round(time.monotonic() - begun, 1)
        if config.drawn:
            figures["acceptance"] = acceptance(ImageSet(rows, images), "finding")
        report[phrasing] = figures
        print(format_report(f"judges on generated images, phrasings {phrasing!r}", figures))
        if config.sheets and len(report) == 1:
            save_sheets(images, *asked, Path(config.sheets))
        generated.append(images)
        names += asked[0]
        begun = time.monotonic()
    return report, by_modality(torch.cat(generated), names)


def specks(images: Tensor, threshold: float = 0.25) -> float:
    """Share of pixels that differ by more than `threshold` of the range from the median of their 3 x 3 neighbours."""
    total = 0.0
    for part in images.split(16):
        grey = to_unit(part).mean(1, keepdim=True)  # [B, 1, H, W]
        median = F.unfold(F.pad(grey, (1,) * 4, mode="replicate"), 3).median(1).values  # [B, H*W]
        total += ((grey.flatten(1) - median).abs() > threshold).float().mean(1).sum().item()
    return total / len(images)


def checks(images: Tensor, real: Tensor, modality: str) -> dict:
    """Flaws that show without a judge; specks beside those of real images, whose texture may look like them."""
    boxed = [trim_letterbox(image) is not image for image in images.permute(0, 2, 3, 1).numpy()]
    equal = bool((images == images[:, :1]).all())
    return {
        "equal_channels": equal if MODALITIES[modality].grey else None,
        "letterboxes": round(float(np.mean(boxed)), 4),
        "specks": round(specks(images), 6),
        "specks_real": round(specks(real), 6),
        "n": len(images),
    }


def in_turn(findings: list[str]) -> list[int]:
    """Places of the findings in turn, each in its order."""
    turns = itertools.zip_longest(*places(findings).values())
    return [place for turn in turns for place in turn if place is not None]


def save_sheet(images: Tensor, findings: list[str], path: Path, rows: int = 5, columns: int = 8) -> None:
    """A sheet of `rows` x `columns` images: the findings in turn, each in the order of its seeds."""
    chosen = images[in_turn(findings)[: rows * columns]]
    chosen = torch.cat([chosen, chosen.new_zeros(rows * columns - len(chosen), *chosen.shape[1:])])
    sheet = contact_sheet(chosen, columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    (sheet.convert("L") if (chosen == chosen[:, :1]).all() else sheet).save(path, optimize=True)


def save_sheets(images: Tensor, modalities: list[str], findings: list[str], folder: Path) -> None:
    """A sheet a modality, and `overview.png`: the first row of each, at half the size."""
    rows, columns = SHEET
    strips = []
    for name, index in places(modalities).items():
        own, of = images[index], [findings[i] for i in index]
        save_sheet(own, of, folder / f"{name}.png", rows, columns)
        strips.append(contact_sheet(own[in_turn(of)[:columns]], columns, images.shape[-1] // 2))
    contact_sheet(strips, 1).save(folder / "overview.png", optimize=True)


def copies_report(samples: dict[str, Tensor], real: RealImages, vae: AutoencoderKL) -> dict:
    rows, names = real.rows_of("train")
    train, val = by_modality(real.load(rows), names), by_modality(real.images, real.names)
    mirror = {name: MODALITIES[name].flip for name in samples}
    report = copies_in_both_spaces(samples, val, train, mirror, vae)
    for name, figures in report.items():
        print(format_memorisation(name, figures))
    return report


def main(argv: list[str] | None = None) -> dict:
    config = parse(ReportConfig, argv, __doc__)
    if config.threads:
        torch.set_num_threads(config.threads)
    start = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipe = MinimPipeline.from_pretrained(config.model).to(device)
    pipe.set_progress_bar_config(disable=True)
    judges, real = load_judges(config.judges, device), RealImages(config, pipe)
    report = settings_report(config, pipe, device)
    print(json.dumps(report["settings"]), report["device"])
    report |= real_report(config, pipe, judges, real)

    # Latents are compared in fp32, whatever the images are generated in.
    vae = type(pipe.vae).from_config(pipe.vae.config).to(device).eval()
    vae.load_state_dict(pipe.vae.state_dict())
    pipe.to(dtype=getattr(torch, config.dtype))
    if config.compile:
        pipe.unet.compile()
        pipe.vae.decoder.compile()
    report["generated"], samples = generated_report(config, pipe, judges, real, report["settings"])
    val = by_modality(real.images, real.names)
    report["checks"] = {name: checks(images, val[name], name) for name, images in samples.items()}
    for name, figures in report["checks"].items():
        print(f"checks {name:10s} {json.dumps(figures)}")
    if not config.skip_memorisation:
        report["memorisation"] = copies_report(samples, real, vae)
    report["minutes"] = round((time.monotonic() - start) / 60, 2)
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    write_report(Path(config.output), report)
    return report


if __name__ == "__main__":
    main()
