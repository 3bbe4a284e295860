"""Trains the U-Net on a reward: so that what it draws is rated better by the filter head, or by people.

Reward feedback learning (ReFL, ImageReward, arXiv 2304.05977) with a reward that lives on latents and knows the noise
level, as in latent reward models (arXiv 2502.01051). Of images that the pipeline draws, noised to any level, the
U-Net tells the clean latents; the filter head rates that estimate at that level; and the rating's gradient goes
through the estimate into the U-Net. Nothing is decoded, and no chain of sampling steps is differentiated through.

What keeps it honest: no reward at the highest noise levels, where an estimate is the mean of many images, and reward
would make all of them typical; an anchor to the network that it began with, alone where the prompt is left out (the
negative side of guidance stays what it was); a term for images of one prompt staying as unlike each other as they
were; no reward for copies of training images, nor for what is good already; real images beside, if asked for; and a
scorer that the training does not see, the image-text encoder, which says when to stop.

From the pipeline's filter head:

    accelerate launch train/train_preference.py --pretrained_model_name_or_path runs/model --prompts prompts.csv \
        --output_dir runs/preference --mixed_precision bf16 --max_train_minutes 4

or from people's ratings of its images, as `minim ratings` writes them; the head learns from them first:

    accelerate launch train/train_preference.py --pretrained_model_name_or_path runs/model --ratings ratings.csv \
        --output_dir runs/preference --mixed_precision bf16
"""

import argparse
import copy
import itertools
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from diffusers import DDPMScheduler, UNet2DConditionModel
from train_text_to_image import add_lora, loss_weights, target, write_unet
from tune_filter import add_tuning_arguments, check_tuning_arguments, tune

from minim_pipeline import (
    EMBEDDED_CHECKPOINT,
    EMBEDDED_ENCODER,
    FilterHead,
    MinimPipeline,
    prompt_text,
    resolve_modality,
)
from minim_pipeline.data.image_loading import key_of, load_images
from minim_pipeline.data.image_reader import add_reading_arguments, reading_of
from minim_pipeline.data.sources import read_csv
from minim_pipeline.disk import save_model, whole_folder
from minim_pipeline.files import write_json
from minim_pipeline.finite import check_loss, check_weights
from minim_pipeline.minim_filter.estimate import estimate_clean, noise_angles
from minim_pipeline.ratings import image_digest
from minim_pipeline.training.arguments import check_numbers, check_shares
from minim_pipeline.training.checkpoints import find_checkpoint, is_finished, list_checkpoints, note_finished, step_of
from minim_pipeline.training.common import (
    Log,
    Schedule,
    add_run_arguments,
    check_run_arguments,
    note_arguments,
    own_folder,
    start_trackers,
    step_generator,
)
from minim_pipeline.training.filter.data import encode
from minim_pipeline.training.filter.raters import read_ratings
from minim_pipeline.training.hub import push_pipeline
from minim_pipeline.training.loop import Run
from minim_pipeline.training.preference.replay import Replay
from minim_pipeline.training.preference.rewards import are_copies, finding_reward, rate, spread
from minim_pipeline.training.preference.watch import Watch
from minim_pipeline.training.rows import add_mirror_argument


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser)
    parser.set_defaults(train_batch_size=256, learning_rate=4e-5, lr_warmup_steps=5, adam_weight_decay=0.0)
    parser.set_defaults(max_train_steps=12, validation_steps=4, checkpointing_steps=4)
    model = parser.add_argument_group("model")
    model.add_argument("--pretrained_model_name_or_path", default=str(EMBEDDED_CHECKPOINT), help="With a filter head.")
    model.add_argument("--filter_head", help="Folder of another filter head than the pipeline's.")
    model.add_argument("--lora_rank", type=int, default=0, help="Train a LoRA of this rank instead of the U-Net.")
    reward = parser.add_argument_group("reward: one of the first two")
    reward.add_argument("--prompts", help="CSV with Text,modality[,finding]: what is drawn, and rated by the head.")
    reward.add_argument("--ratings", help="CSV with path,Text,modality,rating[,rater]: the head learns from it first.")
    reward.add_argument("--enough", type=float, default=1.5, help="Log odds of the finding from which on none counts.")
    reward.add_argument(
        "--reward_until", type=float, default=0.4, help="Share of noise levels, the lowest, to learn at."
    )
    reward.add_argument("--diversity_weight", type=float, default=8.0, help="Of a prompt's images staying unlike.")
    reward.add_argument("--anchor_weight", type=float, default=50.0, help="Of staying near the network begun with.")
    reward.add_argument(
        "--drop_text", type=float, default=0.15, help="Share of prompts left out, for the anchor only."
    )
    reward.add_argument(
        "--guidance_scale", type=float, help="Of the new pipeline, which needs less than before; default: as it was."
    )
    loss = parser.add_argument_group("a step draws images, rates them, and learns from them")
    loss.add_argument("--prompts_per_step", type=int, default=64, help="Prompts a step and a process.")
    loss.add_argument("--images_per_prompt", type=int, default=8, help="Images of each.")
    loss.add_argument("--timesteps_per_image", type=int, default=12, help="How often a step learns from each image.")
    loss.add_argument("--num_inference_steps", type=int, help="Of the images to learn from; default: the pipeline's.")
    real = parser.add_argument_group("real images, which keep the network to what they look like")
    real.add_argument("--replay", help="CSV with path,Text,modality[,split]: its train images are learned from, too.")
    real.add_argument("--snr_gamma", type=float, default=5.0, help="As in train_text_to_image.py.")
    real.add_argument("--replay_weight", type=float, default=1.0, help="Of the usual loss on them.")
    real.add_argument("--latent_variants", type=int, default=4, help="Augmented versions of every image.")
    real.add_argument("--caption_variants", type=int, default=16, help="Phrasings of every caption.")
    add_mirror_argument(real)
    real.add_argument("--captions", help="JSON with phrasings of every finding; default: the package's own.")
    watch = parser.add_argument_group("when to stop")
    watch.add_argument("--encoder", default=str(EMBEDDED_ENCODER), help="Image-text encoder that scores unseen.")
    watch.add_argument("--watch_images", type=int, default=16, help="Images of each finding that it looks at.")
    watch.add_argument("--patience", type=int, default=3, help="Looks without a better score before it stops.")
    watch.add_argument("--least_spread", type=float, default=0.9, help="Of the spread that the images had at first.")
    add_tuning_arguments(parser)
    add_reading_arguments(parser)
    parser.add_argument("--sampling_batch_size", type=int, default=512)
    args = parser.parse_args(argv)
    check_numbers(parser, args, from_zero=("seed", "lora_rank", "lr_warmup_steps"))
    check_run_arguments(args)
    check_tuning_arguments(args)
    check_shares(args, "drop_text", "least_spread")
    if bool(args.prompts) == bool(args.ratings):
        raise ValueError("Give either --prompts, to be rated by the filter head, or --ratings, which it learns from.")
    if args.images_per_prompt < 2:
        raise ValueError(
            f"--images_per_prompt has to be at least 2, got {args.images_per_prompt}: a group is compared."
        )
    if args.train_batch_size % args.images_per_prompt:
        raise ValueError(
            f"--train_batch_size has to be a multiple of --images_per_prompt ({args.images_per_prompt}), whose images"
            f" are compared; got {args.train_batch_size}."
        )
    if not 0 < args.reward_until <= 1:
        raise ValueError(f"--reward_until has to be above 0 and at most 1, got {args.reward_until}.")
    return args


@dataclass
class Samples:
    """N finished images, those of a prompt one after the other.

    Args:
        latents: fp32 [N, C, h, w].
        prompt: int64 [N], of the list of prompts.
        counts: bool [N], whether the reward of each counts; set by `score`.
    """

    latents: torch.Tensor
    prompt: torch.Tensor
    counts: torch.Tensor | None = None


@torch.no_grad()
def sample(pipe: MinimPipeline, prompts: list[dict], args, generator: torch.Generator) -> Samples:
    """Draws `images_per_prompt` images for each of `prompts_per_step` prompts, at the pipeline's own settings.

    Prompts are chosen so that every finding comes up equally often.
    """
    queues: dict[tuple[str, str], list[int]] = {}
    for i in torch.randperm(len(prompts), device=generator.device, generator=generator).tolist():
        queues.setdefault((prompts[i]["modality"], prompts[i].get("finding") or prompts[i]["Text"]), []).append(i)
    # The findings in turn, and of each its prompts in turn, both in an order of chance.
    turns = itertools.cycle([itertools.cycle(queue) for queue in queues.values()])
    order = [next(queue) for queue in itertools.islice(turns, args.prompts_per_step)]
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


def score(pipe: MinimPipeline, drawn: Samples, prompts: list[dict]) -> dict[str, torch.Tensor]:
    """Rates the finished images: `reward` and `spread` [N], to be watched. Copies of training images do not count."""
    chosen = drawn.prompt.tolist()
    modalities = [prompts[i]["modality"] for i in chosen]
    rated = rate(pipe, drawn.latents, [prompts[i]["Text"] for i in chosen], modalities)
    drawn.counts = ~are_copies(pipe, rated, modalities)
    return {"reward": finding_reward(rated), "spread": spread(drawn.latents, drawn.prompt)}


@dataclass
class Texts:
    """Of P prompts: hidden states [P, L, D]; those of their modalities' tokens alone; and the head's texts [P, T]."""

    told: torch.Tensor
    untold: torch.Tensor
    asked: torch.Tensor


@torch.no_grad()
def encode_prompts(pipe: MinimPipeline, prompts: list[dict]) -> Texts:
    device, kinds = pipe.device, [resolve_modality(row["modality"]) for row in prompts]
    words = [row["Text"] for row in prompts]
    told = [prompt_text(text, kind, pipe.tokenizer) for text, kind in zip(words, kinds, strict=True)]
    distinct = list(dict.fromkeys(kinds))
    untold = pipe.encode_texts([prompt_text("", kind, pipe.tokenizer) for kind in distinct], device)
    return Texts(
        torch.cat([pipe.encode_texts(told[i : i + 256], device) for i in range(0, len(told), 256)]),
        untold[[distinct.index(kind) for kind in kinds]],
        pipe.prepare_funnel(words, kinds, list(range(len(kinds))), 1, device).text,
    )


class Objective:
    """What the U-Net is trained for: the filter head's rating, near the network that it began with.

    Args:
        head: frozen.
        reference: frozen.
        scheduler: the noise schedule.
    """

    def __init__(self, head: FilterHead, reference: UNet2DConditionModel, scheduler: DDPMScheduler, args):
        self.head, self.reference, self.scheduler, self.args = head, reference, scheduler, args

    def losses(
        self,
        unet,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        noise: torch.Tensor,
        text: torch.Tensor,
        asked: torch.Tensor,
        group: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """By name: `reward`, `anchor` and `diversity` of n drawn images, [n] each; `replay` of real ones, [B - n].

        Args:
            unet: the one that is trained.
            latents: finished images [B, C, h, w], scaled as the U-Net takes them: n that were drawn, then real ones.
            timesteps: int64 [B], the same within a group.
            text: hidden states [B, L, D].
            asked: what the head is to find, [n, T].
            group: int64 [n]; images of one prompt.
        """
        n = len(group)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        # In one pass, which is what several processes expect between two steps.
        new = unet(noisy, timesteps, text, return_dict=False)[0].float()
        with torch.no_grad():
            old = self.reference(noisy[:n], timesteps[:n], text[:n], return_dict=False)[0].float()
        angle = noise_angles(self.scheduler.alphas_cumprod, timesteps[:n])
        before, after = (
            estimate_clean(noisy[:n], told, angle, self.scheduler.config.prediction_type) for told in (old, new[:n])
        )
        rated = self.head(noisy[:n], after, angle, text=asked)
        real = (new[n:] - target(self.scheduler, latents, noise, timesteps)[n:]).square().mean((1, 2, 3))
        return {
            "reward": finding_reward(rated).clamp(max=self.args.enough),
            "anchor": (new[:n] - old).square().mean((1, 2, 3)),
            # How much less unlike they are, as a share of what they were.
            "diversity": spread(after, group) / spread(before, group).clamp(min=1e-3) - 1,
            "replay": real * loss_weights(self.scheduler, timesteps[n:], self.args.snr_gamma),
        }


def update(
    unet,
    objective: Objective,
    accelerator,
    optimizer,
    drawn: Samples,
    texts: Texts,
    step: int,
    replay: Replay | None = None,
) -> dict[str, float]:
    """Learns from each image `timesteps_per_image` times, with new noise each time; returns means of the losses.

    Args:
        replay: real images, of which as many are learned from.
    """
    args, scheduler, device = objective.args, objective.scheduler, drawn.latents.device
    g = step_generator(args.seed, step, accelerator.process_index + 10_000, device)
    size = args.images_per_prompt
    groups = len(drawn.prompt) // size
    rounds = [torch.randperm(groups, device=device, generator=g) for _ in range(args.timesteps_per_image)]
    # Whole groups, which are compared, and whole batches: what does not fill one was seen in another order already.
    batches = torch.cat(rounds).split(max(1, args.train_batch_size // size))
    batches = [part for part in batches if len(part) == len(batches[0])]
    totals: dict[str, float] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for part in batches:
        index = (part[:, None] * size + torch.arange(size, device=device)).flatten()
        n, count = len(index), len(part)
        group = torch.arange(count, device=device).repeat_interleave(size)
        told = torch.rand(count, device=device, generator=g) >= args.drop_text
        # The negative side is anchored at all noise levels.
        levels = scheduler.config.num_train_timesteps * torch.where(told, args.reward_until, 1.0)
        timesteps = (torch.rand(count, device=device, generator=g) * levels).long()[group]
        told, mine = told[group], drawn.prompt[index]
        latents, text = drawn.latents[index], torch.where(told[:, None, None], texts.told[mine], texts.untold[mine])
        if replay is not None:
            latents, text = (torch.cat(pair) for pair in zip((latents, text), replay.draw(n, g), strict=True))
            more = torch.randint(scheduler.config.num_train_timesteps, (n,), device=device, generator=g)
            timesteps = torch.cat([timesteps, more])
        noise = torch.randn(latents.shape, device=device, generator=g)
        with accelerator.autocast():
            parts = objective.losses(unet, latents, timesteps, noise, text, texts.asked[mine], group)
        counted = (told & drawn.counts[index]).float()
        wanted = parts["reward"] + args.diversity_weight * parts["diversity"].clamp(max=0)
        loss = (args.anchor_weight * parts["anchor"] - wanted * counted).mean()
        if replay is not None:
            loss = loss + args.replay_weight * parts["replay"].mean()
        else:
            del parts["replay"]
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        for name, value in {"loss": loss, **parts, "grad_norm": norm}.items():
            totals[name] = totals.get(name, 0.0) + float(value.detach().mean()) / len(batches)
    check_loss(totals["loss"], step + 1)
    # The reward of estimates; that of finished images is told by `score`.
    totals["estimated_reward"] = totals.pop("reward")
    return totals


def load(args) -> MinimPipeline:
    pipe = MinimPipeline.from_pretrained(args.pretrained_model_name_or_path)
    learned = Path(args.output_dir) / "filter_head"
    head = learned if args.ratings and learned.is_dir() else args.filter_head
    if head is not None:
        pipe.filter_head = FilterHead.from_pretrained(head).eval()
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


def learn_ratings(args, pipe: MinimPipeline) -> list[dict]:
    """Gives the pipeline a head that has learned from people's ratings, and returns their prompts.

    The head is kept in `output_dir`, and read from there when the run goes on.

    Raises:
        ValueError: the head that is kept there has learned from other ratings, or their images have changed.
    """
    rows = read_ratings(args.ratings)
    learned_from = {"ratings": image_digest(args.ratings), "images": key_of(rows, args.ratings, reading_of(args))}
    for row in rows:
        row["modality"] = resolve_modality(row["modality"], pipe.config.modalities).id
    folder = Path(args.output_dir) / "filter_head"
    if not folder.is_dir():
        size = pipe.unet.config.sample_size * pipe.vae_scale_factor
        images = load_images(rows, args.ratings, size, reading=reading_of(args))
        latents = encode(pipe.vae, images, args.mixed_precision == "bf16").float()
        head, report = tune(pipe, rows, latents, args)
        print(json.dumps(report, indent=2))
        check_weights(head)
        with whole_folder(folder) as unfinished:
            head.save_pretrained(unfinished)
            write_json(unfinished / "ratings.json", learned_from)
    elif json.loads((folder / "ratings.json").read_text()) != learned_from:
        raise ValueError(
            f"{folder} has learned from other ratings than {args.ratings}, or other images: choose another"
            " --output_dir."
        )
    pipe.filter_head = FilterHead.from_pretrained(folder).eval().to(pipe.device)
    keys = dict.fromkeys((row["modality"], row["Text"], row.get("finding") or "") for row in rows)
    return [{"modality": modality, "Text": text, "finding": finding} for modality, text, finding in keys]


class Best:
    """The best look so far: its score, when it was, and how many looks have come since.

    `of` tells which was the best when the checkpoint of a step was written, and so is needed by who goes on from it.
    """

    def __init__(self):
        self.score, self.step, self.since, self.first_spread = -math.inf, 0, 0, None
        self.of: dict[int, int] = {}

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
    with own_folder(args):
        return train(args)


def train(args: argparse.Namespace) -> dict:
    """Trains the U-Net, and returns the report; `--output_dir` is this run's alone."""
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision, log_with=args.report_to, project_dir=args.output_dir
    )
    output, device, rank = Path(args.output_dir), accelerator.device, accelerator.process_index
    if is_finished(args):
        if accelerator.is_main_process:
            push_pipeline(args, output / "pipeline")
        return json.loads((output / "report.json").read_text())
    checkpoint = find_checkpoint(args)
    set_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    pipe = load(args).to(device)
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False).eval()
    if pipe.filter_head is None:
        raise ValueError(
            f"{args.pretrained_model_name_or_path} has no filter head to reward with: train_filter.py makes one."
        )
    with accelerator.main_process_first():  # who tunes the head; the others read it
        prompts = learn_ratings(args, pipe) if args.ratings else read_prompts(args.prompts, pipe)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(device)
    texts = encode_prompts(pipe, prompts)
    replay = Replay(args, accelerator, pipe) if args.replay else None

    trained, reference = pipe.unet, copy.deepcopy(pipe.unet)
    if args.lora_rank:
        add_lora(trained, args.lora_rank)
    else:
        trained.requires_grad_(True)
    objective = Objective(pipe.filter_head.requires_grad_(False).eval(), reference, scheduler, args)
    if args.gradient_checkpointing:
        trained.enable_gradient_checkpointing()
    weights = [p for p in trained.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        weights, lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=args.adam_weight_decay
    )
    wrapped, optimizer = accelerator.prepare(trained, optimizer)
    if args.compile:
        for network in (trained, reference):
            network.compile(dynamic=False)
    schedule, best = Schedule(args.max_train_steps, args.max_train_minutes, look_every=1), Best()
    accelerator.register_for_checkpointing(schedule, best)
    if checkpoint:
        accelerator.load_state(str(checkpoint))
    if accelerator.is_main_process:
        note_arguments(args, checkpoint)
    start_trackers(accelerator, "minim-preference", args)
    watch = Watch(args.encoder, prompts, args.watch_images, device) if accelerator.is_main_process else None
    drawn_a_step = args.images_per_prompt * args.prompts_per_step * accelerator.num_processes
    log = Log(accelerator, args.output_dir, schedule, drawn_a_step)

    def look() -> bool:
        """Scores, pictures, and whether it is time to stop; by the main process."""
        stop = [False]
        if accelerator.is_main_process:
            with torch.autocast(device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
                figures = watch.look(pipe, output / f"samples-{schedule.step}", args.sampling_batch_size)
            if best.take(figures["score"], figures["spread"], schedule.step, args.least_spread):
                save_weights(args, pipe, output / f"best-{schedule.step}")
            stop = [best.since >= args.patience]
            log.write("val", **figures, best=best.step)
        broadcast_object_list(stop)
        return stop[0]

    def forget() -> None:
        """After a checkpoint: weights that neither it nor an earlier one needs."""
        if accelerator.is_main_process:
            forget_weights(output, {best.step, *(best.of.get(step_of(c), 0) for c in list_checkpoints(output))})

    with Run(accelerator, args, schedule, look, saved=forget) as run:
        # What was before is looked at as it was.
        stop = look() if schedule.step == 0 else False
        if args.guidance_scale is not None:
            pipe.register_to_config(guidance_scale=args.guidance_scale)
        stop = stop or run.begin()
        while not (schedule.done or stop):
            for group in optimizer.param_groups:
                group["lr"] = schedule.learning_rate(args.learning_rate, args.lr_warmup_steps)
            drawn = sample(pipe, prompts, args, step_generator(args.seed, schedule.step, rank, device))
            figures = {name: value.mean().item() for name, value in score(pipe, drawn, prompts).items()}
            # Without dropout: what differs from the reference is to be what was learned, not noise.
            figures |= update(wrapped, objective, accelerator, optimizer, drawn, texts, schedule.step, replay)
            schedule.advance(accelerator)
            log.tick(**figures)
            log.write("train", **{name: round(value, 5) for name, value in figures.items()})
            best.of[schedule.step] = best.step
            stop = run.end_step(torch.tensor(figures["loss"]))

    report = {"score": best.score, "at_step": best.step, "steps": schedule.step, "minutes": schedule.spent / 60}
    if accelerator.is_main_process:
        log.write("best", score=best.score, at_step=best.step)
        finish(args, output, best.step)
        forget_weights(output, {best.step, *(best.of.get(step_of(c), 0) for c in list_checkpoints(output)[-1:])})
        write_json(output / "report.json", report)
        note_finished(args, schedule)
        push_pipeline(args, output / "pipeline")
    accelerator.end_training()
    return report


def save_weights(args, pipe: MinimPipeline, folder: Path) -> None:
    """Writes the U-Net, or the LoRA, finite and whole, or not at all."""
    check_weights(pipe.unet)
    with whole_folder(folder) as unfinished:
        write_unet(pipe, bool(args.lora_rank), unfinished)


def forget_weights(output: Path, needed: set[int]) -> None:
    """Removes the weights of looks at other steps than those `needed`."""
    for folder in output.glob("best-*"):
        if folder.name not in {f"best-{step}" for step in needed}:
            shutil.rmtree(folder, ignore_errors=True)


def finish(args, output: Path, best: int) -> None:
    """Writes the whole pipeline with the best weights to `pipeline/`; a LoRA is fused, and lies in `best-<step>/`."""
    made = load(args)
    if args.lora_rank:
        made.load_lora_weights(output / f"best-{best}")
        made.fuse_lora()
        made.unload_lora_weights()
    else:
        made.unet = UNet2DConditionModel.from_pretrained(output / f"best-{best}" / "unet")
    if best and args.guidance_scale is not None:
        made.register_to_config(guidance_scale=args.guidance_scale)
    save_model(made, output / "pipeline")


if __name__ == "__main__":
    main()
