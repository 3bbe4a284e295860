"""Trains the filter head: how good an image will be, and whether it shows what was asked, at every noise level.

Before anybody has rated anything it learns from a rubric (`rubric.py`): real images and the sampler's own, whole and
damaged, with right and wrong captions; then, with --ratings, from people's grades of quality, a bias for each rater
(`raters.py`). Of an image it sees what the pipeline can give it at any step: noisy latents, the U-Net's estimate of
the clean ones for the caption, the noise level, and the caption's tokens (latent reward models, arXiv 2502.01051).

It learns from part A of the train split, as does the teacher that says what generated images show; the judges of
part B never meet it.
"""

import json
import warnings
from dataclasses import asdict

import torch
from diffusers.training_utils import EMAModel

from ... import MinimPipeline
from ...data.image_loading import load_images
from ...disk import save_model
from ...evaluation.judges import claimed_classes, class_of
from ...files import read_report, write_report
from ...minim_filter import FilterHead
from ..captions import load_captions
from ..hub import push_parts
from ..rows import read_splits
from ..run import Run
from .class_captions import Captions
from .config import FilterConfig
from .data import encode, load_materials
from .grades import learn_all_grades
from .heads import extend_head, new_head
from .lessons import Lessons, join_batches
from .raters import learned_from, read_ratings
from .report import finding_report, other_findings


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
        captions = Captions(
            self.rows, self.classes, phrasings, self.pipe.tokenizer, variants, config.seed, device=run.device
        )
        rated = {row["path"] for row in self.ratings}
        pool, drawn = load_materials(config, self.pipe, self.rows, self.classes, rated)
        self.lessons = Lessons(config, self.pipe, captions, pool, drawn)
        if config.pretrained_filter_head:
            head = extend_head(FilterHead.from_pretrained(config.pretrained_filter_head), self.pipe).to(run.device)
        else:
            head = new_head(self.pipe, (config.block_out_channels[0], config.block_out_channels[1]))
        self.ema = EMAModel(head.parameters(), decay=config.ema_decay, use_ema_warmup=True)
        self.ema.to(run.device)
        optimizer = torch.optim.AdamW(
            head.parameters(), config.learning_rate, betas=(0.9, 0.99), weight_decay=config.adam_weight_decay
        )
        head, self.optimizer = run.accelerator.prepare(head, optimizer)
        # As it was: its own arithmetic is fp32, always.
        self.head = run.accelerator.unwrap_model(head, keep_fp32_wrapper=False)
        run.images_a_step *= 2  # as many from trajectories as from the pool
        run.begin(self.ema)
        if self.val_rows:
            images = load_images(self.val_rows, config.train_data, config.resolution, reading=config.reading)
            self.val_latents = encode(self.pipe.vae, images, config.bf16)

    def read_rows(self) -> None:
        config = self.config
        train_rows, val_rows = read_splits(config)
        self.classes = claimed_classes(train_rows, train_rows, config.min_train, 0)
        self.rows = [
            row for row in train_rows if config.part in ("all", row.get("part")) and class_of(row) in self.classes
        ]
        val_rows = [row for row in val_rows if class_of(row) in self.classes]
        self.val_rows = distinguishable(val_rows, config.train_data, config.seed)
        if not self.rows:
            raise ValueError(
                f"{config.train_data} has no rows of part {config.part!r} with a finding of {config.min_train}."
            )
        self.ratings = read_ratings(config.ratings) if config.ratings else []
        if self.ratings and not any(learned_from(row, config.part) for row in self.ratings):
            parts = ", ".join(sorted({repr(row.get("part", "")) for row in self.ratings}))
            raise ValueError(
                f"{config.ratings} has no ratings of part {config.part!r} to learn from; its parts are {parts}."
            )

    def step(self) -> dict[str, torch.Tensor]:
        config, run, lessons = self.config, self.run, self.lessons
        run.schedule.set_learning_rates(self.optimizer, [config.learning_rate], config.lr_warmup_steps)
        g, count = run.generator(), config.train_batch_size
        batch = join_batches(lessons.from_pool(count, g), lessons.from_trajectories(count, g))
        parts = lessons.losses(self.head, batch, g)
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

    def finding_report(self, head: FilterHead) -> dict:
        estimates = self.lessons.estimates
        return finding_report(head, estimates, self.val_rows, self.val_latents, self.pipe.tokenizer, self.config.seed)

    def validate(self) -> None:
        if self.val_rows:
            figures = self.finding_report(self.averaged())
            self.run.log.write("val", **{f"auroc_{level}": found["auroc"] for level, found in figures.items()})
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
            report["finding_val"] = self.finding_report(head)
        save_model(head.half(), self.run.output / "filter_head")
        write_report(self.run.output / "report.json", report)
        self.run.finish()
        print(json.dumps({name: value for name, value in report.items() if name != "arguments"}, indent=2))
        return report


def distinguishable(val_rows: list[dict], source: str, seed: int) -> list[dict]:
    """The val rows, or none, with a word, if no modality has two findings to be told apart."""
    if val_rows and all(other < 0 for other in other_findings(val_rows, seed)):
        warnings.warn(
            f"{source} has val rows of one finding a modality only, which cannot be told from another:"
            " nothing is validated.",
            stacklevel=2,
        )
        return []
    return val_rows


def train(config: FilterConfig) -> dict:
    """Trains the head, writes it to `filter_head/` in `--output_dir` and its report to `report.json`.

    Returns:
        The report.

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
