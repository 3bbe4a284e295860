"""Trains the filter head: how good an image will be, and whether it shows what was asked, at every noise level.

Before anybody has rated anything it learns from a rubric (`rubric.py`): real images and the sampler's own, whole and
damaged, with right and wrong captions; then, with --ratings, from people's grades of quality, a bias for each rater
(`raters.py`). Of an image it sees what the pipeline can give it at any step: noisy latents, the U-Net's estimate of
the clean ones for the caption, the noise level, and the caption's tokens (latent reward models, arXiv 2502.01051).

It learns from part A of the train split, as does the teacher that says what generated images show; the judges of
part B never meet it. The teacher comes from

    python train/train_classifier.py --train_data data.csv --part A --output_dir runs/teacher
    python train/train_filter.py --train_data data.csv --ratings ratings.csv --teacher runs/teacher \
        --output_dir runs/filter --mixed_precision bf16
"""

import argparse
import copy
import json
import math
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel

from minim_pipeline import EMBEDDED_CHECKPOINT, MinimPipeline
from minim_pipeline.data.image_loading import key_of, load_images
from minim_pipeline.data.image_reader import files_key, reading_of, reading_of_other
from minim_pipeline.disk import save_model
from minim_pipeline.evaluation.judges import claimed_classes, class_of, load_judges
from minim_pipeline.files import write_json
from minim_pipeline.finite import FiniteLoss
from minim_pipeline.generate.command import model_identity, read_model_index
from minim_pipeline.minim_filter import FilterHead
from minim_pipeline.minim_filter.estimate import estimate_clean, noise_angles
from minim_pipeline.modalities import MODALITIES
from minim_pipeline.training.arguments import check_numbers, check_shares
from minim_pipeline.training.captions import load_captions
from minim_pipeline.training.checkpoints import find_checkpoint, is_finished, note_finished
from minim_pipeline.training.common import (
    Log,
    Schedule,
    add_common_arguments,
    check_common_arguments,
    note_arguments,
    own_folder,
    read_splits,
    start_trackers,
    step_generator,
)
from minim_pipeline.training.filter.data import Captions, Drawn, Pool, build_pool, draw, encode, kept, versions
from minim_pipeline.training.filter.raters import Raters, learned_from, raters_report, read_ratings
from minim_pipeline.training.filter.report import cross_validate, finding_report, other_findings, quality_report
from minim_pipeline.training.filter.trajectories import Trajectories
from minim_pipeline.training.hub import push_parts
from minim_pipeline.training.loop import Run
from minim_pipeline.training.rows import mirrored, tell_mirrored


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.set_defaults(train_batch_size=256, learning_rate=1e-3, adam_weight_decay=0.3, max_train_steps=5000)
    model = parser.add_argument_group("model")
    model.add_argument("--pretrained_model_name_or_path", default=str(EMBEDDED_CHECKPOINT), help="The pipeline.")
    model.add_argument("--teacher", required=True, help="Classifiers of part A: say what generated images show.")
    model.add_argument("--pretrained_filter_head", help="Start from this head; its config stays.")
    model.add_argument("--block_out_channels", type=int, nargs=2, default=(80, 144), help="Of a head from scratch.")
    data = parser.add_argument_group("what it learns from")
    data.add_argument("--part", default="A", help="Rows of the train split with this `part`; 'all' takes every row.")
    data.add_argument(
        "--ratings", help="CSV with path,Text,modality,rating[,rater,part,group]: people's grades of quality, 1 to 3."
    )
    data.add_argument("--captions", help="JSON with phrasings of every finding; default: the package's own.")
    data.add_argument("--caption_variants", type=int, default=16, help="Phrasings of every caption.")
    data.add_argument("--latent_variants", type=int, default=8, help="Augmented versions of every image.")
    data.add_argument("--drawn_images", type=int, default=16_000, help="Images drawn to learn from.")
    data.add_argument("--trajectory_steps", type=int, default=6, help="Steps kept of each.")
    data.add_argument("--draw_batch_size", type=int, default=256)
    data.add_argument("--min_train", type=int, default=20, help="Findings with fewer train images are left out.")
    loss = parser.add_argument_group("loss")
    loss.add_argument("--clean_share", type=float, default=0.5, help="Share of finished images among the pool's.")
    loss.add_argument("--class_weight", type=float, default=0.5, help="Of telling all findings apart by their texts.")
    loss.add_argument("--code_weight", type=float, default=0.2, help="Of telling images apart by their codes.")
    loss.add_argument("--rating_steps", type=int, default=300, help="Further steps with people's grades, if any.")
    loss.add_argument("--rating_learning_rate", type=float, default=2e-4)
    loss.add_argument("--folds", type=int, default=5, help="Folds of the ratings, by group; 0 leaves that out.")
    args = parser.parse_args(argv)
    check_numbers(parser, args, from_zero=("seed", "lr_warmup_steps", "rating_steps", "folds"))
    check_common_arguments(args)
    check_shares(args, "clean_share")
    for name in ("compile", "gradient_checkpointing"):
        if getattr(args, name):
            raise ValueError(f"--{name} does nothing here: leave it out.")
    if args.folds == 1:
        raise ValueError(f"--folds has to be 0 or at least 2, got {args.folds}.")
    return args


class Lessons:
    """Makes training batches from the pool and the trajectories, with the U-Net's estimates."""

    def __init__(self, args, pipe: MinimPipeline, captions: Captions, pool: Pool, drawn: Drawn):
        self.args, self.captions, self.pool, self.drawn = args, captions, pool, drawn
        self.unet, self.text_encoder = pipe.unet, pipe.text_encoder
        self.prediction_type = pipe.scheduler.config.prediction_type
        schedule = DDPMScheduler.from_config(pipe.scheduler.config)
        self.alphas_cumprod = schedule.alphas_cumprod.to(pool.latents.device)
        self.weights = pool.weights()

    @torch.no_grad()
    def look(self, latents: torch.Tensor, timesteps: torch.Tensor, ids: torch.Tensor, noise: torch.Tensor) -> tuple:
        """What a sampler would have in hand: noisy latents, estimates of the clean ones, angles."""
        angle = noise_angles(self.alphas_cumprod, timesteps)
        noisy = angle.cos()[:, None, None, None] * latents + angle.sin()[:, None, None, None] * noise
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=self.args.mixed_precision == "bf16"):
            text = self.text_encoder(ids).last_hidden_state
            prediction = self.unet(noisy, timesteps, text, return_dict=False)[0]
        return noisy, estimate_clean(noisy, prediction, angle, self.prediction_type), angle

    def from_pool(self, count: int, g: torch.Generator) -> dict[str, torch.Tensor]:
        """Images of the pool, some finished and some noised, with right and wrong captions."""
        index = torch.multinomial(self.weights, count, replacement=True, generator=g)
        latents, shows = self.pool.latents[index].float(), self.pool.shows[index]
        shown = torch.multinomial(shows + 1e-9, 1, generator=g)[:, 0]
        asked = self.captions.ask(shown, g)
        ids = self.captions.of_classes(asked, g)
        finished = round(self.args.clean_share * count)
        timesteps = torch.randint(len(self.alphas_cumprod), (count - finished,), device=latents.device, generator=g)
        noise = torch.randn(latents[finished:].shape, device=latents.device, generator=g)
        noisy, clean, angle = self.look(latents[finished:], timesteps, ids[finished:], noise)
        return {
            "noisy": torch.cat([latents[:finished], noisy]),
            "clean": torch.cat([latents[:finished], clean]),
            "angle": torch.cat([angle.new_zeros(finished), angle]),
            "ids": ids,
            "quality": self.pool.quality[index],
            "finding": self.captions.grades(shows, asked),
            "readable": self.pool.readable[index],
            "shows": shows,
            "rater": torch.full_like(index, -1),
        }

    def from_trajectories(self, count: int, g: torch.Generator) -> dict[str, torch.Tensor]:
        """What the sampler held at some step, with the caption that it was given."""
        t, device = self.drawn.trajectories, g.device
        index = torch.randint(len(t.angle), (count,), device=device, generator=g)
        step = torch.randint(t.angle.shape[1], (count,), device=device, generator=g)
        rows = self.drawn.row[index]
        shows = self.drawn.shows[index]
        return {
            "noisy": t.noisy[index, step].float(),
            "clean": t.clean[index, step].float(),
            "angle": t.angle[index, step],
            "ids": self.captions.of_rows(rows, g),
            "quality": self.drawn.quality[index],
            "finding": self.captions.grades(shows, self.captions.label[rows]),
            # What a sampler that stops at two steps draws cannot be read.
            "readable": self.drawn.quality[index] > 1,
            "shows": shows,
            "rater": torch.full_like(index, -1),
        }

    def pairs(self, count: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Two versions each of `count` real images, finished latents [count, C, h, w]."""
        versions = self.args.latent_variants
        images = int((self.pool.kind == 0).sum()) // versions  # the pool begins with them
        first = torch.randint(images, (count,), device=g.device, generator=g) * versions
        a, b = (torch.randint(versions, (count,), device=g.device, generator=g) for _ in range(2))
        return self.pool.latents[first + a].float(), self.pool.latents[first + b].float()

    def from_grades(self, latents, grades: torch.Tensor, rater: torch.Tensor, count: int, g: torch.Generator) -> dict:
        """Finished images [N, versions, C, h, w] that people [N] graded; nothing is asked of the finding."""
        index = torch.randint(len(latents), (count,), device=latents.device, generator=g)
        version = torch.randint(latents.shape[1], (count,), device=latents.device, generator=g)
        x = latents[index, version].float()
        classes = torch.zeros(count, dtype=torch.long, device=x.device)
        return {
            "noisy": x,
            "clean": x,
            "angle": x.new_zeros(count),
            "ids": self.captions.of_classes(classes, g),
            "quality": grades[index],
            "finding": x.new_zeros(count, 3),
            "readable": torch.zeros(count, dtype=torch.bool, device=x.device),
            "shows": x.new_zeros(count, self.pool.shows.shape[1]),
            "rater": rater[index],
        }


def losses(
    head: FilterHead, batch: dict[str, torch.Tensor], captions: Captions, g, raters: Raters | None = None
) -> dict[str, torch.Tensor]:
    """Negative log likelihood of both gradings; and of the classes shown by finished images, by one caption each.

    The last is contrastive (UniCL, arXiv 2204.03610), and leaves noised images out: their estimates follow the
    caption, so they would give it away.
    """
    bias = raters(batch["rater"]) if raters is not None else None
    output = head(batch["noisy"], batch["clean"], batch["angle"], batch["ids"], quality_bias=bias)
    known = batch["quality"] > 0
    target = F.one_hot((batch["quality"] - 1).clamp(min=0), 3).float()
    quality = -(target * output.quality_probs.clamp(min=1e-6).log()).sum(1)
    finding = -(batch["finding"] * output.finding_probs.clamp(min=1e-6).log()).sum(1)
    plain = (batch["angle"] == 0) & batch["readable"]
    texts = head.encode_text(captions.of_classes(torch.arange(len(captions.count), device=known.device), g))
    classes = -(batch["shows"] * (3 * head.match(output.features, texts[:, None]).T).log_softmax(1)).sum(1)

    def mean(values, where):
        return (values * where).sum() / where.sum().clamp(min=1)

    return {
        "quality": mean(quality, known),
        "finding": mean(finding, batch["readable"]),
        "classes": mean(classes, plain),
    }


def code_loss(head: FilterHead, a: torch.Tensor, b: torch.Tensor, temperature: float = 0.1) -> torch.Tensor:
    """Versions of one image shall have one code, and other images others (InfoNCE, arXiv 1807.03748).

    tanh, so that little is lost when signs are taken, as in HashNet (arXiv 1702.00758).
    """
    x = torch.cat([a, b])
    codes = F.normalize(head.encode_image(x, x, x.new_zeros(len(x)))[1].tanh(), dim=1)  # [2 N, B]
    alike = codes @ codes.T / temperature
    alike.fill_diagonal_(-torch.inf)
    other = torch.arange(len(x), device=x.device).roll(len(a))
    return F.cross_entropy(alike, other)


def extend_head(base: FilterHead, pipe: MinimPipeline) -> FilterHead:
    """A head like `base` that also reads the tokens of modalities which the pipeline has learned since.

    The row of a new modality in the embedding starts as the mean of those of its words, as in the text encoder; so
    does that of a token which lay there unused, of a modality for which a calibrated head has no thresholds.

    Thresholds stay until `calibrate_filter.py` finds new ones. Fingerprints go, and with them the thresholds for
    copies: they are read from features that are about to change. The code, which that script fits, begins anew.

    Raises:
        ValueError: `base` was trained for other latents, or for a larger vocabulary.
    """
    tokenizer, old = pipe.tokenizer, base.config.vocab_size
    of_pipe = {"in_channels": pipe.unet.config.in_channels, "latent_scale": pipe.vae.config.scaling_factor}
    for name, value in of_pipe.items():
        if base.config[name] != value:
            raise ValueError(f"The head was trained for {name} {base.config[name]}, the pipeline has {value}.")
    if len(tokenizer) < old:
        raise ValueError(f"The head was trained for {old} tokens, the pipeline has only {len(tokenizer)}.")
    calibration = {m: {**found, "copy": -1} for m, found in (base.config.calibration or {}).items()} or None
    changed = {"vocab_size": len(tokenizer), "num_fingerprints": 0, "calibration": calibration}
    head = FilterHead.from_config({**base.config, **changed})
    fresh = {name: value for name, value in head.state_dict().items() if name.startswith("code.")}
    state = {**base.state_dict(), **fresh, "fingerprints": head.fingerprints}
    rows = torch.cat([state["text.tokens.weight"], head.text["tokens"].weight.detach()[old:]])
    for name in pipe.config.modalities or []:
        token = tokenizer.convert_tokens_to_ids(MODALITIES[name].token)
        if token >= old or (calibration and name not in calibration):
            words = tokenizer(MODALITIES[name].words, add_special_tokens=False).input_ids
            rows[token] = rows[words].mean(0)
    head.load_state_dict({**state, "text.tokens.weight": rows})
    return head


def merge(*batches: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def tune(
    head: FilterHead, lessons: Lessons, latents, grades, rater, names: list[str], args, seed: int
) -> tuple[FilterHead, Raters]:
    """A copy of the head after some more steps, half of them with people's grades; and what biases they have."""
    head, raters = copy.deepcopy(head).train(), Raters(names).to(latents.device)
    # A bias has to move as far as the head's score does, in few steps.
    groups = [{"params": head.parameters()}, {"params": raters.parameters(), "weight_decay": 0.0, "scale": 50.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.rating_learning_rate, weight_decay=0.05)
    watched = FiniteLoss()
    for step in range(args.rating_steps):
        for group in optimizer.param_groups:
            rate = args.rating_learning_rate * group.get("scale", 1.0)
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / args.rating_steps))
        g = step_generator(seed, step, 7, latents.device)
        some = args.train_batch_size // 2
        batch = merge(
            lessons.from_grades(latents, grades, rater, some, g),
            lessons.from_pool(some, g),
            lessons.from_trajectories(some, g),
        )
        loss = sum(train_losses(head, lessons, batch, args, g, raters).values()) + raters.penalty(len(grades))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        watched.add(loss, step + 1)
    watched.check()
    return head.eval(), raters


def train_losses(head: FilterHead, lessons: Lessons, batch: dict[str, torch.Tensor], args, g, raters=None) -> dict:
    """All losses of a step, weighted; their sum is what falls."""
    parts = losses(head, batch, lessons.captions, g, raters)
    parts["classes"] = args.class_weight * parts["classes"]
    if args.code_weight:
        parts["code"] = args.code_weight * code_loss(head, *lessons.pairs(min(128, args.train_batch_size), g))
    return parts


def main(argv=None) -> dict:
    args = parse_args(argv)
    with own_folder(args):
        return train(args)


def train(args: argparse.Namespace) -> dict:
    """Trains the head, and returns its report; `--output_dir` is this run's alone."""
    # --mixed_precision is that of the frozen networks: the head's own arithmetic is fp32, always.
    accelerator = Accelerator(log_with=args.report_to, project_dir=args.output_dir)
    if accelerator.num_processes > 1:
        raise ValueError(f"train_filter.py is run by one process, got {accelerator.num_processes}.")
    output, device = Path(args.output_dir), accelerator.device
    if is_finished(args):
        push_parts(args, "train_filter", output / "filter_head")
        return json.loads((output / "report.json").read_text())
    checkpoint = find_checkpoint(args)
    set_seed(args.seed)
    # Before any row is read: it may be of a modality that only the pipeline knows.
    read_model_index(args.pretrained_model_name_or_path)
    all_rows, val_rows = read_splits(args)
    classes = claimed_classes(all_rows, all_rows, args.min_train, 0)
    rows = [r for r in all_rows if args.part in ("all", r.get("part")) and class_of(r) in classes]
    val_rows = distinguishable([row for row in val_rows if class_of(row) in classes], args)
    if not rows:
        raise ValueError(f"{args.train_data} has no rows of part {args.part!r} with a finding of {args.min_train}.")
    ratings = read_ratings(args.ratings) if args.ratings else []
    if ratings and not any(learned_from(row, args.part) for row in ratings):
        parts = ", ".join(sorted({repr(row.get("part", "")) for row in ratings}))
        raise ValueError(f"{args.ratings} has no ratings of part {args.part!r} to learn from; its parts are {parts}.")

    pipe = MinimPipeline.from_pretrained(args.pretrained_model_name_or_path).to(device)
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False).eval()
    captions = Captions(
        rows, classes, load_captions(args.captions), pipe.tokenizer, args.caption_variants, args.seed, device
    )
    pool, drawn = materials(args, pipe, rows, classes, {row["path"] for row in ratings}, device)
    lessons = Lessons(args, pipe, captions, pool, drawn)
    if args.pretrained_filter_head:
        head = extend_head(FilterHead.from_pretrained(args.pretrained_filter_head), pipe).to(device)
    else:
        head = FilterHead(
            in_channels=pipe.unet.config.in_channels,
            sample_size=pipe.unet.config.sample_size,
            latent_scale=pipe.vae.config.scaling_factor,
            vocab_size=len(pipe.tokenizer),
            max_length=pipe.tokenizer.model_max_length,
            pad_token_id=pipe.tokenizer.pad_token_id,
            block_out_channels=tuple(args.block_out_channels),
        )
    ema = EMAModel(head.parameters(), decay=args.ema_decay, use_ema_warmup=True)
    ema.to(device)
    optimizer = torch.optim.AdamW(
        head.parameters(), lr=args.learning_rate, weight_decay=args.adam_weight_decay, betas=(0.9, 0.99)
    )
    head, optimizer = accelerator.prepare(head, optimizer)
    schedule = Schedule(args.max_train_steps, args.max_train_minutes)
    accelerator.register_for_checkpointing(ema, schedule)
    if checkpoint:
        accelerator.load_state(str(checkpoint))
        ema.to(device)
    note_arguments(args, checkpoint)
    start_trackers(accelerator, "minim-filter", args)
    log = Log(accelerator, args.output_dir, schedule, 2 * args.train_batch_size)
    if val_rows:
        val_images = load_images(val_rows, args.train_data, args.resolution, reading=reading_of(args))
        val_latents = encode(pipe.vae, val_images, args.mixed_precision == "bf16")

    def averaged() -> FilterHead:
        made = FilterHead.from_config(accelerator.unwrap_model(head).config).to(device)
        ema.copy_to(made.parameters())
        return made.eval()

    def train_step() -> dict[str, torch.Tensor]:
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(args.learning_rate, args.lr_warmup_steps)
        g = step_generator(args.seed, schedule.step, accelerator.process_index, device)
        batch = merge(lessons.from_pool(args.train_batch_size, g), lessons.from_trajectories(args.train_batch_size, g))
        parts = train_losses(head, lessons, batch, args, g)
        accelerator.backward(sum(parts.values()))
        accelerator.clip_grad_norm_(head.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(head.parameters())
        return {name: value.detach() for name, value in parts.items()}

    def validate() -> None:
        if val_rows:
            figures = finding_report(averaged(), lessons, val_rows, val_latents, pipe.tokenizer, args.seed)
            log.write("val", **{f"auroc_{level}": found["auroc"] for level, found in figures.items()})
            save_model(averaged().half(), output / "filter_head")

    with Run(accelerator, args, schedule, validate) as run:
        run.begin()
        while not schedule.done:
            parts = train_step()
            schedule.advance(accelerator)
            if schedule.step % 20 == 0:
                log.tick(**{name: value.item() for name, value in parts.items()})
            if schedule.step % 200 == 0:
                log.write("train", **{name: round(value.item(), 4) for name, value in parts.items()})
            run.end_step(sum(parts.values()))

    final = averaged()
    report = {
        "arguments": vars(args),
        "n": len(rows),
        "steps": schedule.step,
        "minutes": round(schedule.spent / 60, 2),
    }
    if ratings:
        graded = load_graded(ratings, args, pipe, device)
        names, guesses = [row["rater"] for row in ratings], None
        if args.folds:
            guesses = cross_validate(
                ratings,
                args.folds,
                args.seed,
                lambda mine, i: tune(final, lessons, *graded(mine), names, args, i)[0],
                graded,
            )
            report["quality, cross-validated"] = quality_report(ratings, guesses)
        mine = [i for i, row in enumerate(ratings) if learned_from(row, args.part)]
        final, raters = tune(final, lessons, *graded(mine), names, args, args.folds)
        report |= raters_report(ratings, raters, guesses)
    if val_rows:
        report["finding, val"] = finding_report(final, lessons, val_rows, val_latents, pipe.tokenizer, args.seed)
    save_model(final.half(), output / "filter_head")
    write_json(output / "report.json", json.loads(json.dumps(report, default=str)))
    note_finished(args, schedule)
    accelerator.end_training()
    push_parts(args, "train_filter", output / "filter_head")
    print(json.dumps({k: v for k, v in report.items() if k != "arguments"}, indent=2))
    return report


def distinguishable(val_rows: list[dict], args: argparse.Namespace) -> list[dict]:
    """The val rows, or none, with a word, if no modality has two findings to be told apart."""
    if val_rows and all(other < 0 for other in other_findings(val_rows, args.seed)):
        warnings.warn(
            f"{args.train_data} has val rows of one finding a modality only, which cannot be told from another:"
            " nothing is validated.",
            stacklevel=2,
        )
        return []
    return val_rows


def load_graded(ratings: list[dict], args, pipe: MinimPipeline, device):
    """A function from indices of the ratings to latents [n, versions, C, h, w], grades [n] and raters [n]."""
    images = load_images(ratings, args.ratings, args.resolution, reading=reading_of_other(args))
    pictures = versions(ratings, images, args.latent_variants, args.seed, device, args.no_mirror)
    latents = encode(pipe.vae, pictures, args.mixed_precision == "bf16").unflatten(0, (len(ratings), -1)).to(device)
    grades = torch.tensor([int(row["rating"]) for row in ratings], device=device)
    names = [row["rater"] for row in ratings]
    rater = Raters(names).index(names).to(device)
    return lambda index: (latents[index], grades[index], rater[index])


def materials(args, pipe: MinimPipeline, rows, classes, rated: set[str], device) -> tuple[Pool, Drawn]:
    """Pool and trajectories; kept in `output_dir`, so that a run goes on with what it began with."""
    key = {name: getattr(args, name) for name in ("seed", "resolution", "latent_variants", "drawn_images")}
    key |= {"steps": args.trajectory_steps, "model": model_identity(args.pretrained_model_name_or_path)}
    key["teacher"] = files_key(sorted(Path(args.teacher).rglob("*")))
    key["rows"] = key_of(rows, args.train_data, reading_of(args))
    key["rated"] = sorted(rated)
    key["mirrored"] = mirrored(rows, args.no_mirror)
    tell_mirrored(args.train_data, rows, key["mirrored"])

    def make() -> dict[str, torch.Tensor]:
        teacher = load_judges(args.teacher, device)
        sizes = args.drawn_images, args.trajectory_steps, args.draw_batch_size
        drawn = draw(pipe, teacher, rows, classes, *sizes, args.mixed_precision == "bf16", args.seed)
        images = load_images(rows, args.train_data, args.resolution, reading=reading_of(args))
        pool = build_pool(rows, images, classes, drawn, pipe.vae, rated, args, device)
        made = {f"pool.{name}": tensor for name, tensor in vars(pool).items()}
        made |= {f"drawn.{name}": tensor for name, tensor in vars(drawn.trajectories).items() if name != "images"}
        return made | {"quality": drawn.quality, "shows": drawn.shows, "row": drawn.row}

    tensors = kept(Path(args.output_dir) / "materials.safetensors", key, make)
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    pool = Pool(**{name[5:]: tensor for name, tensor in tensors.items() if name.startswith("pool.")})
    held = {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("drawn.")}
    trajectories = Trajectories(**held, images=torch.empty(0))
    return pool, Drawn(trajectories, tensors["quality"], tensors["shows"], tensors["row"])


if __name__ == "__main__":
    main()
