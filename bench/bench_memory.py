"""Peak memory of encoding and some training steps, and of an evaluation, at several numbers of images, in MiB.

    python bench/bench_memory.py --sizes 500 5000 --resolution 64
    python bench/bench_memory.py --sizes 2000 20000 100000 --resolution 512 --parts training -- --latent_variants 1

Images are noise, made in a temporary folder; the networks are tiny, so that what grows with the images shows. Each
size is a process of its own, whose peak the system tells (ru_maxrss); 16 images show what the rest takes. Options
behind `--` are of train_text_to_image.py.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image


ROOT = Path(__file__).resolve().parents[1]
SETS = ("real", "synthetic")
FEWEST = 16  # images, beside which the sizes are laid
# In a process of its own: one that has much memory hands its peak on to those that it starts.
NETWORKS = """
import sys
from minim_pipeline import EMBEDDED_CHECKPOINT
from minim_pipeline.evaluation.encoder import ImageTextEncoder
from minim_pipeline.training.autoencoder import new_autoencoder
from minim_pipeline.training.image_text_encoder import ImageTextEncoderConfig, make_model
from transformers import CLIPTokenizer
folder, resolution = sys.argv[1], int(sys.argv[2])
new_autoencoder("tiny", resolution).save_pretrained(folder + "/vae")
tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED_CHECKPOINT / "tokenizer")
config = ImageTextEncoderConfig(train_data="", output_dir="", width=8, text_width=32, projection=32, resolution=32)
ImageTextEncoder(make_model(config, tokenizer), tokenizer, 32).save_pretrained(folder + "/encoder")
print(EMBEDDED_CHECKPOINT)
"""


def write_images(folder: Path, count: int, resolution: int, seed: int) -> Path:
    """Coarse noise as JPEG files, and their CSV: a tenth is to validate on."""
    folder.mkdir()

    def write(i: int) -> None:
        noise = np.random.default_rng([seed, i]).integers(0, 256, (16, 16), dtype=np.uint8)
        Image.fromarray(noise).resize((resolution, resolution), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg")

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(write, range(count), chunksize=256):
            pass
    with open(folder / "data.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "Text", "modality", "finding", "split"])
        for i in range(count):
            split = "val" if i % 10 == 9 else "train"
            rows.writerow([f"{i}.jpg", f"finding {i % 40}, seen on a film", "CXR", f"finding {i % 40}", split])
    return folder / "data.csv"


def peak(*command: str | Path) -> tuple[float, float]:
    """MiB and seconds that a Python process takes; raises CalledProcessError if it fails."""
    begun = time.monotonic()
    with tempfile.TemporaryFile("w+") as told:
        process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdout=told, stderr=told)
        _, status, used = os.wait4(process.pid, 0)
        if code := os.waitstatus_to_exitcode(status):
            told.seek(0)
            raise subprocess.CalledProcessError(code, process.args, told.read()[-2000:])
    return used.ru_maxrss / 1024, time.monotonic() - begun


def training(folder: Path, base: str, count: int, resolution: int, more: list[str]) -> tuple[float, float]:
    data = write_images(folder / f"train-{count}", count, resolution, 0)
    options = ["--preset", "tiny", "--vae", folder / "vae", "--text_encoder", base, "--resolution", resolution]
    options += ["--train_data", data, "--output_dir", folder / f"run-{count}", "--train_batch_size", 16]
    options += ["--max_train_steps", 8, "--validation_samples", 1, "--num_inference_steps", 1]
    return peak("train/train_text_to_image.py", *options, *more)


def evaluation(folder: Path, count: int, resolution: int) -> tuple[float, float]:
    sets = {name: write_images(folder / f"{name}-{count}", count, resolution, i) for i, name in enumerate(SETS, 1)}
    options = [option for name in SETS for option in (f"--{name}", sets[name])]
    options += ["--encoder", folder / "encoder", "--resolution", resolution, "--device", "cpu", "--no-real-images"]
    return peak("-m", "minim_pipeline.cli", "evaluate", *options, "--output-dir", folder / f"report-{count}")


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[500, 5000], help="Images; in evaluation of each set.")
    parser.add_argument("--resolution", type=int, default=64, help="In pixels.")
    parser.add_argument("--parts", nargs="+", choices=["training", "evaluation"], default=["training", "evaluation"])
    parser.add_argument("more", nargs="*", help="Further options of train_text_to_image.py, behind `--`.")
    options = parser.parse_args(argv)
    result: dict = {"resolution": options.resolution}
    with tempfile.TemporaryDirectory(prefix="minim-") as place:
        folder = Path(place)
        networks = [sys.executable, "-c", NETWORKS, place, str(options.resolution)]
        base = subprocess.run(networks, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()[-1]
        for part in options.parts:
            found = result[part] = {"peak_mib": {}, "seconds": {}}
            for count in (FEWEST, *options.sizes):
                if part == "training":
                    mib, seconds = training(folder, base, count, options.resolution, options.more)
                else:
                    mib, seconds = evaluation(folder, count, options.resolution)
                found["peak_mib"][count], found["seconds"][count] = round(mib), round(seconds)
                print(part, count, found["peak_mib"][count], "MiB", flush=True, file=sys.stderr)
            first, last = (found["peak_mib"][size] for size in (options.sizes[0], options.sizes[-1]))
            found["ratio"] = round(last / first, 3)
            found["above_few"] = last - found["peak_mib"][FEWEST]
    print(json.dumps(result, indent=2))
    return result


if __name__ == "__main__":
    main()
