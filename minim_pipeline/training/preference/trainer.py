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
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from diffusers import UNet2DConditionModel

from ... import FilterHead, MinimPipeline
from ...contact_sheet import contact_sheet
from ...disk import save_model
from ...evaluation.encoder import ImageTextEncoder
from ...evaluation.sampling import draw_images
from ...files import read_report, write_report
from ..checkpoints import list_checkpoints, step_of
from ..config import parse
from ..denoising import noise_scheduler
from ..hub import push_pipeline
from ..pipeline import add_lora, save_weights
from ..run import Best, Run
from .config import PreferenceConfig
from .sampling import Replay, encode_prompts, learn_ratings, read_prompts, sample, score
from .update import Objective, update


class Watch:
    """The image-text encoder's word on images of the same seeds each time, so many of each finding.

    Prompts have `Text`, `modality` and, if known, `finding`; without one, a prompt is its own finding.
    """

    def __init__(self, encoder: str, prompts: list[dict], images: int, device: torch.device):
        self.encoder = ImageTextEncoder.from_pretrained(encoder, device)
        labels = [(row["modality"], row.get("finding") or row["Text"]) for row in prompts]
        self.labels = list(dict.fromkeys(labels))
        texts = self.encoder.encode_texts([row["Text"] for row in prompts], [row["modality"] for row in prompts])
        known = [[i for i, label in enumerate(labels) if label == name] for name in self.labels]
        # A finding lies where its phrasings lie on average.
        self.prototypes = torch.stack([texts[own].mean(0) for own in known])  # [K, P]
        self.rows = [prompts[own[i % len(own)]] for own in known for i in range(images)]
        self.label = torch.arange(len(self.labels)).repeat_interleave(images)
        kinds = [modality for modality, _ in self.labels]
        self.same = torch.tensor([[a == b for b in kinds] for a in kinds])  # [K, K]

    @torch.no_grad()
    def look(self, pipe: MinimPipeline, folder: Path, batch_size: int) -> dict[str, float]:
        """Draws the images, leaves a sheet of each modality in `folder`, and says how good they are.

        `score`: the probability of the finding that was asked for among those of its modality, the mean over the
        images; `right`: how often it is the largest; `spread`: mean distance of features among a finding's images.
        """
        texts, modalities = ([row[name] for row in self.rows] for name in ("Text", "modality"))
        batch_size = min(batch_size, 64 if pipe.device.type == "cpu" else 256)
        images = draw_images(pipe, texts, modalities, range(len(texts)), batch_size, name="watching")
        self.save(images, folder)
        with torch.autocast(pipe.device.type, enabled=False):  # a ruler, at its own precision
            return self.measure(images)

    def measure(self, images: torch.Tensor) -> dict[str, float]:
        """`look`'s figures of images uint8 [N, 3, H, W], one for each row."""
        features, embeddings = self.encoder.encode_images(images)
        # 20 is near the temperature that the encoder was trained with; it only has to be the same each time.
        logits = (20 * embeddings @ self.prototypes.T).masked_fill(~self.same[self.label], -torch.inf)
        probabilities = logits.softmax(1)
        asked = probabilities.gather(1, self.label[:, None])[:, 0]
        spreads = [
            torch.pdist(features[self.label == k]).mean() if (self.label == k).sum() > 1 else torch.zeros(())
            for k in range(len(self.labels))
        ]
        right = (probabilities.argmax(1) == self.label).double()
        figures = {"score": asked, "right": right, "spread": torch.stack(spreads)}
        return {name: round(values.mean().item(), 5) for name, values in figures.items()}

    def save(self, images: torch.Tensor, folder: Path, columns: int = 8) -> None:
        """A row of `columns` images for each finding, a file for each modality."""
        folder.mkdir(parents=True, exist_ok=True)
        for modality in dict.fromkeys(name for name, _ in self.labels):
            findings = [k for k, (name, _) in enumerate(self.labels) if name == modality]
            chosen = torch.cat([images[self.label == k][:columns] for k in findings])
            contact_sheet(chosen, len(chosen) // len(findings)).save(folder / f"{modality}.png")


class BestLook(Best):
    """The best look so far; `of` tells which was the best when the checkpoint of a step was written."""

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
            model = config.pretrained_model_name_or_path
            raise ValueError(f"{model} has no filter head to reward with: train_filter.py makes one.")
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
        decay = config.adam_weight_decay
        optimizer = torch.optim.AdamW(weights, config.learning_rate, (0.9, 0.99), weight_decay=decay)
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


if __name__ == "__main__":  # for `accelerate launch --module`, from where the package is installed
    train(parse(PreferenceConfig))
