"""Trains the filter head: how good an image will be, and whether it shows what was asked, at every noise level.

Before anybody has rated anything it learns from a rubric (`rubric.py`): real images and the sampler's own, whole and
damaged, with right and wrong captions; how real an image looks it learns from the same two (`realism.py`). Then, with
--ratings, it learns from people's grades of quality, a bias for each rater (`raters.py`). Of an image it sees what the
pipeline can give it at any step: noisy latents, the U-Net's estimate of the clean ones for the caption, the noise
level, and the caption's tokens (latent reward models, arXiv 2502.01051).

It learns from part A of the train split, as does the teacher that says what generated images show, and what is real
from part C, too; the judges of part B never meet it.
"""

import copy
import json
import shutil
import warnings
from dataclasses import asdict

import torch
from diffusers.training_utils import EMAModel
from torch.utils.data import TensorDataset

from ... import MinimPipeline
from ...data.image_loading import load_images
from ...data.mapped_images import IMAGES, map_images
from ...disk import save_model
from ...evaluation.judges import claimed_classes, class_of
from ...files import read_report, write_report
from ...minim_filter import FilterHead
from ..captions import load_captions, phrase
from ..hub import push_parts
from ..randomness import step_generator
from ..rows import of_part, read_splits
from ..run import Run
from .config import FilterConfig
from .data import encode, load_materials, versions
from .heads import extend_head, new_head
from .lessons import Captions, Lessons, join_batches
from .raters import Raters, learn_from_raters, learned_from, raters_report, read_ratings
from .realism import load_counterparts, realism_report, val_counterparts
from .report import cross_validate, finding_report, other_findings, quality_report


class Trainer:
    """The filter head and its optimizer in a run: set up, a step, a validation, the end."""

    def __init__(self, config: FilterConfig, run: Run):
        self.config, self.run = config, run
        # Thresholds are found in fp32, and what they are compared with is learned in it.
        torch.backends.cuda.matmul.allow_tf32 = False
        self.read_rows()
        self.pipe = MinimPipeline.from_pretrained(config.pretrained_model_name_or_path).to(run.device)
        self.pipe.set_progress_bar_config(disable=True)
        for part in (self.pipe.unet, self.pipe.vae, self.pipe.text_encoder):
            part.requires_grad_(False).eval()
        phrasings, variants = load_captions(config.captions), config.caption_variants
        ids = phrase(self.rows, phrasings, self.pipe.tokenizer, variants, config.seed).to(run.device)
        captions = Captions(self.rows, self.classes, ids)
        rated = {row["path"] for row in self.ratings}
        pool, drawn = load_materials(config, self.pipe, self.rows, self.classes, rated)
        if config.pretrained_filter_head:
            head = extend_head(FilterHead.from_pretrained(config.pretrained_filter_head), self.pipe).to(run.device)
        else:
            channels = config.block_out_channels[0], config.block_out_channels[1]
            head = new_head(self.pipe, channels, bool(config.realism_loss_weight))
        self.rates_realism, counterparts = head.config.rates_realism, None
        if self.rates_realism:
            counterparts = load_counterparts(config, self.pipe, self.rows, self.more_real, self.classes, drawn)
        self.lessons = Lessons(config, self.pipe, captions, pool, drawn, counterparts)
        self.ema = EMAModel(head.parameters(), decay=config.ema_decay, use_ema_warmup=True)
        self.ema.to(run.device)
        decay = config.adam_weight_decay
        optimizer = torch.optim.AdamW(head.parameters(), config.learning_rate, (0.9, 0.99), weight_decay=decay)
        head, self.optimizer = run.accelerator.prepare(head, optimizer)
        # As it was: its own arithmetic is fp32, always.
        self.head = run.accelerator.unwrap_model(head, keep_fp32_wrapper=False)
        run.images_a_step *= 2 + self.rates_realism  # as many of each kind
        run.begin(self.ema)
        if self.val_rows:
            path = config.output / IMAGES / "val"
            images = map_images(path, self.val_rows, config.train_data, config.resolution, reading=config.reading)
            self.val_latents = encode(self.pipe, images, config.bf16)
            if self.rates_realism:
                self.val_counterparts = val_counterparts(self.pipe, self.val_rows, images, config)
        shutil.rmtree(config.output / IMAGES, ignore_errors=True)  # all are encoded

    def read_rows(self) -> None:
        config = self.config
        train_rows, val_rows = read_splits(config)
        self.classes = claimed_classes(train_rows, train_rows, config.min_train, 0)
        self.rows = [row for row in of_part(train_rows, config.part) if class_of(row) in self.classes]
        learned = set(map(id, self.rows))
        more = [row for row in of_part(train_rows, config.realism_part or "C") if id(row) not in learned]
        self.more_real = [row for row in more if class_of(row) in self.classes]
        self.val_rows = [row for row in val_rows if class_of(row) in self.classes]
        if self.val_rows and all(other < 0 for other in other_findings(self.val_rows, config.seed)):
            alone = "of one finding a modality only, which cannot be told from another: nothing is validated"
            warnings.warn(f"{config.train_data} has val rows {alone}.", stacklevel=2)
            self.val_rows = []
        if not self.rows:
            wanted = f"part {config.part!r} with a finding of {config.min_train}"
            raise ValueError(f"{config.train_data} has no rows of {wanted}.")
        self.ratings = read_ratings(config.ratings) if config.ratings else []
        if self.ratings and not any(learned_from(row, config.part) for row in self.ratings):
            parts = ", ".join(sorted({repr(row.get("part", "")) for row in self.ratings}))
            none = f"no ratings of part {config.part!r} to learn from"
            raise ValueError(f"{config.ratings} has {none}; its parts are {parts}.")

    def step(self) -> dict[str, torch.Tensor]:
        config, run, lessons = self.config, self.run, self.lessons
        run.schedule.set_learning_rates(self.optimizer, [config.learning_rate], config.lr_warmup_steps)
        g, count = run.generator(), config.train_batch_size
        parts = lessons.losses(self.head, lessons.drawn_batch(count, g), g)
        loss = sum(parts.values(), torch.zeros((), device=run.device))
        run.accelerator.backward(loss)
        run.accelerator.clip_grad_norm_(self.head.parameters(), config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.head.parameters())
        return {"loss": loss.detach()} | {name: value.detach() for name, value in parts.items()}

    def averaged(self) -> FilterHead:
        """A head with the averaged weights."""
        head = FilterHead.from_config(self.head.config).to(self.run.device)
        self.ema.copy_to(head.parameters())
        return head.eval()

    def val_reports(self, head: FilterHead) -> dict[str, dict]:
        """What the head tells apart of the val rows, by what."""
        held = head, self.lessons.estimates, self.val_rows
        reports = {"finding_val": finding_report(*held, self.val_latents, self.config.seed)}
        if self.rates_realism:
            reports["realism_val"] = realism_report(*held, *self.val_counterparts, self.config.seed)
        return reports

    def validate(self) -> None:
        if self.val_rows:
            reports = self.val_reports(self.averaged())
            figures = {f"auroc_{level}": found["auroc"] for level, found in reports["finding_val"].items()}
            for level, found in reports.get("realism_val", {}).items():
                figures[f"auroc_realism_{level}"] = found["auroc"]
                if float(level) == 0:
                    figures |= {f"auroc_realism_{name}": value for name, value in found["modalities"].items()}
            self.run.log.write("val", **figures)
            save_model(self.averaged().half(), self.run.output / "filter_head")

    def finish(self) -> dict:
        """Learns from people's grades, and writes the head and its report."""
        schedule, head = self.run.schedule, self.averaged()
        report = {"arguments": asdict(self.config), "n": len(self.rows), "steps": schedule.step}
        report["minutes"] = round(schedule.spent / 60, 2)
        if self.ratings:
            head, of_grades = learn_all_grades(head, self.lessons, self.ratings, self.pipe)
            report |= of_grades
        if self.val_rows:
            report |= self.val_reports(head)
        save_model(head.half(), self.run.output / "filter_head")
        write_report(self.run.output / "report.json", report)
        self.run.finish()
        print(json.dumps({name: value for name, value in report.items() if name != "arguments"}, indent=2))
        return report


def load_graded(ratings: list[dict], config: FilterConfig, pipe: MinimPipeline) -> TensorDataset:
    """Of each rating the image's latents [versions, C, h, w], the grade, and the number of the rater."""
    device = pipe.device
    images = load_images(ratings, str(config.ratings), config.resolution, reading=config.reading_elsewhere())
    pictures = versions(ratings, images, config.latent_variants, config.seed, device, config.no_mirror)
    latents = encode(pipe, pictures, config.bf16).unflatten(0, (len(ratings), -1)).to(device)
    grades = torch.tensor([int(row["rating"]) for row in ratings], device=device)
    names = [row["rater"] for row in ratings]
    return TensorDataset(latents, grades, Raters(names).index(names).to(device))


def learn_grades(
    head: FilterHead, lessons: Lessons, graded: tuple, names: list[str], seed: int
) -> tuple[FilterHead, Raters]:
    """A copy of the head after more steps with people's grades, items of `load_graded`; and their biases.

    `names` are those of all raters.
    """
    config = lessons.config
    device, count = graded[0].device, config.train_batch_size // 2
    head, raters = copy.deepcopy(head).train(), Raters(names).to(device)

    def loss(step: int) -> torch.Tensor:
        g = step_generator(seed, step, 7, device)
        batch = join_batches(lessons.from_grades(graded, count, g), lessons.drawn_batch(count, g))
        return sum(lessons.losses(head, batch, g, raters).values()) + raters.penalty(len(graded[1]))

    rate = config.rating_learning_rate
    learn_from_raters(head.parameters(), raters, loss, config.rating_steps, rate, config.max_grad_norm)
    return head.eval(), raters


def learn_all_grades(
    head: FilterHead, lessons: Lessons, ratings: list[dict], pipe: MinimPipeline
) -> tuple[FilterHead, dict]:
    """The head after learning from the ratings of its part; and a report, with `folds` of those it has not seen."""
    config, names = lessons.config, [row["rater"] for row in ratings]
    graded, report, guesses = load_graded(ratings, config, pipe), {}, None
    if config.folds:

        def train_without(index: list[int], fold: int) -> FilterHead:
            return learn_grades(head, lessons, graded[index], names, fold)[0]

        guesses = cross_validate(ratings, config.folds, config.seed, train_without, graded.tensors[0][:, 0])
        report["quality_cross_validated"] = quality_report(ratings, guesses)
    own = [i for i, row in enumerate(ratings) if learned_from(row, config.part)]
    head, raters = learn_grades(head, lessons, graded[own], names, config.folds)
    return head, report | raters_report(ratings, raters, guesses)


def train(config: FilterConfig) -> dict:
    """Trains the head, writes it to `filter_head/` in `--output_dir`, and its report, which it returns.

    Raises:
        ValueError: there are several processes, no rows or ratings to learn from, or as `Run.open`.
    """
    with Run.open(config, "minim-filter") as run:
        if run.accelerator.num_processes > 1:
            raise ValueError(f"train_filter.py is run by one process, got {run.accelerator.num_processes}.")
        if run.finished:
            report = read_report(run.output / "report.json")
        else:
            trainer = Trainer(config, run)
            run.train(trainer.step, trainer.validate)
            report = trainer.finish()
        push_parts(config, "train_filter", run.output / "filter_head")
    return report
