"""Images a second of sampling, eager and compiled side by side in one run, with guidance.

python bench/bench_sampling.py --dtype bfloat16                              # on a GPU
python bench/bench_sampling.py --batch_size 2 --num_inference_steps 2 --repeats 1   # anywhere
"""

import argparse
import json
import time

import torch

from minim_pipeline import EMBEDDED_CHECKPOINT, MinimPipeline


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(EMBEDDED_CHECKPOINT))
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--guidance_scale", type=float, help="Default: the model's; above 1, or it is no guidance.")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--repeats", type=int, default=5, help="Timed calls; the median counts.")
    parser.add_argument("--no_compile", action="store_true", help="Eager only.")
    return parser.parse_args(argv)


def seconds_a_call(pipe, args) -> float:
    """Median over the repeats, after one call that is not timed."""
    modality = (pipe.config.modalities or ["cxr"])[0]
    seconds = []
    for repeat in range(args.repeats + 1):
        start = time.perf_counter()
        pipe(
            ["normal"] * args.batch_size,
            modality=modality,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            seeds=list(range(repeat * args.batch_size, (repeat + 1) * args.batch_size)),
            output_type="pt",
        ).images.cpu()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[1:])[args.repeats // 2]


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
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": pipe.config.guidance_scale if args.guidance_scale is None else args.guidance_scale,
        "guidance_interval": pipe.config.guidance_interval,
        "eager_images_per_second": round(args.batch_size / seconds_a_call(pipe, args), 2),
    }
    if not args.no_compile:
        pipe.unet.compile()
        pipe.vae.decoder.compile()
        result["compiled_images_per_second"] = round(args.batch_size / seconds_a_call(pipe, args), 2)
        result["ratio"] = round(result["compiled_images_per_second"] / result["eager_images_per_second"], 3)
    print(json.dumps(result, indent=2))
    return result


if __name__ == "__main__":
    main()
