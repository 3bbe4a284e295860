"""Shards: that processes which are killed lose and double nothing, and how many images a second each format takes.

python bench/bench_shards.py kills --images 2000 --kills 5       # SIGKILL at random, 2 processes; bit-equal at the end
python bench/bench_shards.py formats --images 512 --device cuda --dtype bfloat16 --batch_size 64
python bench/bench_shards.py writing --images 4096               # the same, of images that are drawn already
python bench/bench_shards.py processes --images 256              # --shard 0/2 beside 1/2, against one process
python bench/bench_shards.py plan                                # 1,000,000 rows: seconds and MiB
"""

import argparse
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from minim_pipeline import EMBEDDED_CHECKPOINT


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kills", "formats", "writing", "processes", "plan"])
    parser.add_argument("--model", default=str(EMBEDDED_CHECKPOINT))
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--shard_size", type=int, help="Default: a twentieth of the images.")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=60, help="The longest time before a kill.")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--num_inference_steps", type=int, default=4)
    parser.add_argument("--format", default="parquet")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args(argv)
    args.shard_size = args.shard_size or -(-args.images // 20)
    return args


def command(args, out: Path, *more: str) -> list[str]:
    given = [sys.executable, "-m", "minim_pipeline.cli", "generate", "--model", args.model, "--no-filter", "--quiet"]
    given += ["--prompt", "normal", "--modality", "OCT", "--num-images", args.images, "--shard-size", args.shard_size]
    given += ["--num-inference-steps", args.num_inference_steps, "--batch-size", args.batch_size]
    given += ["--device", args.device, "--dtype", args.dtype, "--format", args.format, "--output-dir", out, *more]
    return list(map(str, given))


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def kills(args, folder: Path) -> dict:
    """Two processes share a plan, and one of them is killed at random again and again."""
    dice, killed, starts = random.Random(0), 0, 0
    while True:
        running = [subprocess.Popen(command(args, folder / "out", "--shard", part)) for part in ("0/2", "1/2")]
        starts += 2
        deadline = time.monotonic() + dice.uniform(0.2, 1) * args.seconds
        while killed < args.kills and time.monotonic() < deadline and any(p.poll() is None for p in running):
            time.sleep(0.05)
        alive = [process for process in running if process.poll() is None]
        if killed < args.kills and alive:
            os.kill(dice.choice(alive).pid, signal.SIGKILL)
            killed += 1
        codes = [process.wait() for process in running]
        if not any(codes):
            break
    subprocess.run(command(args, folder / "unbroken"), check=True)
    there, unbroken = digests(folder / "out"), digests(folder / "unbroken")
    ids = [i for file in sorted((folder / "out/data").glob("*.parquet")) for i in read_ids(file)]
    equal = there == unbroken
    return {"kills": killed, "processes": starts, "images": len(ids), "distinct": len(set(ids)), "bit_equal": equal}


def read_ids(file: Path) -> list[int]:
    from pyarrow import parquet

    return parquet.read_table(file, columns=["id"])["id"].to_pylist()


def formats(args, folder: Path) -> dict:
    """Images a second of each format in one process, after a shard that is not counted; and of drawing alone."""
    import torch

    from minim_pipeline.generate import draw, shards
    from minim_pipeline.generate.options import GenerateOptions, ShardOptions
    from minim_pipeline.generate.plan import request_prompt
    from minim_pipeline.generate.plan_table import make_plan
    from minim_pipeline.modalities import MODALITIES

    shared = {name: getattr(args, name) for name in ("model", "num_inference_steps", "batch_size", "dtype", "device")}
    options = GenerateOptions(no_filter=True, quiet=True, **shared)
    loaded = draw.load(options)
    shards.load = lambda options: loaded
    rates, drawing, drawn = {}, [], []
    original = draw.draw

    def timed(pipe, batch, *given, **more):
        start = time.perf_counter()
        if args.what == "writing" and drawn:
            output = drawn[0]
        else:
            output = original(pipe, batch, *given, **more)
            drawn.append(output)
        drawing.append(time.perf_counter() - start)
        return output

    draw.draw = timed
    for name in ("png", "parquet", "webdataset", "dicom"):
        for images in (args.batch_size, args.images):
            plan = make_plan(request_prompt("normal", MODALITIES["oct"], images, 0))
            drawing.clear()
            start, own = time.perf_counter(), time.thread_time()
            chosen = ShardOptions(format=name, shard_size=max(args.shard_size, args.batch_size))
            shards.generate_shards(plan, folder / f"{name}-{images}", options, chosen)
            seconds, own = time.perf_counter() - start, time.thread_time() - own
        rates[name] = {
            "images_per_second": round(args.images / seconds, 2),
            "share_of_time_drawing": round(sum(drawing) / seconds, 3),
            "own_thread_ms_an_image": round(1000 * own / args.images, 2),  # while a GPU would wait
        }
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu"
    return {"device": device, "cores": os.cpu_count(), "formats": rates}


writing = formats


def processes(args, folder: Path) -> dict:
    """Seconds of one process of one thread, and of two side by side, importing and loading included."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    subprocess.run(command(args, folder / "one"), check=True, env=environment)
    one = time.perf_counter() - start
    start = time.perf_counter()
    both = [
        subprocess.Popen(command(args, folder / "two", "--shard", part), env=environment) for part in ("0/2", "1/2")
    ]
    codes = [process.wait() for process in both]
    two = time.perf_counter() - start
    equal = digests(folder / "one") == digests(folder / "two")
    return {"one_s": round(one, 1), "two_s": round(two, 1), "times": round(one / two, 2), "bit_equal": equal,
            "codes": codes}  # fmt: skip


def plan(args, folder: Path) -> dict:
    """A million images of a thousand prompts, planned and written."""
    from minim_pipeline.generate.plan import request_file
    from minim_pipeline.generate.plan_table import make_plan, write_plan

    lines = ["Text,modality,finding,num_images", *(f"drusen {i},OCT,drusen,1000" for i in range(1000))]
    (folder / "prompts.csv").write_text("\n".join(lines) + "\n")
    start = time.perf_counter()
    made = make_plan(request_file(folder / "prompts.csv", 1, 0))
    write_plan(made, folder / "plan.parquet")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    size = (folder / "plan.parquet").stat().st_size / 2**20
    return {"rows": len(made), "s": round(time.perf_counter() - start, 2), "peak_mib": round(peak), "mib": round(size)}


def main(argv=None) -> None:
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(globals()[args.what](args, Path(folder)), indent=2))


if __name__ == "__main__":
    main()
