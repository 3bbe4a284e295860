"""Trains the U-Net: latents of medical images from a modality and a sentence.

A latent diffusion model (arXiv 2112.10752) on latents that are encoded once. What is not the textbook's:

- every image is encoded in several versions (mild crop, rotation, gamma; mirrored only where the modality allows it
  and the caption names no side), and every caption is phrased in several ways: few images, many epochs;
- min-SNR weights (arXiv 2303.09556) and, for new models, v-prediction with zero terminal SNR (arXiv 2305.08891);
- the text is dropped for classifier-free guidance in two ways: the sentence only (the modality's token stays, which is
  what the pipeline uses as the negative prompt), or everything;
- it watches for memorisation while it trains, and what is kept is the averaged weights of the lowest validation loss.

What a MinimPipeline knows it forgets while it learns something else, unless it goes on seeing it: `--replay` gives
every batch a share of old rows, and `--anchor_weight` holds its predictions for them near those of the base
(distillation, as in learning without forgetting, arXiv 1606.09282).
"""

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from transformers import CLIPTextModel

from .. import MinimPipeline, resolve_modality
from ..contact_sheet import contact_sheet
from ..evaluation.sampling import bytes_of, decode_latents
from ..finite import check_loss
from ..tokens import tokenize
from .captions import load_captions, phrase
from .config import Count, DataOptions, Positive, RunOptions, Share, Weight, option
from .denoising import Denoise, log_normal_timesteps, loss_weights, noise_scheduler, squared_error, validation_losses
from .hub import push_parts, push_pipeline
from .latents import Latents, memorised_share
from .pipeline import ModelOptions, add_lora, build_pipeline
from .rows import Rows, modality_of
from .run import Run


@dataclass(kw_only=True)
class TextToImageConfig(ModelOptions, DataOptions, RunOptions):
    """Options of the U-Net's training."""

    train_text_encoder: bool = option(False, "Train the text encoder along.")
    text_encoder_learning_rate: Weight = 1e-5
    noise_sampling: Literal["uniform", "log-normal"] = option(
        "uniform", "How noise levels are drawn: all timesteps alike, or as EDM's training (with --snr_gamma 0)."
    )
    noise_median: Positive = option(0.8, "Log-normal: the median of sigma/alpha.")
    noise_std: Weight = option(1.2, "Log-normal: the deviation of its logarithm.")
    snr_gamma: Weight = option(5.0, "min-SNR's gamma; 0 weighs all steps alike.")
    drop_text: Share = option(0.10, "Share of captions cut down to the token.")
    drop_all: Share = option(0.05, "Share of captions that are dropped whole.")
    gradient_accumulation_steps: Count = 1
    captions: str | None = option(None, "JSON with phrasings of every finding; default: the package's own.")
    caption_variants: Count = option(32, "Phrasings of every caption.")
    latent_variants: Count = option(8, "Augmented versions of every image.")
    replay: str | None = option(None, "CSV of rows that the base has learned from, or of their modalities.")
    replay_share: Weight = option(0.5, "Of every batch; 0 only validates on them.")
    anchor_weight: Weight = option(0.0, "Of the squared distance to the base's predictions for them.")
    validation_samples: Count = option(8, "Images a modality in every grid.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.drop_text + self.drop_all > 1:
            raise ValueError(f"--drop_text {self.drop_text} and --drop_all {self.drop_all} are more than 1 together.")
        if self.replay and not self.pretrained_model_name_or_path:
            raise ValueError("--replay needs --pretrained_model_name_or_path: a new model has nothing to forget.")
        if not self.replay_share < 1:
            raise ValueError(f"--replay_share has to be at least 0 and less than 1, got {self.replay_share}.")
        if self.anchor_weight and not (self.replay and self.replay_share):
            raise ValueError("--anchor_weight needs --replay with a --replay_share above 0: the rows that it is for.")
        if self.replay and self.replay_share and not 0 < self.replayed < self.train_batch_size:
            raise ValueError(
                f"--replay_share {self.replay_share} of --train_batch_size {self.train_batch_size} is {self.replayed}:"
                " old and new rows both have to be in every batch."
            )

    @property
    def replayed(self) -> int:
        """How many images of a batch are old ones."""
        return round(self.replay_share * self.train_batch_size) if self.replay else 0

    @property
    def replay_data(self) -> DataOptions | None:
        """The same options for `--replay`, of which --modality and --image_root are not; None without it."""
        if not self.replay:
            return None
        return dataclasses.replace(self, train_data=self.replay, modality=None, image_root=None)


class Trainer:
    """The U-Net, text encoder and optimizer in a run: set up, a step, a validation, the end."""

    def __init__(self, config: TextToImageConfig, run: Run):
        self.config, self.run = config, run
        self.rows = Rows.read(config, config.replay_data, config.pretrained_model_name_or_path)
        findings = self.rows.learned
        self.trainee = build_pipeline(config, config.resolution, list(findings), findings)
        if self.trainee.message:
            run.accelerator.print(self.trainee.message)
        self.pipe = self.trainee.pipe
        self.unet, self.text_encoder = self.pipe.unet, self.pipe.text_encoder
        self.scheduler = noise_scheduler(self.pipe.scheduler.config, run.device)
        self.encode()
        self.prepare()
        if config.replay and self.rows.val and run.schedule.step == 0 and run.is_main:
            # What there is to lose. The base as it is: its averaged weights are all that it has.
            self.set_mode(training=False)
            with run.accelerator.autocast(), torch.compiler.set_stance("force_eager"):
                run.log.write("base", **self.validation_figures())
        self.set_mode(training=True)

    def encode(self) -> None:
        """Captions become token ids, images latents: once for the whole run."""
        config, run, rows, replay = self.config, self.run, self.rows, self.config.replay_data
        captions, tokenizer = load_captions(config.captions), self.pipe.tokenizer
        train_rows, val_rows = rows.train + rows.old_train, rows.val + rows.old_val
        self.train_names, self.val_names = (list(map(modality_of, part)) for part in (train_rows, val_rows))
        self.ids = phrase(train_rows, captions, tokenizer, config.caption_variants, config.seed).to(run.device)
        tokens = [resolve_modality(name).token for name in self.train_names]
        self.token_only, self.nothing = (tokenize(tokenizer, texts).to(run.device) for texts in (tokens, [""]))
        vae = self.pipe.vae.requires_grad_(False).eval().to(run.device)
        self.latents = Latents.encode(run, vae, config, rows.train, "train", config.latent_variants)
        if replay:
            old = Latents.encode(run, vae, replay, rows.old_train, "replay", config.latent_variants)
            self.latents = self.latents.join(old)
        if val_rows:
            val_latents = Latents.encode(run, vae, config, rows.val, "val", 1)
            if replay and rows.old_val:
                val_latents = val_latents.join(Latents.encode(run, vae, replay, rows.old_val, "replay-val", 1))
            self.val_latents = val_latents.plain()
            self.val_ids = phrase(val_rows, captions, tokenizer, 1, config.seed)
        vae.to("cpu")

    def prepare(self) -> None:
        """Networks, optimizer and average, where the checkpoint has them."""
        config, run = self.config, self.run
        self.anchor: Denoise | None = None
        if config.anchor_weight:
            self.anchor = make_anchor(self.unet, self.text_encoder, config.train_text_encoder).to(run.device)
        groups = trainable(config, self.unet, self.text_encoder, self.trainee.new_tokens)
        self.weights = [p for group in groups for p in group["params"]]
        self.peaks = [group["peak"] for group in groups]
        self.ema = EMAModel(self.weights, decay=config.ema_decay, use_ema_warmup=True, foreach=True)
        self.ema.to(run.device)
        if config.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=run.device.type == "cuda")
        self.model, self.optimizer = run.accelerator.prepare(Denoise(self.unet, self.text_encoder), optimizer)
        if config.compile:
            self.unet.compile(dynamic=False)
            if self.anchor is not None:
                self.anchor.unet.compile(dynamic=False)
        run.begin(self.ema)

    def set_mode(self, training: bool) -> None:
        self.unet.train(training)
        self.text_encoder.train(training and self.config.train_text_encoder)

    def step(self) -> dict[str, torch.Tensor | float]:
        config, run = self.config, self.run
        run.schedule.set_learning_rates(self.optimizer, self.peaks, config.lr_warmup_steps)
        losses = [self.learn_part(part) for part in range(config.gradient_accumulation_steps)]
        self.ema.step(self.weights)
        return {"loss": torch.stack(losses).mean(), "lr": self.optimizer.param_groups[0]["lr"]}

    def learn_part(self, part: int) -> torch.Tensor:
        """The loss of one of the parts of a step that are accumulated."""
        config, accelerator = self.config, self.run.accelerator
        generator = self.run.generator(part, config.gradient_accumulation_steps)
        latents, text, timesteps = self.draw_batch(generator)
        noise = torch.randn(latents.shape, device=latents.device, generator=generator)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        with accelerator.accumulate(self.model):
            prediction = self.model(noisy, timesteps, text).float()
            error = squared_error(self.scheduler, prediction, latents, noise, timesteps)  # [B]
            if self.anchor is not None:
                new = config.train_batch_size - config.replayed
                with torch.no_grad(), accelerator.autocast():
                    before = self.anchor(noisy[new:], timesteps[new:], text[new:]).float()
                distance = (prediction[new:] - before).square().mean((1, 2, 3))
                error = torch.cat([error[:new], error[new:] + config.anchor_weight * distance])
            loss = (error * loss_weights(self.scheduler, timesteps, config.snr_gamma)).mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                if not config.train_text_encoder:
                    keep_old_tokens(self.text_encoder, self.trainee.new_tokens)
                accelerator.clip_grad_norm_(self.weights, config.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.detach()

    def draw_batch(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents [B, C, h, w], token ids [B, L] and timesteps [B]; the images of `--replay` are the last."""
        config, device, batch = self.config, self.run.device, self.config.train_batch_size
        new, old = len(self.rows.train), len(self.rows.old_train)

        def randint(high: int, count: int = batch) -> torch.Tensor:
            return torch.randint(high, (count,), device=device, generator=generator)

        index = randint(new, batch - config.replayed)
        if config.replayed:
            index = torch.cat([index, new + randint(old, config.replayed)])
        latents = self.latents.draw(index, randint(config.latent_variants), generator)
        text = self.ids[index, randint(config.caption_variants)]
        chance = torch.rand(batch, 1, device=device, generator=generator)
        text = torch.where(chance < config.drop_text + config.drop_all, self.token_only[index], text)
        text = torch.where(chance < config.drop_all, self.nothing, text)
        timesteps = randint(self.scheduler.config.num_train_timesteps)
        if config.noise_sampling == "log-normal":
            timesteps = log_normal_timesteps(
                self.scheduler, timesteps, config.noise_median, config.noise_std, generator
            )
        return latents, text, timesteps

    def validate(self) -> None:
        """Loss, grids and nearest training images of the averaged weights, by the main process."""
        run, best = self.run, self.run.output / "best"
        if run.is_main:
            self.ema.store(self.weights)
            self.ema.copy_to(self.weights)
            self.set_mode(training=False)
            figures = {}
            with run.accelerator.autocast(), torch.compiler.set_stance("force_eager"):
                if self.val_names:
                    figures = self.validation_figures()
                samples = self.draw_samples()
            if self.val_names:
                figures["memorised"] = memorised_share(
                    samples, self.val_latents, self.val_names, self.latents, self.train_names
                )
            run.log.write("val", **figures)
            if self.val_names:
                check_loss(figures["loss"], run.schedule.step)
            if not best.is_dir():  # a run that goes on in another folder
                run.best.score = float("-inf")
            # Where nothing is measured, the last weights are kept.
            if run.best.take(-figures["loss"] if figures else float("inf"), run.schedule.step):
                self.trainee.save_weights(best)
            self.ema.restore(self.weights)
            self.set_mode(training=True)
        run.accelerator.wait_for_everyone()

    def validation_figures(self) -> dict[str, float]:
        """The loss on val images: in all and per modality.

        Those of --replay are many and the new ones few, so `loss` is not the mean of all then, but that of `loss_old`
        and `loss_new` in the shares that they have in training.
        """
        config, old = self.config, len(self.rows.old_val)
        model = Denoise(self.unet, self.text_encoder)
        losses = validation_losses(
            model, self.scheduler, self.val_latents, self.val_ids, config.snr_gamma, config.seed
        )
        figures = {"loss": losses.mean().item()}
        if old:
            figures |= {"loss_old": losses[-old:].mean().item(), "loss_new": losses[:-old].mean().item()}
            share = config.replay_share
            figures["loss"] = share * figures["loss_old"] + (1 - share) * figures["loss_new"]
        for name in dict.fromkeys(self.val_names):
            own = torch.tensor([n == name for n in self.val_names])
            figures[f"loss_{name}"] = losses[own].mean().item()
        return {name: round(value, 5) for name, value in figures.items()}

    def draw_samples(self) -> dict[str, torch.Tensor]:
        """A grid a modality of the captions that are validated on, or else trained on; gives the latents of each."""
        config, rows = self.config, self.rows
        folder = self.run.output / f"samples-{self.run.schedule.step}"
        self.pipe.vae.to(self.run.device)
        drawn = draw_samples(
            self.pipe,
            rows.val + rows.old_val or rows.train + rows.old_train,
            config.resolution,
            config.validation_samples,
            folder,
        )
        self.pipe.vae.to("cpu")
        return drawn

    def finish(self) -> None:
        """Writes the whole pipeline with the best weights to `pipeline/`; a LoRA lies beside it in `best/`."""
        run = self.run
        if run.is_main:
            run.log.write("best", **({"loss": -run.best.score} if self.val_names else {}), at_step=run.best.step)
            self.trainee.save_pipeline(run.output / "best", run.output / "pipeline")
        run.finish()


def trainable(
    config: TextToImageConfig, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, new_tokens: list[int]
) -> list[dict]:
    """Freezes what is not trained, and gives the optimizer's groups of what is."""
    text_encoder.requires_grad_(config.train_text_encoder)
    if config.lora_rank:
        add_lora(unet, config.lora_rank)
    decay = config.adam_weight_decay
    weights = [p for p in unet.parameters() if p.requires_grad]
    groups = [{"params": weights, "peak": config.learning_rate, "weight_decay": decay}]
    if config.train_text_encoder:
        text = list(text_encoder.parameters())
        groups.append({"params": text, "peak": config.text_encoder_learning_rate, "weight_decay": decay})
    elif new_tokens:
        # Textual inversion's way (arXiv 2208.01618): only the new rows learn. Weight decay would move the old ones.
        table = text_encoder.get_input_embeddings().weight.requires_grad_(True)
        groups.append({"params": [table], "peak": config.text_encoder_learning_rate, "weight_decay": 0.0})
    return groups


def make_anchor(unet: UNet2DConditionModel, text_encoder: CLIPTextModel, train_text_encoder: bool) -> Denoise:
    """The base as it is before training, frozen. A text encoder that is not trained reads old captions for both."""
    anchor = Denoise(copy.deepcopy(unet), copy.deepcopy(text_encoder) if train_text_encoder else text_encoder)
    anchor.unet.requires_grad_(False).eval()
    if train_text_encoder:
        anchor.text_encoder.requires_grad_(False).eval()
    return anchor


def keep_old_tokens(text_encoder: CLIPTextModel, new_tokens: list[int]) -> None:
    """Leaves a gradient to the embeddings of added tokens only."""
    table = text_encoder.get_input_embeddings().weight
    if table.grad is not None:
        mask = torch.zeros(len(table), 1, device=table.device)
        mask[new_tokens] = 1
        table.grad *= mask


@torch.no_grad()
def draw_samples(
    pipe: MinimPipeline, rows: list[dict], resolution: int, count: int, folder: Path
) -> dict[str, torch.Tensor]:
    """Draws a grid per modality for captions spread over the rows; returns the latents [count, C, h, w] of each."""
    folder.mkdir(parents=True, exist_ok=True)
    pipe.set_progress_bar_config(disable=True)
    drawn = {}
    present = {modality_of(row) for row in rows}
    for name in filter(present.__contains__, pipe.config.modalities):
        own = [row for row in rows if modality_of(row) == name]
        chosen = [own[i * len(own) // count] for i in range(count)]
        latents = pipe(
            [row["Text"] for row in chosen],
            modality=name,
            seeds=list(range(count)),
            height=resolution,
            width=resolution,
            output_type="latent",
        ).images.float()
        drawn[name] = latents
        images = bytes_of(decode_latents(pipe, latents, [name] * count))
        contact_sheet(images, columns=count).save(folder / f"{name}.png")
    return drawn


def train(config: TextToImageConfig) -> None:
    """Trains the U-Net, and writes the whole pipeline to `pipeline/` in `--output_dir`; raises as `Run.open`."""
    with Run.open(
        config, "minim-text-to-image", gradient_accumulation_steps=config.gradient_accumulation_steps
    ) as run:
        if not run.finished:
            trainer = Trainer(config, run)
            run.train(trainer.step, trainer.validate)
            trainer.finish()
        if run.is_main:
            if config.lora_rank:
                lora = sorted((run.output / "best").glob("pytorch_lora_weights.safetensors"))
                push_parts(config, "train_text_to_image", *lora)
            else:
                push_pipeline(config, run.output / "pipeline")
