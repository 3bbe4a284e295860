"""Trains the U-Net on a reward: towards images that the filter head, or people, rate well, away from the others.

DiffusionNFT (arXiv 2509.16117): the policy that drew the images stays as `old`; beside it stand one that moves towards
the trained network, `old + beta (new - old)`, and its mirror image, `old - beta (new - old)`. The first is to predict
good images, the second bad ones, both by the usual loss on noised images:

    r |positive - target|^2 + (1 - r) |negative - target|^2

It needs finished images and a reward for each, and nothing of how they were drawn: any sampler will do, guided as the
pipeline has it, and ratings of images that were drawn long ago. Rewards are those of latents, so nothing is decoded.

What keeps it honest: an anchor to the network that it began with, everywhere for prompts left out (the negative side
of guidance stays what it was); a share of the reward for being unlike the other images of a prompt; nothing for copies
of training images; and a scorer that the training does not see, the image-text encoder, which says when to stop.

From the pipeline's filter head:

    accelerate launch train/train_preference.py --pretrained_model_name_or_path runs/model --prompts prompts.csv \
        --output_dir runs/preference --mixed_precision bf16 --max_train_minutes 5

or straight from people's ratings of its images, as `minim ratings` writes them:

    accelerate launch train/train_preference.py --pretrained_model_name_or_path runs/model --ratings ratings.csv \
        --output_dir runs/preference --mixed_precision bf16
"""

import argparse
import copy
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from common import (
    Log,
    Schedule,
    add_run_arguments,
    check_run_arguments,
    find_checkpoint,
    note_arguments,
    save_checkpoint,
    step_generator,
)
from diffusers import DDPMScheduler, UNet2DConditionModel
from filter_data import encode
from hub import push_pipeline
from raters import read_ratings
from replay import Replay
from rewards import advantage, are_copies, finding_reward, optimality, rate, rating_reward, spread
from train_text_to_image import loss_weights, target
from watch import Watch

from minim_pipeline import (
    EMBEDDED_CHECKPOINT,
    EMBEDDED_ENCODER,
    FilterHead,
    MinimPipeline,
    prompt_text,
    resolve_modality,
)
from minim_pipeline.data import read_csv
from minim_pipeline.image_loading import load_images


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser)
    parser.set_defaults(train_batch_size=256, learning_rate=1e-4, lr_warmup_steps=2, adam_weight_decay=0.0)
    parser.set_defaults(max_train_steps=30, validation_steps=5, checkpointing_steps=5)
    model = parser.add_argument_group("model")
    model.add_argument("--pretrained_model_name_or_path", default=str(EMBEDDED_CHECKPOINT), help="The pipeline.")
    model.add_argument("--filter_head", help="Folder of another filter head than the pipeline's.")
    model.add_argument("--lora_rank", type=int, default=0, help="Train a LoRA of this rank instead of the U-Net.")
    reward = parser.add_argument_group("reward: one of the first two")
    reward.add_argument("--prompts", help="CSV with Text,modality[,finding]: drawn for, rated by the filter head.")
    reward.add_argument("--ratings", help="CSV with path,Text,modality,rating[,rater]: images and people's ratings.")
    reward.add_argument("--diversity_weight", type=float, default=0.2, help="Of being unlike a prompt's other images.")
    reward.add_argument(
        "--bound", type=float, default=2.0, help="Advantages are clipped at so many standard deviations."
    )
    loss = parser.add_argument_group("loss; a step draws images, rates them, and learns from them")
    loss.add_argument("--prompts_per_step", type=int, default=64, help="Groups a step and a process.")
    loss.add_argument("--images_per_prompt", type=int, default=16, help="Images a group.")
    loss.add_argument("--timesteps_per_image", type=int, default=4, help="How often a step learns from each image.")
    loss.add_argument("--beta", type=float, default=1.0, help="Guidance strength of the paper; less moves further.")
    loss.add_argument("--old_decay", type=float, default=0.3, help="What is left of `old` after each step, in [0, 1].")
    loss.add_argument("--anchor_weight", type=float, default=0.1, help="Of the distance to the network begun with.")
    loss.add_argument("--drop_text", type=float, default=0.15, help="Share of images that only hold the anchor.")
    loss.add_argument("--snr_gamma", type=float, default=5.0, help="As in train_text_to_image.py.")
    real = parser.add_argument_group("real images, which keep the network to what they look like")
    real.add_argument("--replay", help="CSV with path,Text,modality,split: its train images are learned from, too.")
    real.add_argument("--replay_weight", type=float, default=0.3, help="Of the usual loss on them.")
    real.add_argument("--latent_variants", type=int, default=4, help="Augmented versions of every image.")
    real.add_argument("--caption_variants", type=int, default=16, help="Phrasings of every caption.")
    real.add_argument("--captions", help="JSON with phrasings of every finding; default: train/captions.json.")
    watch = parser.add_argument_group("when to stop")
    watch.add_argument("--encoder", default=str(EMBEDDED_ENCODER), help="Image-text encoder that scores unseen.")
    watch.add_argument("--watch_images", type=int, default=16, help="Images of each finding that it looks at.")
    watch.add_argument("--patience", type=int, default=3, help="Looks without a better score before it stops.")
    watch.add_argument("--least_spread", type=float, default=0.95, help="Of the spread that the images had at first.")
    loss.add_argument("--num_inference_steps", type=int, help="Of the images to learn from; default: the pipeline's.")
    parser.add_argument("--sampling_batch_size", type=int, default=512)
    args = parser.parse_args(argv)
    check_run_arguments(args)
    if bool(args.prompts) == bool(args.ratings):
        raise ValueError("Give either --prompts, for the filter head's reward, or --ratings, for people's.")
    counts = ("prompts_per_step", "timesteps_per_image", "sampling_batch_size", "watch_images", "patience")
    for name in (*counts, "num_inference_steps", "latent_variants", "caption_variants"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} has to be at least 1, got {getattr(args, name)}.")
    if args.images_per_prompt < 2:
        raise ValueError(
            f"--images_per_prompt has to be at least 2, got {args.images_per_prompt}: a group is compared."
        )
    for name, low, high in (("beta", 0, 10), ("bound", 0, 100)):
        if not low < getattr(args, name) <= high:
            raise ValueError(f"--{name} has to be above {low} and at most {high}, got {getattr(args, name)}.")
    for name in ("old_decay", "drop_text", "least_spread"):
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"--{name} has to be between 0 and 1, got {getattr(args, name)}.")
    return args


@dataclass
class Samples:
    """N finished images of some prompts.

    Args:
        latents: fp32 [N, C, h, w].
        prompt: int64 [N], of the list of prompts; also the group.
        reward: fp32 [N], higher is better, comparable within a prompt.
    """

    latents: torch.Tensor
    prompt: torch.Tensor
    reward: torch.Tensor | None = None


@torch.no_grad()
def sample(pipe: MinimPipeline, prompts: list[dict], args, generator: torch.Generator) -> Samples:
    """Draws `images_per_prompt` images for each of `prompts_per_step` prompts, at the pipeline's own settings.

    Prompts are chosen so that every finding comes up equally often.
    """
    labels = [(row["modality"], row.get("finding") or row["Text"]) for row in prompts]
    names = list(dict.fromkeys(labels))
    frequency = torch.tensor([1 / labels.count(label) for label in labels], device=generator.device)
    shares = min(args.prompts_per_step, len(prompts))
    # A whole round of findings before any comes up again, each time with another of its prompts.
    order, left = [], frequency.clone()
    of_label = torch.tensor([names.index(label) for label in labels], device=generator.device)
    while len(order) < shares:
        for label in torch.randperm(len(names), device=generator.device, generator=generator).tolist():
            mine = left * (of_label == label)
            if mine.sum() > 0 and len(order) < shares:
                order.append(int(torch.multinomial(mine, 1, generator=generator)))
                left[order[-1]] = 0
    chosen = [i for i in order for _ in range(args.images_per_prompt)]
    seeds = torch.randint(2**62, (len(chosen),), device=generator.device, generator=generator).tolist()
    latents = []
    for start in range(0, len(chosen), args.sampling_batch_size):
        mine = slice(start, start + args.sampling_batch_size)
        with torch.autocast(pipe.device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
            drawn = pipe(
                [prompts[i]["Text"] for i in chosen[mine]],
                modality=[prompts[i]["modality"] for i in chosen[mine]],
                seeds=seeds[mine],
                num_inference_steps=args.num_inference_steps,
                output_type="latent",
            ).images
        latents.append(drawn.float())
    return Samples(torch.cat(latents), torch.tensor(chosen, device=pipe.device))


def score(pipe: MinimPipeline, drawn: Samples, prompts: list[dict], args) -> dict[str, torch.Tensor]:
    """Sets `drawn.reward`, from the filter head's and from how unlike its group an image is; returns both, [N]."""
    chosen = drawn.prompt.tolist()
    texts, modalities = [prompts[i]["Text"] for i in chosen], [prompts[i]["modality"] for i in chosen]
    rated = rate(pipe, drawn.latents, texts, modalities)
    reward, unlike = finding_reward(rated), spread(drawn.latents, drawn.prompt)
    better = advantage(reward, drawn.prompt) + args.diversity_weight * advantage(unlike, drawn.prompt)
    # Nothing is worse than a copy of a training image.
    drawn.reward = torch.where(are_copies(pipe, rated, modalities), -args.bound, better)
    return {"reward": reward, "spread": unlike}


@dataclass
class Policies:
    """Three U-Nets: the one that is trained, the one that draws, and the one that it all began with."""

    new: nn.Module
    old: UNet2DConditionModel
    reference: UNet2DConditionModel

    @torch.no_grad()
    def follow(self, trained: UNet2DConditionModel, decay: float) -> None:
        """`old` moves to what has been trained, but for a share of `decay`."""
        for mine, other in zip(self.old.parameters(), trained.parameters(), strict=True):
            mine.lerp_(other.to(mine.dtype), 1 - decay)


def preference_loss(
    policies: Policies,
    scheduler: DDPMScheduler,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    noise: torch.Tensor,
    text: torch.Tensor,
    good: torch.Tensor,
    told: torch.Tensor,
    args,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """DiffusionNFT's loss and the anchor's, [n] each, and the usual loss of real images, [B - n]; not yet weighed.

    Args:
        latents: finished images [B, C, h, w], scaled as the U-Net takes them: n that were drawn, and then real ones.
        text: hidden states [B, L, D].
        good: [n] in [0, 1], see `rewards.optimality`.
        told: bool [n]; where the prompt was left out only the anchor counts.
    """
    n = len(good)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    goal = target(scheduler, latents, noise, timesteps)
    with torch.no_grad():
        drawn = noisy[:n], timesteps[:n], text[:n]
        old = policies.old(*drawn, return_dict=False)[0].float()
        reference = policies.reference(*drawn, return_dict=False)[0].float()
    # In one pass, which is what several processes expect between two steps.
    new = policies.new(noisy, timesteps, text, return_dict=False)[0].float()
    positive = old.lerp(new[:n], args.beta)
    negative = 2 * old - positive

    def distance(a, b):
        return (a - b).square().mean((1, 2, 3))

    reward = (good * distance(positive, goal[:n]) + (1 - good) * distance(negative, goal[:n])) * told
    weight = loss_weights(scheduler, timesteps, args.snr_gamma)
    return reward * weight[:n], distance(new[:n], reference) * weight[:n], distance(new[n:], goal[n:]) * weight[n:]


def update(
    policies: Policies,
    accelerator,
    optimizer,
    scheduler,
    drawn: Samples,
    texts,
    args,
    step: int,
    replay: Replay | None = None,
) -> dict:
    """Learns from each image `timesteps_per_image` times, in a new order and with new noise each time.

    Args:
        texts: hidden states of the prompts [P, L, D], and of their modalities' tokens alone [P, L, D].
        replay: real images, of which as many are learned from.
    """
    device = drawn.latents.device
    g = step_generator(args.seed, step, accelerator.process_index + 10_000, device)
    good = optimality(drawn.reward, args.bound)
    rounds = [torch.randperm(len(good), device=device, generator=g) for _ in range(args.timesteps_per_image)]
    # Whole batches only: what does not fill one was seen in another order already.
    batches = torch.cat(rounds).split(args.train_batch_size)
    batches = [part for part in batches if len(part) == len(batches[0])]
    totals = {"loss": 0.0, "anchor": 0.0, "grad_norm": 0.0}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for part in batches:
        n = len(part)
        told = torch.rand(n, device=device, generator=g) >= args.drop_text
        mine = drawn.prompt[part]
        latents, text = drawn.latents[part], torch.where(told[:, None, None], texts[0][mine], texts[1][mine])
        if replay is not None:
            latents, text = (torch.cat(pair) for pair in zip((latents, text), replay.draw(n, g), strict=True))
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), device=device, generator=g)
        noise = torch.randn(latents.shape, device=device, generator=g)
        with accelerator.autocast():
            reward, anchor, real = preference_loss(
                policies, scheduler, latents, timesteps, noise, text, good[part], told, args
            )
        # The negative side of guidance is to stay what it was, so there the anchor has its full weight.
        loss = (reward + anchor * torch.where(told, args.anchor_weight, 1.0)).mean()
        if replay is not None:
            loss = loss + args.replay_weight * real.mean()
            totals["replay"] = totals.get("replay", 0.0) + real.mean().item() / len(batches)
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        totals["loss"] += reward.mean().item() / len(batches)
        totals["anchor"] += anchor.mean().item() / len(batches)
        totals["grad_norm"] += float(norm) / len(batches)
    if not math.isfinite(totals["loss"]):
        raise ValueError(f"The loss is {totals['loss']} at step {step}: lower --learning_rate.")
    return totals


def load(args) -> MinimPipeline:
    pipe = MinimPipeline.from_pretrained(args.pretrained_model_name_or_path)
    if args.filter_head:
        pipe.filter_head = FilterHead.from_pretrained(args.filter_head).eval()
        pipe.check_filter_head()
    return pipe


def read_prompts(path: str, pipe: MinimPipeline) -> list[dict]:
    """Rows with `Text`, `modality` (an id) and `finding` if there is one; every bad row is told."""
    trained = pipe.config.modalities
    rows = read_csv(
        path,
        require=("Text", "modality"),
        check_images=False,
        check=lambda row: resolve_modality(row["modality"], trained),
    )
    if not rows:
        raise ValueError(f"{path} has no prompts.")
    return [row | {"modality": resolve_modality(row["modality"]).id} for row in rows]


def read_rated(args, pipe: MinimPipeline, device) -> tuple[list[dict], Samples]:
    """People's ratings as samples: a group is a prompt, or where its ratings do not differ, a finding or modality."""
    rows = read_ratings(args.ratings)
    for row in rows:
        row["modality"] = resolve_modality(row["modality"], pipe.config.modalities).id
    reward = rating_reward([float(row["rating"]) for row in rows], [row["rater"] for row in rows])
    keys = list(dict.fromkeys((row["modality"], row["Text"]) for row in rows))
    prompts = [{"modality": modality, "Text": text} for modality, text in keys]
    prompt = torch.tensor([keys.index((row["modality"], row["Text"])) for row in rows])
    names = list(dict.fromkeys(modality for modality, _ in keys))
    kind = torch.tensor([names.index(row["modality"]) for row in rows])
    # An only rating of a prompt says something beside those of its modality.
    alone = torch.bincount(prompt)[prompt] < 2
    better = torch.where(alone, advantage(reward, kind), advantage(reward, prompt))
    if not better.any():
        raise ValueError(f"{args.ratings}: all {len(rows)} ratings are alike, so there is nothing to prefer.")
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    paths = list(dict.fromkeys(row["path"] for row in rows))
    first = {row["path"]: row for row in reversed(rows)}
    images = load_images([first[path] for path in paths], args.ratings, size)
    latents = encode(pipe.vae, images, args.mixed_precision == "bf16").float()
    latents = latents[torch.tensor([paths.index(row["path"]) for row in rows])]
    return prompts, Samples(latents.to(device), prompt.to(device), better.to(device))


class Best:
    """The best look so far: its score, when it was, and how many looks have come since."""

    def __init__(self):
        self.score, self.step, self.since, self.first_spread = -math.inf, 0, 0, None

    def take(self, score: float, spread: float, step: int, least_spread: float) -> bool:
        """Whether this look is the best; images that have grown alike are never."""
        self.first_spread = spread if self.first_spread is None else self.first_spread
        if score > self.score and spread >= least_spread * self.first_spread:
            self.score, self.step, self.since = score, step, 0
            return True
        self.since += 1
        return False

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


def main(argv=None) -> dict:
    args = parse_args(argv)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision, log_with=args.report_to, project_dir=args.output_dir
    )
    checkpoint = find_checkpoint(args)
    output, device, rank = Path(args.output_dir), accelerator.device, accelerator.process_index
    set_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    pipe = load(args).to(device)
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False).eval()
    if args.prompts and pipe.filter_head is None:
        raise ValueError(
            f"{args.pretrained_model_name_or_path} has no filter head to reward with: give --ratings, or train one."
        )
    if args.ratings:
        prompts, rated = read_rated(args, pipe, device)
    else:
        prompts, rated = read_prompts(args.prompts, pipe), None
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(device)
    kinds = [resolve_modality(row["modality"]) for row in prompts]
    with torch.no_grad():
        told = [prompt_text(row["Text"], kind, pipe.tokenizer) for row, kind in zip(prompts, kinds, strict=True)]
        untold = [prompt_text("", kind, pipe.tokenizer) for kind in kinds]
        texts = tuple(torch.cat([pipe.encode_texts([t], device) for t in some]) for some in (told, untold))

    replay = Replay(args, accelerator, pipe) if args.replay else None

    trained = pipe.unet
    if args.lora_rank:
        from peft import LoraConfig

        layers = ["to_k", "to_q", "to_v", "to_out.0"]
        trained.add_adapter(LoraConfig(r=args.lora_rank, lora_alpha=args.lora_rank, target_modules=layers))
    else:
        trained.requires_grad_(True)
    policies = Policies(trained, copy.deepcopy(trained).requires_grad_(False), copy.deepcopy(trained))
    policies.reference.requires_grad_(False)
    # Ratings are of what the first network drew, which stays `old`; otherwise what was learned draws the next images.
    pipe.unet = trained if rated is not None else policies.old
    if args.gradient_checkpointing:
        trained.enable_gradient_checkpointing()
    weights = [p for p in trained.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        weights, lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=args.adam_weight_decay
    )
    policies.new, optimizer = accelerator.prepare(trained, optimizer)
    if args.compile:
        for network in (trained, policies.old, policies.reference):
            network.compile(dynamic=False)
    schedule, best = Schedule(args.max_train_steps, args.max_train_minutes, look_every=1), Best()
    accelerator.register_for_checkpointing(policies.old, schedule, best)
    if checkpoint:
        accelerator.load_state(str(checkpoint))
    if accelerator.is_main_process:
        note_arguments(args, checkpoint)
    if args.report_to:
        accelerator.init_trackers("minim-preference", config=vars(args))
    watch = Watch(args.encoder, prompts, args.watch_images, device) if accelerator.is_main_process else None
    drawn_a_step = args.images_per_prompt * min(args.prompts_per_step, len(prompts)) * accelerator.num_processes
    log = Log(accelerator, args.output_dir, schedule, drawn_a_step)

    def look() -> bool:
        """Scores, pictures, and whether it is time to stop; by the main process."""
        stop = [False]
        if accelerator.is_main_process:
            with torch.autocast(device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
                figures = watch.look(pipe, output / f"samples-{schedule.step}", args.sampling_batch_size)
            if best.take(figures["score"], figures["spread"], schedule.step, args.least_spread):
                save_weights(args, pipe.unet, output / "best")
            stop = [best.since >= args.patience]
            log.write("val", **figures, best=best.step)
        broadcast_object_list(stop)
        return stop[0]

    stop = look() if schedule.step == 0 else False
    while not (schedule.done or stop):
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(args.learning_rate, args.lr_warmup_steps)
        figures = {}
        if rated is None:
            drawn = sample(pipe, prompts, args, step_generator(args.seed, schedule.step, rank, device))
            figures = {name: value.mean().item() for name, value in score(pipe, drawn, prompts, args).items()}
        else:
            drawn = rated
        # Without dropout: what differs from `old` is to be what was learned, not noise.
        figures |= update(policies, accelerator, optimizer, scheduler, drawn, texts, args, schedule.step, replay)
        if rated is None:
            policies.follow(trained, args.old_decay)
        schedule.advance(accelerator)
        log.tick(**figures)
        log.write("train", **{name: round(value, 5) for name, value in figures.items()})
        last = schedule.done
        if schedule.step % args.validation_steps == 0 or last:
            stop = look()
        if schedule.step % args.checkpointing_steps == 0 and not (last or stop):
            save_checkpoint(accelerator, args.output_dir, schedule.step, args.checkpoints_total_limit)

    if accelerator.is_main_process:
        log.write("best", score=best.score, at_step=best.step)
        finish(args, pipe, output)
        push_pipeline(args, output / "pipeline")
    accelerator.end_training()
    return {"score": best.score, "at_step": best.step, "steps": schedule.step, "minutes": schedule.spent / 60}


def save_weights(args, unet: UNet2DConditionModel, folder: Path) -> None:
    """Writes the U-Net, or the LoRA, whole or not at all."""
    unfinished = folder.with_name(f".{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    if args.lora_rank:
        from peft.utils import get_peft_model_state_dict

        MinimPipeline.save_lora_weights(unfinished, unet_lora_layers=get_peft_model_state_dict(unet))
    else:
        unet.save_pretrained(unfinished / "unet")
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def finish(args, pipe: MinimPipeline, output: Path) -> None:
    """Writes the whole pipeline with the best weights to `pipeline/`; a LoRA is fused, and lies in `best/` as well."""
    made = load(args)
    if args.lora_rank:
        made.load_lora_weights(output / "best")
        made.fuse_lora()
        made.unload_lora_weights()
    else:
        made.unet = UNet2DConditionModel.from_pretrained(output / "best" / "unet")
    unfinished = output / ".pipeline"
    shutil.rmtree(unfinished, ignore_errors=True)
    made.save_pretrained(unfinished)
    shutil.rmtree(output / "pipeline", ignore_errors=True)
    unfinished.rename(output / "pipeline")


if __name__ == "__main__":
    main()
