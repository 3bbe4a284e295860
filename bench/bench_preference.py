"""What preference training costs: drawing, rating and learning, in images a second, and a round reckoned from it.

    python bench/bench_preference.py                              # the embedded model
    python bench/bench_preference.py --sd                         # Stable Diffusion 1.4's size, 512 px, random weights
    python bench/bench_preference.py --images 8 --batch_size 8 --num_inference_steps 2     # anywhere

Everything is timed in one run, after one turn that is not. SD's way: 25 steps of DPM-Solver++, all guided, LoRA.
"""

import argparse
import copy
import json
import time
from itertools import pairwise

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from minim_pipeline import EMBEDDED_CHECKPOINT, FilterHead, MinimPipeline
from minim_pipeline.training.denoising import noise_scheduler
from minim_pipeline.training.pipeline import add_lora
from minim_pipeline.training.preference.config import PreferenceConfig
from minim_pipeline.training.preference.sampling import encode_prompts, sample, score
from minim_pipeline.training.preference.update import Objective, update


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sd", action="store_true", help="Stable Diffusion 1.4's shapes, not the embedded model.")
    parser.add_argument("--lora_rank", type=int, help="Default: 16 with --sd, else the whole U-Net.")
    parser.add_argument("--images", type=int, default=256, help="Drawn and learned from a turn.")
    parser.add_argument("--batch_size", type=int, default=64, help="Of drawing and of learning.")
    parser.add_argument("--timesteps_per_image", type=int, default=1)
    parser.add_argument("--num_inference_steps", type=int)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--round_images", type=int, default=30_000, help="What a whole round draws to learn from.")
    parser.add_argument("--round_timesteps", type=int, default=12, help="How often a round learns from each image.")
    return parser.parse_args(argv)


def stable_diffusion() -> MinimPipeline:
    """SD-1.4's shapes with random weights; its tokenizer's length and size, with the embedded model's words."""
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    text = CLIPTextConfig(vocab_size=49_408, **sizes)
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED_CHECKPOINT / "tokenizer", model_max_length=77)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, **blocks)
    words = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "max_length": 77}
    head = FilterHead(in_channels=4, sample_size=64, latent_scale=vae.config.scaling_factor, **words)
    scheduler = DPMSolverMultistepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    parts = {"vae": vae, "text_encoder": CLIPTextModel(text), "tokenizer": tokenizer, "unet": unet}
    return MinimPipeline(**parts, scheduler=scheduler, filter_head=head, modalities=["cxr"], num_inference_steps=25)


def main(argv=None) -> dict:
    args = parse_args(argv)
    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    device = accelerator.device
    pipe = (stable_diffusion() if args.sd else MinimPipeline.from_pretrained(EMBEDDED_CHECKPOINT)).to(device)
    pipe.set_progress_bar_config(disable=True)
    if args.num_inference_steps:
        pipe.register_to_config(num_inference_steps=args.num_inference_steps)
    rank = args.lora_rank if args.lora_rank is not None else 16 * args.sd
    config = PreferenceConfig(
        prompts="-",
        output_dir="-",
        mixed_precision="bf16" if device.type == "cuda" else "no",
        images_per_prompt=min(8, args.images),
        prompts_per_step=max(1, args.images // 8),
        train_batch_size=args.batch_size,
        sampling_batch_size=args.batch_size,
        timesteps_per_image=args.timesteps_per_image,
    )
    prompts = [{"modality": "cxr", "Text": f"pneumonia {i}"} for i in range(config.prompts_per_step)]
    trained, reference = pipe.unet.requires_grad_(not rank), copy.deepcopy(pipe.unet).requires_grad_(False)
    if rank:
        add_lora(trained, rank)
    weights = [p for p in trained.parameters() if p.requires_grad]
    unet, optimizer = accelerator.prepare(trained, torch.optim.AdamW(weights, lr=1e-6))
    scheduler = noise_scheduler(pipe.scheduler.config, device)
    objective = Objective(pipe.filter_head.requires_grad_(False), reference, scheduler, config)
    texts = encode_prompts(pipe, prompts)

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    seconds = dict.fromkeys(("draw", "rate", "learn"), 0.0)
    for turn in range(args.turns + 1):
        times = [clock()]
        drawn = sample(pipe, prompts, config, torch.Generator(device).manual_seed(turn))
        times.append(clock())
        score(pipe, drawn, prompts)
        times.append(clock())
        update(unet, objective, accelerator, optimizer, drawn, texts, turn)
        times.append(clock())
        if turn:
            seconds = {name: seconds[name] + end - start for name, (start, end) in zip(seconds, pairwise(times))}
    images = args.turns * len(drawn.latents)
    learned = images * args.timesteps_per_image
    an_image = (seconds["draw"] + seconds["rate"]) / images + args.round_timesteps * seconds["learn"] / learned
    counts = {"draw": images, "rate": images, "learn": learned}
    result = {
        "device": torch.cuda.get_device_name(0) if device.type == "cuda" else "cpu",
        "model": "Stable Diffusion 1.4's shapes" if args.sd else "embedded",
        "lora_rank": rank,
        "steps": pipe.config.num_inference_steps,
        "images_per_second": {name: round(count / seconds[name], 2) for name, count in counts.items()},
        "share_of_time": {name: round(s / sum(seconds.values()), 3) for name, s in seconds.items()},
        "memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1) if device.type == "cuda" else None,
        "a_round_in_minutes": round(args.round_images * an_image / 60, 1),
        "of": f"{args.round_images} images drawn, each learned from {args.round_timesteps} times",
    }
    print(json.dumps(result, indent=2))
    return result


if __name__ == "__main__":
    main()
