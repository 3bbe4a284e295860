"""What the U-Net's trainer costs: its own step and a bare loop of the same net, in images a second, in one run.

Its step is timed twice, with latents in the device's memory and on disk.

    python bench/bench_training.py --train_batch_size 512 --mixed_precision bf16 --compile             # one GPU
    accelerate launch --num_processes 2 --multi_gpu bench/bench_training.py --mixed_precision bf16     # two
    python bench/bench_training.py --preset tiny --resolution 64 --train_batch_size 4 --images 8       # anywhere

It takes all options of train_text_to_image.py; latents and texts are random numbers, so that no data is needed. The
bare loop has nothing of the package: no averaging of gradients between processes, no log, no checkpoints.
"""

import copy
import json
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from diffusers import UNet2DConditionModel

from minim_pipeline import EMBEDDED_CHECKPOINT
from minim_pipeline.mapped import map_parts
from minim_pipeline.training.config import Count, option, parse
from minim_pipeline.training.latents import Latents
from minim_pipeline.training.pipeline import Trainee, build_pipeline
from minim_pipeline.training.run import Run
from minim_pipeline.training.unet.batches import Batches
from minim_pipeline.training.unet.config import TextToImageConfig
from minim_pipeline.training.unet.texts import Texts
from minim_pipeline.training.unet.trainer import Trainer


# The embedded model's shape. Nothing is read from a CSV, and what is written goes to a temporary folder.
DEFAULTS = {
    "preset": "minim-256",
    "vae": EMBEDDED_CHECKPOINT / "vae",
    "text_encoder": EMBEDDED_CHECKPOINT,
    "train_data": "-",
    "output_dir": "-",
}
WARMUP = 8  # steps before the clock starts: compiling, and cuDNN's own trials


@dataclass(kw_only=True)
class BenchConfig(TextToImageConfig):
    """What is timed."""

    images: Count = option(1024, "Random ones that lie in memory.")
    steps: Count = option(64, "Timed ones of both.")


class Clock:
    """Takes steps, and the time from the end of the warm-up to that of the last one.

    Attributes:
        seconds: of a step.
        issuing: of a step until the host is done with it, which the device may not be; the least of the warm-up's.
    """

    def __init__(self, step: Callable, steps: int, device: torch.device):
        self.step, self.last, self.device, self.taken = step, WARMUP + steps, device, 0
        self.issuing = float("inf")

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __call__(self):
        warming = self.taken <= WARMUP
        if warming:
            self.begun = self.now()
        figures = self.step()
        if warming:
            self.issuing = min(self.issuing, time.perf_counter() - self.begun)
        self.taken += 1
        if self.taken == self.last:
            self.seconds = (self.now() - self.begun) / (self.last - WARMUP)
        return figures


def random_batches(config: BenchConfig, run: Run, trainee: Trainee) -> Batches:
    """Latents and texts of the shapes that the networks take."""
    pipe, generator = trainee.pipe, torch.Generator(run.device).manual_seed(0)
    channels, side = pipe.unet.config.in_channels, pipe.unet.config.sample_size
    shape = (config.images, config.latent_variants, channels, side, side)
    mean = torch.randn(shape, device=run.device, generator=generator).half()
    ids = torch.randint(
        len(pipe.tokenizer) - 1,
        (config.images * (config.caption_variants + 1) + 1, pipe.tokenizer.model_max_length),
        generator=torch.Generator().manual_seed(0),
    )
    captions, tokens, _ = torch.arange(len(ids)).split([config.images * config.caption_variants, config.images, 1])
    texts = Texts(ids, captions.view(config.images, config.caption_variants), tokens, run.device)
    texts.encode(pipe.text_encoder, run.accelerator, torch.bfloat16 if config.bf16 else torch.float32)
    latents = Latents(torch.stack([mean, 0.1 * torch.ones_like(mean)], 2), 1.0, 0.0)
    shares = torch.ones(config.images, device=run.device)
    return Batches(config, latents, texts, shares, shares[:0])


def batches_on_disk(config: BenchConfig, run: Run, batches: Batches) -> Batches:
    """The same, with latents that are read from files in the run's folder."""
    latents = batches.latents
    moments, _ = map_parts(
        run.output / "latents", 0, config.images, 64, lambda parts: (latents.moments[part].cpu() for part in parts)
    )
    on_disk = Latents(moments, latents.scale, latents.shift)
    return Batches(config, on_disk, batches.texts, batches.shares, batches.replayed)


def bare_step(config: BenchConfig, unet: UNet2DConditionModel, scheduler, batches: Batches) -> Callable:
    """The step of a loop that has only what learning needs."""
    device, batch, latents, texts = unet.device, config.train_batch_size, batches.latents, batches.texts
    alpha, sigma = scheduler.alphas_cumprod.sqrt(), (1 - scheduler.alphas_cumprod).sqrt()
    weights = list(unet.train().parameters())
    average = [p.detach().clone() for p in weights]
    optimizer = torch.optim.AdamW(weights, config.learning_rate, betas=(0.9, 0.99), fused=device.type == "cuda")
    net = torch.compile(unet, dynamic=False) if config.compile else unet

    def step() -> None:
        index = torch.randint(config.images, (batch,), device=device)
        version = torch.randint(config.latent_variants, (batch,), device=device)
        clean, std = latents.moments[index, version].float().unbind(1)
        clean = clean + std * torch.randn_like(clean)
        caption = texts.captions[index, torch.randint(config.caption_variants, (batch,), device=device)]
        caption = torch.where(torch.rand(batch, device=device) < config.drop_text, texts.tokens[index], caption)
        t = torch.randint(len(alpha), (batch,), device=device)
        a, s, noise = alpha[t].view(-1, 1, 1, 1), sigma[t].view(-1, 1, 1, 1), torch.randn_like(clean)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
            v = net(a * clean + s * noise, t, texts.table[caption], return_dict=False)[0]
        (v.float() - (a * noise - s * clean)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(weights, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(average, weights, 1 - config.ema_decay)

    return step


def waits(step: Callable) -> int:
    """How often a step waits for the GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        step()
        torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


def main(argv=None) -> dict:
    PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    (folder,) = broadcast_object_list([tempfile.mkdtemp()])  # one for all processes
    config = parse(BenchConfig, argv, __doc__, DEFAULTS)
    config = replace(config, output_dir=folder, max_train_steps=WARMUP + config.steps)
    with Run.open(config, "bench", gradient_accumulation_steps=config.gradient_accumulation_steps) as run:
        trainee = build_pipeline(config, config.resolution, ["cxr"], {"cxr": []})
        bare_unet = copy.deepcopy(trainee.pipe.unet).to(run.device)
        batches = random_batches(config, run, trainee)
        trainer = Trainer(config, run, trainee, batches)
        own = Clock(trainer.step, config.steps, run.device)
        run.train(own, lambda: None)
        waited = waits(trainer.step) if run.device.type == "cuda" else None
        trainer.batches = batches_on_disk(config, run, batches)
        from_disk = Clock(trainer.step, config.steps, run.device)
        bare = Clock(bare_step(config, bare_unet, trainer.scheduler, batches), config.steps, run.device)
        for _ in range(own.last):
            from_disk()
        for _ in range(own.last):
            bare()
        bare_images = config.train_batch_size * run.accelerator.num_processes
        clocks = {"trainer": own, "from_disk": from_disk, "bare": bare}
        speeds = {name: run.images_a_step / clock.seconds for name, clock in clocks.items()}
        speeds["bare"] = bare_images / bare.seconds
        result = {
            "device": torch.cuda.get_device_name(0) if run.device.type == "cuda" else "cpu",
            "processes": run.accelerator.num_processes,
            "torch": torch.__version__,
            "parameters": sum(p.numel() for p in bare_unet.parameters()),
            "train_batch_size": config.train_batch_size,
            "compile": config.compile,
            "mixed_precision": config.mixed_precision,
            "texts_encoded_before": batches.texts.table.is_floating_point(),
            "images_per_second": {name: round(speed, 1) for name, speed in speeds.items()},
            "ratio": round(speeds["trainer"] / speeds["bare"], 3),
            "ratio_from_disk": round(speeds["from_disk"] / speeds["trainer"], 3),
            "milliseconds_a_step": {name: round(1000 * clock.seconds, 2) for name, clock in clocks.items()},
            "of_which_the_host_issues": {name: round(1000 * clock.issuing, 2) for name, clock in clocks.items()},
            "waits_a_step": waited,
            "memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1) if run.device.type == "cuda" else None,
        }
        run.accelerator.wait_for_everyone()
    if run.is_main:
        shutil.rmtree(folder, ignore_errors=True)
        print(json.dumps(result, indent=2))
    return result


if __name__ == "__main__":
    main()
