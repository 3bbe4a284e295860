"""The figures of a trained model: its autoencoder, what judges see in its images, copies, and sheets to look at.

    python train/report_model.py --model minim_pipeline/checkpoints/minim-256 --data data.csv \
        --output report.json --sheets docs/sheets

- Autoencoder, on val images as they are delivered (bars not trimmed): mean PSNR, and energy in the highest octave of
  reconstructions over that of originals (`highest_octave` in train_autoencoder.py).
- Judges (train_classifier.py): equally many images of each finding, at the model's default settings, for phrasings as
  in training and for new ones (`--phrasings test`: for those of other styles); beside the judges' own accuracy on
  val images.
- Memorisation (minim_pipeline/evaluation/memorisation.py), in latents and in pixels.
- Checks: equal channels, letterboxes, specks; and a sheet a modality, seeds in order, nothing picked.

Findings that the judges do not know (too few images) are left out, and modalities without val images.
"""

import argparse
import json
import platform
import re
import time
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from train_classifier import format_report

from minim_pipeline import MODALITIES, MinimPipeline, resolve_modality
from minim_pipeline.data.image_loading import load_images, trim_letterbox
from minim_pipeline.data.image_reader import add_reading_arguments, reading_of
from minim_pipeline.data.splits import read_split
from minim_pipeline.evaluation.images import to_unit
from minim_pipeline.evaluation.judges import accuracy_report, load_judges
from minim_pipeline.evaluation.memorisation import latent_features, memorisation_report, pixel_features
from minim_pipeline.evaluation.sampling import draw_images, kept
from minim_pipeline.generate.command import model_identity
from minim_pipeline.training.arguments import check_numbers
from minim_pipeline.training.captions import CAPTIONS, load_captions
from minim_pipeline.training.reconstruction import reconstruction_figures


# The call's arguments that the report may be asked to change.
SAMPLING = ("num_inference_steps", "guidance_scale", "guidance_rescale", "guidance_interval")


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="A MinimPipeline's folder or Hub id.")
    parser.add_argument(
        "--judges", default=str(Path(__file__).parent / "judges"), help="The output_dir of train_classifier.py."
    )
    parser.add_argument("--data", required=True, help="CSV with path,Text,modality,finding[,split].")
    parser.add_argument("--captions", default=str(CAPTIONS))
    parser.add_argument("--output", required=True, help="The report, JSON.")
    add_reading_arguments(parser)
    parser.add_argument("--sheets", help="Folder for a sheet of 5 x 8 generated images a modality.")
    parser.add_argument("--save_images", help="Folder for the generated images; found there, they are not made again.")
    parser.add_argument(
        "--phrasings",
        nargs="+",
        choices=["train", "new", "test"],
        default=["train", "new"],
        help="Sets to draw with: as in training, new ones, and those of other styles, which are for final figures.",
    )
    parser.add_argument("--images_per_finding", type=int, default=64)
    parser.add_argument("--num_inference_steps", type=int, help="Default: the model's.")
    parser.add_argument("--guidance_scale", type=float, help="Default: the model's.")
    parser.add_argument("--guidance_rescale", type=float, help="Default: the model's.")
    parser.add_argument("--guidance_interval", type=float, nargs=2, help="Default: the model's.")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="Image i of each set of phrasings has this seed plus i.")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--compile", action="store_true", help="torch.compile U-Net and decoder.")
    parser.add_argument("--skip_autoencoder", action="store_true")
    parser.add_argument("--skip_memorisation", action="store_true")
    parser.add_argument("--threads", type=int, help="CPU threads.")
    args = parser.parse_args(argv)
    check_numbers(parser, args)
    return args


def plan(classes, learned, captions: dict, phrasing: str, count: int, seed: int) -> list[dict]:
    """What to generate: `count` images a finding that judges and model both know, phrasings in turn.

    Raises:
        ValueError: `captions` has no such phrasings of one of these findings.
    """
    planned = []
    for modality, finding in classes:
        if finding not in learned.get(modality, []):
            continue
        texts = captions.get(modality, {}).get(finding, {}).get(phrasing)
        if not texts:
            raise ValueError(f"The captions have no {phrasing!r} phrasings of {finding!r} of {modality!r}.")
        planned += [
            {
                "modality": modality,
                "finding": finding,
                "prompt": texts[i % len(texts)],
                "seed": seed + len(planned) + i,
            }
            for i in range(count)
        ]
    return planned


def generate(pipe, planned: list[dict], batch_size: int, settings: dict, cache: Path | None = None) -> torch.Tensor:
    """The planned images, uint8 [N, 3, H, W]; kept in the file `cache`, and made only if that is missing.

    Raises:
        ValueError: `cache` holds images of another model, or of other settings.
    """

    def draw():
        return draw_images(
            pipe,
            [p["prompt"] for p in planned],
            [p["modality"] for p in planned],
            [p["seed"] for p in planned],
            batch_size,
            **{name: settings[name] for name in SAMPLING if name in settings},
        )

    return kept(cache, json.dumps({"settings": settings, "images": planned}), draw) if cache else draw()


def specks(images: torch.Tensor, threshold: float = 0.25) -> float:
    """Share of pixels that differ by more than `threshold` of the range from the median of their 3 x 3 neighbours."""
    total = 0.0
    for part in images.split(16):
        grey = to_unit(part).mean(1, keepdim=True)  # [B, 1, H, W]
        median = F.unfold(F.pad(grey, (1,) * 4, mode="replicate"), 3).median(1).values  # [B, H*W]
        total += ((grey.flatten(1) - median).abs() > threshold).float().mean(1).sum().item()
    return total / len(images)


def checks(images: torch.Tensor, real: torch.Tensor, modality: str) -> dict:
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


def save_sheet(images: torch.Tensor, findings: list[str], path: Path, rows: int = 5, columns: int = 8) -> None:
    """A sheet of `rows` x `columns` images: the findings in turn, each in the order of its seeds."""
    queues = {finding: [i for i, f in enumerate(findings) if f == finding] for finding in dict.fromkeys(findings)}
    order = [
        queue[turn] for turn in range(max(map(len, queues.values()))) for queue in queues.values() if turn < len(queue)
    ]
    order = order[: rows * columns]
    height, width = images.shape[-2:]
    sheet = np.zeros((rows * height, columns * width, 3), np.uint8)
    for place, i in enumerate(order):
        y, x = place // columns * height, place % columns * width
        sheet[y : y + height, x : x + width] = images[i].permute(1, 2, 0).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    if (sheet == sheet[:, :, :1]).all():
        sheet = sheet[:, :, 0]
    Image.fromarray(sheet).save(path, optimize=True)


def save_overview(folder: Path, names: list[str], rows: int = 5) -> None:
    """`overview.png`: the first row of the sheet of every modality in `names`, at half the size."""
    strips = [Image.open(folder / f"{name}.png").convert("RGB") for name in names]
    width, height = strips[0].width, strips[0].height // rows
    overview = Image.new("RGB", (width // 2, len(strips) * (height // 2)))
    for i, strip in enumerate(strips):
        row = strip.crop((0, 0, width, height)).resize((width // 2, height // 2), Image.Resampling.LANCZOS)
        overview.paste(row, (0, i * (height // 2)))
    overview.save(folder / "overview.png", optimize=True)


def by_modality(images: torch.Tensor, names: list[str]) -> dict[str, torch.Tensor]:
    return {name: images[[i for i, n in enumerate(names) if n == name]] for name in dict.fromkeys(names)}


def format_memorisation(name: str, report: dict) -> str:
    lines = [f"nearer than the nearest 1 % of val images, in {name}: {report['share']:.3f} of {report['n']}"]
    for modality, r in report["modalities"].items():
        lines.append(
            f"  {modality:10s} {r['share']:.3f} of {r['n']} (limit {r['limit']:.4f} of {r['n_val']} val; "
            f"median {r['median']:.4f}, val {r['median_val']:.4f})"
        )
    return "\n".join(lines)


def main(argv=None) -> dict:
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    start = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipe = MinimPipeline.from_pretrained(args.model).to(device)
    pipe.set_progress_bar_config(disable=True)
    judges = load_judges(args.judges, device)
    captions = load_captions(args.captions)
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor

    def rows_of(split):
        rows = read_split(args.data, split, require=("path", "Text", "modality", "finding"), check_images=False)
        return rows, [resolve_modality(row["modality"]).id for row in rows]

    val_rows, val_names = rows_of("val")
    # Of a modality without real images there is nothing to compare with.
    learned = {name: found for name, found in pipe.config.findings.items() if name in val_names}
    left = [name for name in pipe.config.findings if name not in learned]
    if not learned:
        raise ValueError(f"{args.data} has no val images of what {args.model} has learned: {', '.join(left)}.")
    if left:
        print(f"left out, without val images in {args.data}: {', '.join(left)}")
    val = load_images(val_rows, args.data, size, reading=reading_of(args))
    report = {
        "model": re.sub(r".*/", "", str(args.model).rstrip("/")),
        "settings": {
            **{k: pipe.config[k] if getattr(args, k) is None else getattr(args, k) for k in SAMPLING},
            "scheduler": type(pipe.scheduler).__name__,
            "seed": args.seed,
            "batch_size": args.batch_size,
            "dtype": args.dtype,
            "compiled": args.compile,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
        "device": torch.cuda.get_device_name(0) if device.type == "cuda" else "cpu",
    }
    print(json.dumps(report["settings"]), report["device"])

    if not args.skip_autoencoder:
        delivered = load_images(val_rows, args.data, size, trim=False, reading=reading_of(args))
        figures = reconstruction_figures(pipe.vae, delivered, val_names)
        report["autoencoder"] = {**figures, "n": len(val_rows)}
        print("autoencoder on val:", json.dumps(figures))

    known = [i for i, row in enumerate(val_rows) if (val_names[i], row["finding"]) in judges.classes]
    report["judges_on_val"] = accuracy_report(
        judges.judge(val[known]),
        judges.classes,
        [val_names[i] for i in known],
        [val_rows[i]["finding"] for i in known],
        [val_rows[i].get("source", "") for i in known],
    )
    print(format_report("judges on val images", report["judges_on_val"]))

    if args.skip_memorisation:
        vae = None
    else:
        # Latents are compared in fp32, whatever the images are generated in.
        vae = type(pipe.vae).from_config(pipe.vae.config).to(device).eval()
        vae.load_state_dict(pipe.vae.state_dict())
    pipe.to(dtype=getattr(torch, args.dtype))
    if args.compile:
        pipe.unet.compile()
        pipe.vae.decoder.compile()

    generated, names, findings = [], [], []
    report["generated"] = {}
    for phrasing in args.phrasings:
        planned = plan(judges.classes, learned, captions, phrasing, args.images_per_finding, args.seed)
        settings = report["settings"] | {"model": model_identity(args.model)}
        begun = time.monotonic()
        cache = Path(args.save_images) / f"{phrasing}.npz" if args.save_images else None
        images = generate(pipe, planned, args.batch_size, settings, cache)
        asked = [p["modality"] for p in planned], [p["finding"] for p in planned]
        figures = accuracy_report(judges.judge(images), judges.classes, *asked)
        each = judges.judge_each(images)
        figures["each_judge"] = {
            name: accuracy_report(p, judges.classes, *asked)["balanced_accuracy"] for name, p in each.items()
        }
        figures["seconds"] = round(time.monotonic() - begun, 1)
        report["generated"][phrasing] = figures
        print(format_report(f"judges on generated images, phrasings {phrasing!r}", figures))
        if args.sheets and phrasing == args.phrasings[0]:
            for name, mine in by_modality(images, asked[0]).items():
                of = [f for n, f in zip(*asked) if n == name]
                save_sheet(mine, of, Path(args.sheets) / f"{name}.png")
            save_overview(Path(args.sheets), list(dict.fromkeys(asked[0])))
        generated.append(images)
        names += asked[0]
        findings += asked[1]

    samples, real = by_modality(torch.cat(generated), names), by_modality(val, val_names)
    report["checks"] = {name: checks(images, real[name], name) for name, images in samples.items()}
    for name, figures in report["checks"].items():
        print(f"checks {name:10s} {json.dumps(figures)}")

    if vae is not None:
        train_rows, train_names = rows_of("train")
        train = by_modality(load_images(train_rows, args.data, size, reading=reading_of(args)), train_names)
        mirror = {name: MODALITIES[name].flip for name in samples}
        report["memorisation"] = {
            "latents": memorisation_report(
                samples, real, train, lambda images: latent_features(images, vae), mirror, remove_mean=True
            ),
            "pixels": memorisation_report(samples, real, train, lambda i: pixel_features(i.to(device)), mirror),
        }
        for name, figures in report["memorisation"].items():
            print(format_memorisation(name, figures))
    report["minutes"] = round((time.monotonic() - start) / 60, 2)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text(json.dumps(report, indent=2) + "\n")
    return report


if __name__ == "__main__":
    main()
