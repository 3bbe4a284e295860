"""What the filter costs: seconds and U-Net samples of an image with it and without it, in turn in one run.

python bench/bench_filter.py                                     # the embedded model, 4 images a call
python bench/bench_filter.py --batch_size 1 --repeats 1          # quick
"""

import argparse
import json
import time

import torch

from minim_pipeline import EMBEDDED_CHECKPOINT, MinimPipeline


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(EMBEDDED_CHECKPOINT), help="A pipeline with a filter head.")
    parser.add_argument("--batch_size", type=int, default=4, help="Images a call.")
    parser.add_argument("--num_candidates", type=int, help="Default: the model's.")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--repeats", type=int, default=3, help="Timed pairs of calls; medians count.")
    return parser.parse_args(argv)


def main(argv=None) -> dict:
    args = parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = MinimPipeline.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).to(device)
    pipe.set_progress_bar_config(disable=True)
    if pipe.filter_head is None:
        raise ValueError(f"{args.model} has no filter head.")
    ways = {"plain": {"use_filter": False}, "filter": {"num_candidates": args.num_candidates}}
    seconds, samples, counted = {name: [] for name in ways}, {}, []
    pipe.unet.register_forward_hook(lambda unet, given, made: counted.append(len(made[0])))
    modality = (pipe.config.modalities or ["cxr"])[0]
    for repeat in range(args.repeats + 1):
        for name, options in ways.items():
            first, prompts = repeat * args.batch_size, ["normal"] * args.batch_size
            generators = [torch.Generator().manual_seed(first + i) for i in range(args.batch_size)]
            counted.clear()
            start = time.perf_counter()
            pipe(prompts, modality, generator=generators, output_type="pt", **options).images.cpu()
            if repeat:  # the first pair warms up
                seconds[name].append(time.perf_counter() - start)
            samples[name] = sum(counted) / args.batch_size
    median = {name: sorted(values)[len(values) // 2] / args.batch_size for name, values in seconds.items()}
    result = {
        "device": torch.cuda.get_device_name(0) if device == "cuda" else "cpu",
        "dtype": args.dtype,
        "batch_size": args.batch_size,
        "num_candidates": args.num_candidates or pipe.config.num_candidates,
        "unet_samples_an_image": samples,
        "ratio_of_samples": round(samples["filter"] / samples["plain"], 3),
        "seconds_an_image": {name: round(value, 3) for name, value in median.items()},
        "ratio_of_seconds": round(median["filter"] / median["plain"], 3),
    }
    print(json.dumps(result, indent=2))
    return result


if __name__ == "__main__":
    main()
