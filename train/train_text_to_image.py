"""Trains the U-Net: latents of medical images from a modality and a sentence.

A latent diffusion model (arXiv 2112.10752) on latents that are encoded once. What is not the textbook's:

- every image is encoded in several versions (mild crop, rotation, gamma; mirrored only where the modality allows it
  and the caption names no side), and every caption is phrased in several ways: few images, many epochs;
- min-SNR weights (arXiv 2303.09556) and, for new models, v-prediction with zero terminal SNR (arXiv 2305.08891);
- the text is dropped for classifier-free guidance in two ways: the sentence only (the modality's token stays, which is
  what the pipeline uses as the negative prompt), or everything;
- it watches for memorisation while it trains, and what is kept is the averaged weights of the lowest validation loss.

From scratch, as the embedded model:

    accelerate launch train/train_text_to_image.py --preset minim-256 --vae runs/autoencoder/vae \
        --text_encoder runs/text_encoder --train_data data.csv --output_dir runs/unet --mixed_precision bf16 --compile

From Stable Diffusion 1.x or 2.x, as the reference does (the modalities become new tokens), or from a MinimPipeline:

    accelerate launch train/train_text_to_image.py --pretrained_model_name_or_path CompVis/stable-diffusion-v1-4 \
        --resolution 512 --train_data data.csv --output_dir runs/sd --learning_rate 1e-5 --train_batch_size 8 \
        --gradient_accumulation_steps 4 --gradient_checkpointing --mixed_precision bf16

What a MinimPipeline knows it forgets while it learns something else, unless it goes on seeing it: --replay gives every
batch a share of old rows, and --anchor_weight holds its predictions for them near those of the base (distillation, as
in learning without forgetting, arXiv 1606.09282). `add_modality.py` does so.
"""

import argparse
import copy
import math
import warnings
from pathlib import Path

import torch
import torch.nn as nn
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel, compute_snr
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from minim_pipeline import MODALITIES, MinimPipeline, resolve_modality
from minim_pipeline.disk import save_model, whole_folder
from minim_pipeline.finite import check_loss, check_weights
from minim_pipeline.generate.command import read_model_index
from minim_pipeline.licenses import license_of
from minim_pipeline.loading import load_with_unet, unet_folder
from minim_pipeline.tokens import add_modality_tokens, modality_tokens, tokenize
from minim_pipeline.training.arguments import check_numbers, check_shares
from minim_pipeline.training.captions import load_captions, phrase
from minim_pipeline.training.checkpoints import find_checkpoint, is_finished, note_finished
from minim_pipeline.training.common import (
    Log,
    Schedule,
    add_common_arguments,
    check_common_arguments,
    check_processes,
    judgeable,
    note_arguments,
    own_folder,
    read_splits,
    start_trackers,
    step_generator,
)
from minim_pipeline.training.filter.keep import kept_filter
from minim_pipeline.training.hub import push_parts, push_pipeline
from minim_pipeline.training.latents import Latents, memorised_share
from minim_pipeline.training.loop import Run
from minim_pipeline.training.rows import image_paths, tell_overlap


# The text reaches the U-Net by cross-attention and, pooled, by the time embedding (`addition_embed_type`): at this
# size that makes it follow the finding sooner.
_MINIM = dict(
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    addition_embed_type="text",
    addition_embed_type_num_heads=4,
)
PRESETS = {
    # The embedded model's: 27 M parameters, heads of 64 channels; dropout, since it sees an image some hundred times.
    "minim-256": dict(_MINIM, block_out_channels=(128, 256, 256), attention_head_dim=(2, 4, 4), dropout=0.1),
    # For tests: trains in seconds on a CPU.
    "tiny": dict(_MINIM, block_out_channels=(8, 16, 16), attention_head_dim=2, norm_num_groups=4),
}


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    model = parser.add_argument_group("model")
    model.add_argument(
        "--pretrained_model_name_or_path", help="Start from this pipeline: SD-1.x, SD-2.x or a MinimPipeline."
    )
    model.add_argument(
        "--preset", choices=sorted(PRESETS), help="Shape of a new U-Net; needs --vae and --text_encoder."
    )
    model.add_argument("--vae", help="Folder of a trained autoencoder (train_autoencoder.py).")
    model.add_argument("--text_encoder", help="Folder with `tokenizer` and `text_encoder` (train_text_encoder.py).")
    model.add_argument(
        "--unet", help="Start from this U-Net, such as MINIM's checkpoint/unet, in the pretrained pipeline's place."
    )
    model.add_argument("--train_text_encoder", action="store_true", help="Train the text encoder along.")
    model.add_argument("--text_encoder_learning_rate", type=float, default=1e-5)
    model.add_argument("--lora_rank", type=int, default=0, help="Train a LoRA of this rank instead of the U-Net.")
    loss = parser.add_argument_group("loss")
    loss.add_argument("--prediction_type", choices=["epsilon", "v_prediction"], help="New models: v_prediction.")
    loss.add_argument(
        "--noise_sampling",
        choices=["uniform", "log-normal"],
        default="uniform",
        help="How noise levels are drawn: all timesteps alike, or as EDM's training (with --snr_gamma 0).",
    )
    loss.add_argument("--noise_median", type=float, default=0.8, help="Log-normal: the median of sigma/alpha.")
    loss.add_argument("--noise_std", type=float, default=1.2, help="Log-normal: the deviation of its logarithm.")
    loss.add_argument("--snr_gamma", type=float, default=5.0, help="min-SNR's gamma; 0 weighs all steps alike.")
    loss.add_argument("--drop_text", type=float, default=0.10, help="Share of captions cut down to the token.")
    loss.add_argument("--drop_all", type=float, default=0.05, help="Share of captions that are dropped whole.")
    loss.add_argument("--gradient_accumulation_steps", type=int, default=1)
    data = parser.add_argument_group("variation")
    data.add_argument("--captions", help="JSON with phrasings of every finding; default: the package's own.")
    data.add_argument("--caption_variants", type=int, default=32, help="Phrasings of every caption.")
    data.add_argument("--latent_variants", type=int, default=8, help="Augmented versions of every image.")
    replay = parser.add_argument_group("keeping what the base knows")
    replay.add_argument("--replay", help="CSV of rows that the base has learned from, or of their modalities.")
    replay.add_argument("--replay_share", type=float, default=0.5, help="Of every batch; 0 only validates on them.")
    replay.add_argument(
        "--anchor_weight", type=float, default=0.0, help="Of the squared distance to the base's predictions for them."
    )
    sampling = parser.add_argument_group("sampling, for the grids and as the pipeline's defaults")
    sampling.add_argument("--num_inference_steps", type=int, help="Default, as for the next three: the base's, or 20.")
    sampling.add_argument("--guidance_scale", type=float, help="Of a new model: 3.")
    sampling.add_argument("--guidance_rescale", type=float, help="Of a new model: 0.")
    sampling.add_argument("--guidance_interval", type=float, nargs=2, help="Of a new model: all steps, 0 1.")
    sampling.add_argument("--validation_samples", type=int, default=8, help="Images a modality in every grid.")
    args = parser.parse_args(argv)
    check_numbers(parser, args, from_zero=("seed", "lora_rank", "lr_warmup_steps"))
    check_common_arguments(args)
    check_shares(args, "drop_text", "drop_all")
    if args.noise_median == 0:
        raise ValueError("--noise_median has to be above 0, got 0.")
    if args.drop_text + args.drop_all > 1:
        raise ValueError(f"--drop_text {args.drop_text} and --drop_all {args.drop_all} are more than 1 together.")
    if bool(args.pretrained_model_name_or_path) == bool(args.preset):
        raise ValueError("Give either --pretrained_model_name_or_path or --preset.")
    if args.preset and not (args.vae and args.text_encoder):
        raise ValueError("--preset needs --vae and --text_encoder, the folders of trained ones.")
    if args.pretrained_model_name_or_path and (args.vae or args.text_encoder):
        raise ValueError("--vae and --text_encoder belong to --preset; a pretrained pipeline brings its own.")
    if args.unet and not (args.pretrained_model_name_or_path and unet_folder(args.unet)):
        raise ValueError(
            f"--unet has to be the folder of a U-Net, beside --pretrained_model_name_or_path; got {args.unet!r}."
        )
    check_replay(args)
    return args


def check_replay(args: argparse.Namespace) -> None:
    if args.replay and not args.pretrained_model_name_or_path:
        raise ValueError("--replay needs --pretrained_model_name_or_path: a new model has nothing to forget.")
    if not 0 <= args.replay_share < 1:
        raise ValueError(f"--replay_share has to be at least 0 and less than 1, got {args.replay_share}.")
    if args.anchor_weight and not (args.replay and args.replay_share):
        raise ValueError("--anchor_weight needs --replay with a --replay_share above 0: the rows that it is for.")
    if args.replay and args.replay_share and not 0 < replayed(args) < args.train_batch_size:
        raise ValueError(
            f"--replay_share {args.replay_share} of --train_batch_size {args.train_batch_size} is {replayed(args)}:"
            " old and new rows both have to be in every batch."
        )


def replayed(args: argparse.Namespace) -> int:
    """How many images of a batch are old ones."""
    return round(args.replay_share * args.train_batch_size) if args.replay else 0


def build_pipeline(args: argparse.Namespace, modalities: list[str], findings: dict[str, list[str]]) -> MinimPipeline:
    """The pipeline to train: loaded, with tokens added for modalities that it does not know, or new."""
    defaults = dict(num_inference_steps=20, guidance_scale=3.0, guidance_rescale=0.0, guidance_interval=[0.0, 1.0])
    kept = {"filter_head": None, "told": "", "weights_license": None, "num_candidates": 1}
    if args.preset:
        kept["weights_license"] = license_of(Path(args.vae).parent) or license_of(args.text_encoder)
        vae = AutoencoderKL.from_pretrained(args.vae)
        text_encoder = CLIPTextModel.from_pretrained(args.text_encoder, subfolder="text_encoder", dtype=torch.float32)
        tokenizer = CLIPTokenizer.from_pretrained(args.text_encoder, subfolder="tokenizer")
        unet = UNet2DConditionModel(
            sample_size=args.resolution // 2 ** (len(vae.config.block_out_channels) - 1),
            in_channels=vae.config.latent_channels,
            out_channels=vae.config.latent_channels,
            cross_attention_dim=text_encoder.config.hidden_size,
            **PRESETS[args.preset],
        )
        prediction_type = args.prediction_type or "v_prediction"
        scheduler = DPMSolverMultistepScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type=prediction_type,
            # Epsilon says nothing of the image where there is nothing but noise.
            rescale_betas_zero_snr=prediction_type == "v_prediction",
            timestep_spacing="trailing",
        )
    else:
        if args.unet:
            base = load_with_unet(args.pretrained_model_name_or_path, args.unet, bare=False)
        else:
            base = MinimPipeline.from_pretrained(args.pretrained_model_name_or_path)
        vae, text_encoder, tokenizer, unet = base.vae, base.text_encoder, base.tokenizer, base.unet
        scheduler = base.scheduler
        if args.prediction_type not in (None, scheduler.config.prediction_type):
            raise ValueError(
                f"{args.pretrained_model_name_or_path} was trained for {scheduler.config.prediction_type!r}, "
                f"--prediction_type asks for {args.prediction_type!r}."
            )
        modalities = list(dict.fromkeys([*(base.config.modalities or []), *modalities]))
        known = base.config.findings or {}
        findings = {m: list(dict.fromkeys([*known.get(m, []), *findings.get(m, [])])) for m in modalities}
        defaults = {name: base.config[name] for name in defaults}
        unet.register_to_config(sample_size=args.resolution // base.vae_scale_factor)
    new = [m for m in modalities if f"<{m}>" not in tokenizer.get_vocab()]
    if new:
        add_modality_tokens(tokenizer, text_encoder, new)
    if args.pretrained_model_name_or_path:
        kept["filter_head"], kept["told"] = kept_filter(base, new, args.resolution)
        kept["num_candidates"] = base.config.num_candidates if kept["filter_head"] is not None else 1
        kept["weights_license"] = base.weights_license or license_of(args.pretrained_model_name_or_path)
    pipe = MinimPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        filter_head=None,
        modalities=modalities,
        findings=findings,
        num_candidates=kept["num_candidates"],
        weights_license=kept["weights_license"],
        **{name: value if getattr(args, name) is None else getattr(args, name) for name, value in defaults.items()},
    )
    pipe.new_tokens = tokenizer.convert_tokens_to_ids([f"<{m}>" for m in new])
    pipe.kept = kept
    return pipe


class Denoise(nn.Module):
    """Text encoder and U-Net in one forward, which is what is distributed."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        text = self.text_encoder(input_ids).last_hidden_state  # [B, L, D]
        return self.unet(noisy, timesteps, text, return_dict=False)[0]  # [B, C, h, w]


def log_normal_timesteps(
    scheduler: DDPMScheduler, uniform: torch.Tensor, median: float, std: float, generator: torch.Generator
) -> torch.Tensor:
    """Timesteps [B] at which ln(sigma/alpha) is normally distributed, as in EDM's training (arXiv 2206.00364).

    A tenth of them stay those of `uniform` [B], so that no noise level, pure noise in particular, is left out.
    """
    alpha = scheduler.alphas_cumprod.to(uniform.device)
    levels = ((1 - alpha) / alpha.clamp(min=1e-12)).log() / 2  # rising with the timestep
    drawn = math.log(median) + std * torch.randn(len(uniform), device=uniform.device, generator=generator)
    nearest = torch.searchsorted(levels, drawn).clamp(max=len(levels) - 1)
    stays = torch.rand(len(uniform), device=uniform.device, generator=generator) < 0.1
    return torch.where(stays, uniform, nearest)


def loss_weights(scheduler: DDPMScheduler, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
    """min-SNR weights, arXiv 2303.09556, section 3.4: [B].

    For v-prediction min(SNR, gamma) / (SNR + 1) would be 0 where the SNR is, so that with zero terminal SNR the first
    step of sampling would never be trained. With SNR + 1 in both places it is 1 there.
    """
    if not gamma:
        return torch.ones_like(timesteps, dtype=torch.float32)
    snr = compute_snr(scheduler, timesteps)
    if scheduler.config.prediction_type == "v_prediction":
        return (snr + 1).clamp(max=gamma) / (snr + 1)
    return snr.clamp(max=gamma) / snr.clamp(min=1e-8)


def target(
    scheduler: DDPMScheduler, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    if scheduler.config.prediction_type == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    return noise


@torch.no_grad()
def validation_loss(
    model: Denoise, scheduler: DDPMScheduler, latents: torch.Tensor, ids: torch.Tensor, names, args, old: int = 0
):
    """The loss on val images, with noise and timesteps that are always the same: in all and per modality.

    Of the images the last `old` are of --replay. They are many and the new ones few, so `loss` is not the mean of all
    then, but that of `loss_old` and `loss_new` in the shares that they have in training.
    """
    device = next(model.parameters()).device
    generator = torch.Generator("cpu").manual_seed(args.seed)
    noise = torch.randn(latents.shape, generator=generator)
    # Evenly over the timesteps: all of them are visited in every thousandth.
    steps = torch.linspace(0, scheduler.config.num_train_timesteps - 1, len(latents)).round().long()
    steps = steps[torch.randperm(len(steps), generator=generator)]
    losses = []
    for part in torch.arange(len(latents)).split(64):
        x, e, t = latents[part].to(device).float(), noise[part].to(device), steps[part].to(device)
        prediction = model(scheduler.add_noise(x, e, t), t, ids[part].to(device)).float()
        mse = (prediction - target(scheduler, x, e, t)).square().mean((1, 2, 3))
        losses.append((mse * loss_weights(scheduler, t, args.snr_gamma)).cpu())
    losses = torch.cat(losses)
    figures = {"loss": round(losses.mean().item(), 5)}
    if old:
        parts = {"loss_old": losses[-old:].mean().item(), "loss_new": losses[:-old].mean().item()}
        mean = args.replay_share * parts["loss_old"] + (1 - args.replay_share) * parts["loss_new"]
        figures = {name: round(value, 5) for name, value in {"loss": mean, **parts}.items()}
    for name in dict.fromkeys(names):
        mine = torch.tensor([n == name for n in names])
        figures[f"loss_{name}"] = round(losses[mine].mean().item(), 5)
    return figures


def main(argv=None) -> None:
    args = parse_args(argv)
    with own_folder(args):
        train(args)


def train(args: argparse.Namespace) -> None:
    """Trains, validates and writes the pipeline; `--output_dir` is this run's alone."""
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=args.report_to,
        project_dir=args.output_dir,
    )
    output = Path(args.output_dir)
    if is_finished(args):
        if accelerator.is_main_process:
            push(args, output)
        return
    checkpoint = find_checkpoint(args)
    set_seed(args.seed)
    device, rank = accelerator.device, accelerator.process_index
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

    if args.pretrained_model_name_or_path:
        # Before any row is read: it may be of a modality that only the base knows.
        index = read_model_index(args.pretrained_model_name_or_path)
    else:
        index = {}
    train_rows, val_rows = read_splits(args)
    old_rows, old_val_rows = [], []
    if args.replay:
        # --modality and --image_root are of --train_data.
        elsewhere = {"train_data": args.replay, "modality": None, "image_root": None}
        old_args = argparse.Namespace(**{**vars(args), **elsewhere})
        old_rows, old_val_rows = read_splits(old_args)
        both = image_paths(train_rows, args.train_data), image_paths(old_val_rows, args.replay)
        tell_overlap(f"{args.train_data} and the val rows of {args.replay}", *both)
        both = image_paths(old_rows, args.replay), image_paths(val_rows, args.train_data)
        tell_overlap(f"{args.replay} and the val rows of {args.train_data}", *both)
        check_known(old_rows + old_val_rows, args.replay, index, args.pretrained_model_name_or_path)
    val_rows = judgeable(val_rows, train_rows + old_rows, index, args.train_data)
    if old_val_rows and not val_rows:  # what is kept has the lowest mean of both
        warnings.warn(f"{args.train_data} leaves no val rows, so those of --replay are left out, too.", stacklevel=2)
        old_val_rows = []
    shares = {f"--split {args.split} of {args.train_data}": train_rows, f"--replay {args.replay}": old_rows}
    shares |= {"the validation": val_rows, f"the validation of --replay {args.replay}": old_val_rows}
    for what, rows in shares.items():
        if rows:
            check_processes(rows, what)
    new, new_val = len(train_rows), len(val_rows)
    train_rows, val_rows = train_rows + old_rows, val_rows + old_val_rows
    present = {resolve_modality(row["modality"]).id for row in train_rows}
    modalities = [name for name in MODALITIES if name in present]
    findings: dict[str, list[str]] = {m: [] for m in modalities}
    for row in train_rows:
        known = findings[resolve_modality(row["modality"]).id]
        if row.get("finding") and row["finding"] not in known:
            known.append(row["finding"])
    pipe = build_pipeline(args, modalities, findings)
    if pipe.kept["told"]:
        accelerator.print(pipe.kept["told"])
    vae, unet, text_encoder, tokenizer = pipe.vae, pipe.unet, pipe.text_encoder, pipe.tokenizer
    noise_schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    noise_schedule.alphas_cumprod = noise_schedule.alphas_cumprod.to(device)

    captions = load_captions(args.captions)
    ids = phrase(train_rows, captions, tokenizer, args.caption_variants, args.seed).to(device)
    token_only = tokenize(tokenizer, [resolve_modality(row["modality"]).token for row in train_rows]).to(device)
    nothing = tokenize(tokenizer, [""]).to(device)
    vae.requires_grad_(False).eval().to(device)
    train_latents = Latents.encode(args, accelerator, vae, train_rows[:new], "train", args.latent_variants)
    if args.replay:
        old = Latents.encode(old_args, accelerator, vae, old_rows, "replay", args.latent_variants)
        train_latents = train_latents.join(old)
    if val_rows:
        val_latents = Latents.encode(args, accelerator, vae, val_rows[:new_val], "val", 1).plain()
        if args.replay:
            old = Latents.encode(old_args, accelerator, vae, old_val_rows, "replay-val", 1).plain()
            val_latents = torch.cat([val_latents, old])
        val_ids = phrase(val_rows, captions, tokenizer, 1, args.seed)
        val_names = [resolve_modality(row["modality"]).id for row in val_rows]
    vae.to("cpu")

    anchor = make_anchor(args, unet, text_encoder, device) if args.anchor_weight else None
    groups = trainable(args, unet, text_encoder, pipe.new_tokens)
    averaged = [p for group in groups for p in group["params"]]
    ema = EMAModel(averaged, decay=args.ema_decay, use_ema_warmup=True, foreach=True)
    ema.to(device)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=device.type == "cuda")
    model, optimizer = accelerator.prepare(Denoise(unet, text_encoder), optimizer)
    if args.compile:
        unet.compile(dynamic=False)
        if anchor is not None:
            anchor.unet.compile(dynamic=False)
    schedule = Schedule(args.max_train_steps, args.max_train_minutes)
    best = Best()
    accelerator.register_for_checkpointing(ema, schedule, best)
    if checkpoint:
        accelerator.load_state(str(checkpoint))
        ema.to(device)
    if accelerator.is_main_process:
        note_arguments(args, checkpoint)
    start_trackers(accelerator, "minim-text-to-image", args)
    batch = args.train_batch_size
    log = Log(
        accelerator, args.output_dir, schedule, batch * accelerator.num_processes * args.gradient_accumulation_steps
    )

    def validate() -> dict[str, float]:
        plain, old = Denoise(unet, text_encoder), len(val_rows) - new_val
        return validation_loss(plain, noise_schedule, val_latents, val_ids, val_names, args, old)

    def evaluate() -> None:
        """Loss, grids and nearest training images of the averaged weights, by the main process."""
        if accelerator.is_main_process:
            ema.store(averaged)
            ema.copy_to(averaged)
            unet.eval()
            text_encoder.eval()
            figures = {}
            with accelerator.autocast(), torch.compiler.set_stance("force_eager"):
                if val_rows:
                    figures = validate()
                rows = val_rows or train_rows
                samples = draw_samples(pipe, rows, args, output / f"samples-{schedule.step}")
            if val_rows:
                figures["memorised"] = memorised_share(samples, val_latents, val_names, train_latents, train_rows)
            log.write("val", **figures)
            if val_rows:
                check_loss(figures["loss"], schedule.step)
            loss = figures.get("loss", float("-inf"))  # where nothing is measured, the last weights are kept
            if loss <= best.loss or not (output / "best").is_dir():
                best.loss, best.step = loss, schedule.step
                save_weights(args, pipe, output / "best")
            ema.restore(averaged)
            unet.train()
            text_encoder.train(args.train_text_encoder)
        accelerator.wait_for_everyone()

    if args.replay and val_rows and schedule.step == 0 and accelerator.is_main_process:
        # What there is to lose. The base as it is: its averaged weights are all that it has.
        unet.eval()
        text_encoder.eval()
        with accelerator.autocast(), torch.compiler.set_stance("force_eager"):
            log.write("base", **validate())
    unet.train()
    text_encoder.train(args.train_text_encoder)
    old_images = replayed(args)
    rates = [group["peak"] for group in groups]

    def train_step() -> torch.Tensor:
        """The loss, mean over the parts that are accumulated."""
        losses = []
        for group, peak in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = schedule.learning_rate(peak, args.lr_warmup_steps)
        for part in range(args.gradient_accumulation_steps):
            generator = step_generator(
                args.seed, schedule.step * args.gradient_accumulation_steps + part, rank, device
            )

            def randint(high, count=batch, generator=generator):
                return torch.randint(high, (count,), device=device, generator=generator)

            index = randint(new, batch - old_images)
            if old_images:
                index = torch.cat([index, new + randint(len(train_rows) - new, old_images)])
            latents = train_latents.draw(index, randint(args.latent_variants), generator)  # [B, C, h, w]
            text = ids[index, randint(args.caption_variants)]  # [B, L]
            chance = torch.rand(batch, 1, device=device, generator=generator)
            text = torch.where(chance < args.drop_text + args.drop_all, token_only[index], text)
            text = torch.where(chance < args.drop_all, nothing, text)
            timesteps = randint(noise_schedule.config.num_train_timesteps)
            if args.noise_sampling == "log-normal":
                timesteps = log_normal_timesteps(
                    noise_schedule, timesteps, args.noise_median, args.noise_std, generator
                )
            noise = torch.randn(latents.shape, device=device, generator=generator)
            noisy = noise_schedule.add_noise(latents, noise, timesteps)
            with accelerator.accumulate(model):
                prediction = model(noisy, timesteps, text).float()
                mse = (prediction - target(noise_schedule, latents, noise, timesteps)).square().mean((1, 2, 3))
                if anchor is not None:
                    old = slice(batch - old_images, None)
                    with torch.no_grad(), accelerator.autocast():
                        before = anchor(noisy[old], timesteps[old], text[old]).float()
                    distance = (prediction[old] - before).square().mean((1, 2, 3))
                    mse = torch.cat([mse[: batch - old_images], mse[old] + args.anchor_weight * distance])
                loss = (mse * loss_weights(noise_schedule, timesteps, args.snr_gamma)).mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    keep_old_tokens(text_encoder, pipe.new_tokens, args.train_text_encoder)
                    accelerator.clip_grad_norm_(averaged, args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
        ema.step(averaged)
        return torch.stack(losses).mean()

    with Run(accelerator, args, schedule, evaluate) as run:
        run.begin()
        while not schedule.done:
            loss = train_step()
            schedule.advance(accelerator)
            log.tick(loss=loss)
            if schedule.step % 200 == 0:
                log.write("train", loss=round(loss.item(), 5), lr=optimizer.param_groups[0]["lr"])
            run.end_step(loss)

    if accelerator.is_main_process:
        log.write("best", **({"loss": best.loss} if val_rows else {}), at_step=best.step)
        finish(args, pipe, output)
        note_finished(args, schedule)
        push(args, output)
    accelerator.end_training()


def push(args: argparse.Namespace, output: Path) -> None:
    """Publishes what was made, if that was asked for."""
    if args.lora_rank:
        push_parts(args, "train_text_to_image", *sorted((output / "best").glob("pytorch_lora_weights.safetensors")))
    else:
        push_pipeline(args, output / "pipeline")


class Best:
    """The lowest validation loss so far, and when it was reached."""

    def __init__(self):
        self.loss, self.step = float("inf"), 0

    def state_dict(self) -> dict:
        return {"loss": self.loss, "step": self.step}

    def load_state_dict(self, state: dict) -> None:
        self.loss, self.step = state["loss"], state["step"]


def trainable(args, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, new_tokens: list[int]) -> list[dict]:
    """Freezes what is not trained, and gives the optimizer's groups of what is."""
    text_encoder.requires_grad_(args.train_text_encoder)
    if args.lora_rank:
        add_lora(unet, args.lora_rank)
    decay = args.adam_weight_decay
    weights = [p for p in unet.parameters() if p.requires_grad]
    groups = [{"params": weights, "peak": args.learning_rate, "weight_decay": decay}]
    if args.train_text_encoder:
        text = list(text_encoder.parameters())
        groups.append({"params": text, "peak": args.text_encoder_learning_rate, "weight_decay": decay})
    elif new_tokens:
        # Textual inversion's way (arXiv 2208.01618): only the new rows learn. Weight decay would move the old ones.
        table = text_encoder.get_input_embeddings().weight.requires_grad_(True)
        groups.append({"params": [table], "peak": args.text_encoder_learning_rate, "weight_decay": 0.0})
    return groups


def add_lora(unet: UNet2DConditionModel, rank: int) -> None:
    """Freezes the U-Net, and adds a LoRA that changes nothing yet."""
    from peft import LoraConfig

    unet.requires_grad_(False)
    layers = ["to_k", "to_q", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=layers))


def check_known(rows: list[dict], source: str, index: dict, model: str) -> None:
    """Raises ValueError for rows to replay of modalities that `model`, by its `model_index.json`, has not learned."""
    learned = index.get("modalities") or []
    unknown = {resolve_modality(row["modality"]).id for row in rows} - set(learned)
    if unknown:
        raise ValueError(
            f"{source}, to replay, has rows of {', '.join(map(repr, sorted(unknown)))}, which {model} has not learned;"
            f" it has learned: {', '.join(learned) or 'none'}."
        )


def make_anchor(args, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, device) -> Denoise:
    """The base as it is before training, frozen. A text encoder that is not trained reads old captions for both."""
    text_encoder = copy.deepcopy(text_encoder) if args.train_text_encoder else text_encoder
    anchor = Denoise(copy.deepcopy(unet), text_encoder).to(device)
    anchor.unet.requires_grad_(False).eval()
    if args.train_text_encoder:
        text_encoder.requires_grad_(False).eval()
    return anchor


def keep_old_tokens(text_encoder: CLIPTextModel, new_tokens: list[int], train_text_encoder: bool) -> None:
    """Without --train_text_encoder, only the embeddings of added tokens get a gradient."""
    table = text_encoder.get_input_embeddings().weight
    if table.grad is not None and not train_text_encoder:
        mask = torch.zeros(len(table), 1, device=table.device)
        mask[new_tokens] = 1
        table.grad *= mask


@torch.no_grad()
def draw_samples(pipe: MinimPipeline, rows: list[dict], args, folder: Path) -> dict[str, torch.Tensor]:
    """Draws a grid per modality for captions spread over the rows; returns the latents [n, C, h, w] of each."""
    folder.mkdir(parents=True, exist_ok=True)
    pipe.vae.to(pipe.unet.device)
    pipe.set_progress_bar_config(disable=True)
    drawn = {}
    present = {resolve_modality(row["modality"]).id for row in rows}
    for name in filter(present.__contains__, pipe.config.modalities):
        mine = [row for row in rows if resolve_modality(row["modality"]).id == name]
        chosen = [mine[i * len(mine) // args.validation_samples] for i in range(args.validation_samples)]
        latents = pipe(
            [row["Text"] for row in chosen],
            modality=name,
            seeds=list(range(len(chosen))),
            height=args.resolution,
            width=args.resolution,
            output_type="latent",
        ).images
        drawn[name] = latents.float()
        images = pipe.vae.decode(latents.float() / pipe.vae.config.scaling_factor).sample.clamp(-1, 1)
        sheet = ((torch.cat(list(images), 2) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
        Image.fromarray(sheet).save(folder / f"{name}.png")
    pipe.vae.to("cpu")
    return drawn


def save_weights(args, pipe: MinimPipeline, folder: Path) -> None:
    """Writes the trained parts, finite and whole, or not at all."""
    for part in (pipe.unet, pipe.text_encoder):
        check_weights(part)
    with whole_folder(folder) as unfinished:
        write_unet(pipe, bool(args.lora_rank), unfinished)
        pipe.text_encoder.save_pretrained(unfinished / "text_encoder")


def write_unet(pipe: MinimPipeline, lora: bool, folder: Path) -> None:
    """The U-Net, or with `lora` what was trained beside it and the tokens that it was trained with."""
    if lora:
        from peft.utils import get_peft_model_state_dict

        layers, tokens = get_peft_model_state_dict(pipe.unet), modality_tokens(pipe.tokenizer)
        MinimPipeline.save_lora_weights(folder, unet_lora_layers=layers, modality_tokens=tokens)
    else:
        pipe.unet.save_pretrained(folder / "unet")


def finish(args, pipe: MinimPipeline, output: Path) -> None:
    """Writes the whole pipeline with the best weights to `pipeline/`.

    With --lora_rank that is the base with its new tokens, and the LoRA lies beside it in `best/`.
    """
    if args.lora_rank:
        pipe.unet.unload_lora()
    else:
        pipe.unet = UNet2DConditionModel.from_pretrained(output / "best" / "unet")
    pipe.text_encoder = CLIPTextModel.from_pretrained(output / "best" / "text_encoder", dtype=torch.float32)
    # Not before: what samples while it trains is the U-Net alone.
    pipe.filter_head = pipe.kept["filter_head"]
    save_model(pipe, output / "pipeline")


if __name__ == "__main__":
    main()
