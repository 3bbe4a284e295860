"""How long a table takes to be read and its images to be looked at before training: the first time, and again.

    python bench/bench_data.py --images 100000 --formats csv parquet webdataset

Of every format the same noise images, made in a temporary folder. Seconds are those of a process of its own, after its
imports, until rows and images are known as a trainer knows them (`key_of`); MiB its peak. `missing_s`: until a CSV of
which one image is missing is refused.
"""

import argparse
import csv
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image


ROOT = Path(__file__).resolve().parents[1]
SHARD = 8192  # images
READ = """
import json, resource, sys, time
from minim_pipeline.data.image_loading import key_of
from minim_pipeline.training.config import DataOptions
from minim_pipeline.training.rows import read_splits
begun, problem = time.monotonic(), None
try:
    data = DataOptions(train_data=sys.argv[1])
    for rows in read_splits(data):
        key_of(rows, data.train_data, data.reading)
except ValueError as error:
    problem = str(error)
mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
print(json.dumps({"s": round(time.monotonic() - begun, 1), "mib": mib, "problem": problem}))
"""


def picture(i: int, side: int) -> bytes:
    data = io.BytesIO()
    noise = np.random.default_rng(i).integers(0, 256, (side, side), dtype=np.uint8)
    Image.fromarray(noise).save(data, "PNG", compress_level=1)
    return data.getvalue()


def row(i: int) -> dict[str, str]:
    split = "val" if i % 10 == 9 else "train"
    return {"Text": f"finding {i % 40}, seen on a film", "modality": "CXR", "finding": f"{i % 40}", "split": split}


def write_csv(folder: Path, count: int, side: int) -> Path:
    with open(folder / "data.csv", "w", newline="") as file:
        table = csv.DictWriter(file, ["path", *row(0)])
        table.writeheader()
        for i in range(count):
            place = Path(f"{i // SHARD:05d}", f"{i:07d}.png")
            (folder / place.parent).mkdir(exist_ok=True)
            (folder / place).write_bytes(picture(i, side))
            table.writerow({"path": place.as_posix()} | row(i))
    return folder / "data.csv"


def write_parquet(folder: Path, count: int, side: int) -> Path:
    import pyarrow as pa
    from pyarrow import parquet

    for first in range(0, count, SHARD):
        numbers = range(first, min(first + SHARD, count))
        images = [{"image": {"bytes": picture(i, side), "path": f"{i:07d}.png"}} | row(i) for i in numbers]
        parquet.write_table(pa.Table.from_pylist(images), folder / f"{first:07d}.parquet", row_group_size=100)
    return folder


def write_webdataset(folder: Path, count: int, side: int) -> Path:
    for first in range(0, count, SHARD):
        with tarfile.open(folder / f"{first:07d}.tar", "w") as tar:
            for i in range(first, min(first + SHARD, count)):
                for name, data in ((f"{i:07d}.png", picture(i, side)), (f"{i:07d}.json", json.dumps(row(i)).encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder


def read(source: Path, home: Path) -> dict:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(home)}
    environment.pop("HF_DATASETS_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", READ, str(source)], env=environment, cwd=ROOT, check=True, stdout=subprocess.PIPE
    )
    return json.loads(done.stdout.splitlines()[-1])


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--side", type=int, default=64, help="Of the images, in pixels.")
    formats = {"csv": write_csv, "parquet": write_parquet, "webdataset": write_webdataset}
    parser.add_argument("--formats", nargs="+", choices=formats, default=list(formats))
    args = parser.parse_args(argv)
    report: dict[str, dict] = {}
    for name in args.formats:
        with tempfile.TemporaryDirectory() as place:
            folder, home = Path(place, "set"), Path(place, "home")
            folder.mkdir()
            source = formats[name](folder, args.images, args.side)
            first, again = read(source, home), read(source, home)
            report[name] = {"first_s": first["s"], "again_s": again["s"], "mib": max(first["mib"], again["mib"])}
            if name == "csv":
                (folder / "00000" / "0000000.png").unlink()
                refused = read(source, Path(place, "other"))
                assert "no image" in refused["problem"]
                report[name]["missing_s"] = refused["s"]
        print(json.dumps({name: report[name]}), flush=True)
    return report


if __name__ == "__main__":
    main()
