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
"""

import copy
import shutil

import torch
from accelerate.utils import broadcast_object_list
from diffusers import UNet2DConditionModel

from ... import FilterHead, MinimPipeline
from ...disk import save_model
from ...files import read_report, write_report
from ..checkpoints import list_checkpoints, step_of
from ..denoising import noise_scheduler
from ..hub import push_pipeline
from ..pipeline import add_lora, save_weights
from ..run import Best, Run
from .config import PreferenceConfig
from .prompts import encode_prompts, learn_ratings, read_prompts
from .replay import Replay
from .sampling import sample, score
from .update import Objective, update
from .watch import Watch


class BestLook(Best):
    """The best look so far.

    `of` tells which was the best when the checkpoint of a step was written, and so is needed by who goes on from it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first_spread: float | None = None
        self.of: dict[int, int] = {}

    def take_look(self, score: float, spread: float, step: int, least_spread: float) -> bool:
        """Whether this look is the best; images that have grown alike are never."""
        self.first_spread = spread if self.first_spread is None else self.first_spread
        if score > self.score and spread >= least_spread * self.first_spread:
            return self.take(score, step)
        self.since += 1
        return False


def load_pipeline(config: PreferenceConfig) -> MinimPipeline:
    """The pipeline to begin with, with the head that has learned from `--ratings`, if there is one already."""
    pipe = MinimPipeline.from_pretrained(config.pretrained_model_name_or_path)
    learned = config.output / "filter_head"
    head = learned if config.ratings and learned.is_dir() else config.filter_head
    if head is not None:
        pipe.filter_head = FilterHead.from_pretrained(head).eval()
        pipe.check_filter_head()
    return pipe


class Trainer:
    """The U-Net, its reward and its optimizer in a run: set up, a step, a look, the end."""

    def __init__(self, config: PreferenceConfig, run: Run):
        self.config, self.run = config, run
        run.images_a_step = config.images_per_prompt * config.prompts_per_step * run.accelerator.num_processes
        self.pipe = load_pipeline(config).to(run.device)
        self.pipe.set_progress_bar_config(disable=True)
        for part in (self.pipe.unet, self.pipe.vae, self.pipe.text_encoder):
            part.requires_grad_(False).eval()
        if self.pipe.filter_head is None:
            raise ValueError(
                f"{config.pretrained_model_name_or_path} has no filter head to reward with: train_filter.py makes one."
            )
        with run.accelerator.main_process_first():  # who tunes the head; the others read it
            if config.ratings:
                self.prompts = learn_ratings(config.ratings, config, self.pipe)
            else:
                self.prompts = read_prompts(str(config.prompts), self.pipe)
        self.texts = encode_prompts(self.pipe, self.prompts)
        self.replay = Replay(config, run, self.pipe) if config.replay else None
        self.prepare()
        self.watch = Watch(config.encoder, self.prompts, config.watch_images, run.device) if run.is_main else None

    def prepare(self) -> None:
        """Networks and optimizer, where the checkpoint has them."""
        config, run, trained = self.config, self.run, self.pipe.unet
        reference = copy.deepcopy(trained)
        if config.lora_rank:
            add_lora(trained, config.lora_rank)
        else:
            trained.requires_grad_(True)
        scheduler = noise_scheduler(self.pipe.scheduler.config, run.device)
        head = self.pipe.filter_head.requires_grad_(False).eval()
        self.objective = Objective(head, reference, scheduler, config)
        if config.gradient_checkpointing:
            trained.enable_gradient_checkpointing()
        weights = [p for p in trained.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            weights, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=config.adam_weight_decay
        )
        self.model, self.optimizer = run.accelerator.prepare(trained, optimizer)
        if config.compile:
            for network in (trained, reference):
                network.compile(dynamic=False)
        self.best = run.best = BestLook()
        run.begin()

    def train(self) -> None:
        # What was before is looked at as it was.
        stop = self.validate() if self.run.schedule.step == 0 else False
        if self.config.guidance_scale is not None:
            self.pipe.register_to_config(guidance_scale=self.config.guidance_scale)
        if not stop:
            self.run.train(self.step, self.validate, self.forget_unneeded, log_every=1)

    def step(self) -> dict[str, float]:
        config, run, step = self.config, self.run, self.run.schedule.step
        run.schedule.set_learning_rates(self.optimizer, [config.learning_rate], config.lr_warmup_steps)
        drawn = sample(self.pipe, self.prompts, config, run.generator())
        figures = {name: value.mean().item() for name, value in score(self.pipe, drawn, self.prompts).items()}
        # Without dropout: what differs from the reference is to be what was learned, not noise.
        figures |= update(
            self.model, self.objective, run.accelerator, self.optimizer, drawn, self.texts, step, self.replay
        )
        self.best.of[step + 1] = self.best.step
        return figures

    def validate(self) -> bool:
        """Scores, pictures, and whether it is time to stop; by the main process."""
        config, run, best = self.config, self.run, self.best
        stop, step = [False], run.schedule.step
        if self.watch is not None:
            with torch.autocast(run.device.type, torch.bfloat16, enabled=config.bf16):
                figures = self.watch.look(self.pipe, run.output / f"samples-{step}", config.sampling_batch_size)
            if best.take_look(figures["score"], figures["spread"], step, config.least_spread):
                save_weights(self.pipe, bool(config.lora_rank), run.output / f"best-{step}")
            stop = [best.since >= config.patience]
            run.log.write("val", **figures, best=best.step)
        broadcast_object_list(stop)
        return stop[0]

    def forget_unneeded(self, checkpoints: int = 0) -> None:
        """Removes the weights of looks that neither the best nor one of the last `checkpoints` (0: all) needs."""
        if self.run.is_main:
            last = list_checkpoints(self.run.output)[-checkpoints:]
            needed = {self.best.step, *(self.best.of.get(step_of(checkpoint), 0) for checkpoint in last)}
            for folder in self.run.output.glob("best-*"):
                if folder.name not in {f"best-{step}" for step in needed}:
                    shutil.rmtree(folder, ignore_errors=True)

    def finish(self) -> dict:
        """Writes the pipeline with the best weights to `pipeline/`, and returns the report."""
        run, best = self.run, self.best
        minutes = run.schedule.spent / 60
        report = {"score": best.score, "at_step": best.step, "steps": run.schedule.step, "minutes": minutes}
        if run.is_main:
            run.log.write("best", score=best.score, at_step=best.step)
            self.save_pipeline()
            self.forget_unneeded(checkpoints=1)
            write_report(run.output / "report.json", report)
        run.finish()
        return report

    def save_pipeline(self) -> None:
        """Writes the whole pipeline; a LoRA is fused, and lies in `best-<step>/`."""
        config, weights = self.config, self.run.output / f"best-{self.best.step}"
        pipe = load_pipeline(config)
        if config.lora_rank:
            pipe.load_lora_weights(weights)
            pipe.fuse_lora()
            pipe.unload_lora_weights()
        else:
            pipe.unet = UNet2DConditionModel.from_pretrained(weights / "unet")
        if self.best.step and config.guidance_scale is not None:
            pipe.register_to_config(guidance_scale=config.guidance_scale)
        save_model(pipe, self.run.output / "pipeline")


def train(config: PreferenceConfig) -> dict:
    """Trains the U-Net on the reward, and returns the report.

    Raises:
        ValueError: as `Run.open`; the pipeline has no filter head; or prompts or ratings are wrong.
    """
    with Run.open(config, "minim-preference", look_every=1) as run:
        if run.finished:
            report = read_report(run.output / "report.json")
        else:
            trainer = Trainer(config, run)
            trainer.train()
            report = trainer.finish()
        if run.is_main:
            push_pipeline(config, run.output / "pipeline")
        return report
