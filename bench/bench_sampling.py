"""Images a second of sampling, eager and compiled, or what the filter costs: side by side in one run, with guidance.

python bench/bench_sampling.py --dtype bfloat16                              # on a GPU
python bench/bench_sampling.py --filter --batch_size 4                       # seconds and U-Net samples of an image
python bench/bench_sampling.py --batch_size 2 --num_inference_steps 2 --repeats 1   # anywhere
"""

import argparse
import json
import statistics
import time

import torch

from minim_pipeline import EMBEDDED_CHECKPOINT, MinimPipeline


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(EMBEDDED_CHECKPOINT))
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--num_inference_steps", type=int, help="Default: 25; with --filter the model's.")
    parser.add_argument("--guidance_scale", type=float, help="Default: the model's; above 1, or it is no guidance.")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--repeats", type=int, default=5, help="Timed calls; the median counts.")
    parser.add_argument("--no_compile", action="store_true", help="Eager only.")
    parser.add_argument("--filter", action="store_true", help="Time calls with the filter and without it, in turn.")
    parser.add_argument("--num_candidates", type=int, help="Of the filter (default: the model's).")
    args = parser.parse_args(argv)
    if args.num_inference_steps is None and not args.filter:
        args.num_inference_steps = 25
    return args


def measure(pipe, args, **ways: dict) -> tuple[dict[str, float], dict[str, float]]:
    """By way, in which calls are made in turn: seconds and U-Net samples of an image.

    Seconds are the median over the repeats, after one call that is not timed.
    """
    modality, counted = (pipe.config.modalities or ["cxr"])[0], []
    seconds, samples = {name: [] for name in ways}, {}
    if args.filter:  # not beside compiled networks, which would be compiled anew
        pipe.unet.register_forward_hook(lambda unet, given, made: counted.append(len(made[0])))
    for repeat in range(args.repeats + 1):
        seeds = list(range(repeat * args.batch_size, (repeat + 1) * args.batch_size))
        noise = {"generator": [torch.Generator().manual_seed(s) for s in seeds]} if args.filter else {"seeds": seeds}
        for name, options in ways.items():
            options = options | noise | {"num_inference_steps": args.num_inference_steps, "output_type": "pt"}
            counted.clear()
            start = time.perf_counter()
            output = pipe(["normal"] * args.batch_size, modality, guidance_scale=args.guidance_scale, **options)
            output.images.cpu()  # waits for the device
            seconds[name].append((time.perf_counter() - start) / args.batch_size)
            samples[name] = sum(counted) / args.batch_size
    return {name: statistics.median_high(values[1:]) for name, values in seconds.items()}, samples


def measure_filter(pipe, args) -> dict:
    """What an image costs with the filter and without it."""
    if pipe.filter_head is None:
        raise ValueError(f"{args.model} has no filter head.")
    ways = {"plain": {"use_filter": False}, "filter": {"num_candidates": args.num_candidates}}
    seconds, samples = measure(pipe, args, **ways)
    return {
        "num_candidates": args.num_candidates or pipe.config.num_candidates,
        "unet_samples_an_image": samples,
        "ratio_of_samples": round(samples["filter"] / samples["plain"], 3),
        "seconds_an_image": {name: round(value, 3) for name, value in seconds.items()},
        "ratio_of_seconds": round(seconds["filter"] / seconds["plain"], 3),
    }


def measure_speed(pipe, args) -> dict:
    """Images a second, eager and compiled."""
    result = {"eager_images_per_second": round(1 / measure(pipe, args, eager={})[0]["eager"], 2)}
    if not args.no_compile:
        pipe.unet.compile()
        pipe.vae.decoder.compile()
        result["compiled_images_per_second"] = round(1 / measure(pipe, args, compiled={})[0]["compiled"], 2)
        result["ratio"] = round(result["compiled_images_per_second"] / result["eager_images_per_second"], 3)
    return result


def main(argv=None) -> dict:
    args = parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = MinimPipeline.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).to(device)
    pipe.set_progress_bar_config(disable=True)
    result = {
        "device": torch.cuda.get_device_name(0) if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "dtype": args.dtype,
        "batch_size": args.batch_size,
        "num_inference_steps": args.num_inference_steps or pipe.config.num_inference_steps,
        "guidance_scale": pipe.config.guidance_scale if args.guidance_scale is None else args.guidance_scale,
        "guidance_interval": pipe.config.guidance_interval,
    }
    result |= measure_filter(pipe, args) if args.filter else measure_speed(pipe, args)
    print(json.dumps(result, indent=2))
    return result


if __name__ == "__main__":
    main()
