"""A step of the U-Net's training. Within one, nothing waits for the device, nor the device for what lies on disk."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from transformers import CLIPTextModel

from ..denoising import Denoise, log_normal_timesteps, loss_weights, noise_scheduler, squared_error
from ..pipeline import Trainee, add_lora
from ..run import Run
from .batches import Batches
from .config import TextToImageConfig


class Trainer:
    """The U-Net, and the text encoder if it learns, with optimizer and averaged weights, in a run.

    Where the run has a checkpoint, they are as it left them.
    """

    def __init__(self, config: TextToImageConfig, run: Run, trainee: Trainee, batches: Batches):
        self.config, self.run, self.batches = config, run, batches
        self.unet, self.text_encoder = trainee.pipe.unet, trainee.pipe.text_encoder
        self.scheduler = noise_scheduler(trainee.pipe.scheduler.config, run.device)
        torch.backends.cudnn.benchmark = True  # all steps have the same shapes
        self.anchor: Denoise | None = None
        if config.anchor_weight:
            self.anchor = make_anchor(self.unet, self.text_encoder, config.train_text_encoder).to(run.device)
        groups = trainable(config, self.unet, self.text_encoder, trainee.new_tokens, run.device)
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
        self.beside = torch.cuda.Stream() if run.device.type == "cuda" else None  # the next batch is read in it
        self.ahead: tuple[torch.Generator, torch.Tensor, torch.Tensor] | None = None
        run.begin(*self.stateful)
        self.set_mode(training=True)

    @property
    def stateful(self) -> list[object]:
        """What a checkpoint holds beside the networks and the optimizer."""
        return [self.ema]

    def set_mode(self, training: bool) -> None:
        self.unet.train(training)
        self.text_encoder.train(training and self.config.train_text_encoder)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The networks as they are to be used: with the averaged weights, without dropout."""
        self.ema.store(self.weights)
        self.ema.copy_to(self.weights)
        self.set_mode(training=False)
        yield
        self.ema.restore(self.weights)
        self.set_mode(training=True)

    def step(self) -> dict[str, torch.Tensor | float]:
        config, run = self.config, self.run
        run.schedule.set_learning_rates(self.optimizer, self.peaks, config.lr_warmup_steps)
        losses = [self.learn_part(part) for part in range(config.gradient_accumulation_steps)]
        self.ema.step(self.weights)
        return {"loss": torch.stack(losses).mean(), "lr": self.optimizer.param_groups[0]["lr"]}

    def learn_part(self, part: int) -> torch.Tensor:
        """The loss of one of the parts of a step that are accumulated."""
        accelerator = self.run.accelerator
        generator, latents, text = self.next_batch(part)  # [B, C, h, w] and [B, L] or [B, L, D]
        with accelerator.accumulate(self.model):
            loss = self.objective(generator, latents, text)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(self.weights, self.config.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self.beside is not None and self.batches.latents.on_disk:
            with torch.cuda.stream(self.beside):
                self.ahead = self.draw(part + 1)  # after the last part, the first of the next step
        return loss.detach()

    def objective(self, generator: torch.Generator, latents: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """The loss of a batch: latents [B, C, h, w], and token ids [B, L] or their states [B, L, D]."""
        config = self.config
        timesteps = self.draw_timesteps(generator)  # [B]
        noise = torch.randn(latents.shape, device=latents.device, generator=generator)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        prediction = self.model(noisy, timesteps, text).float()
        error = squared_error(self.scheduler, prediction, latents, noise, timesteps)  # [B]
        if self.anchor is not None:
            new = config.train_batch_size - config.replayed
            with torch.no_grad(), self.run.accelerator.autocast():
                before = self.anchor(noisy[new:], timesteps[new:], text[new:]).float()
            distance = (prediction[new:] - before).square().mean((1, 2, 3))
            error = torch.cat([error[:new], error[new:] + config.anchor_weight * distance])
        return (error * loss_weights(self.scheduler, timesteps, config.snr_gamma)).mean()

    def draw(self, part: int) -> tuple[torch.Generator, torch.Tensor, torch.Tensor]:
        """The batch of a part of this step, and the source of what else is random in it."""
        generator = self.run.generator(part, self.config.gradient_accumulation_steps)
        return generator, *self.batches.draw(generator)

    def next_batch(self, part: int) -> tuple[torch.Generator, torch.Tensor, torch.Tensor]:
        """As `draw`; a batch from disk has been read while the device was busy with the one before."""
        if self.ahead is None or self.beside is None:
            return self.draw(part)
        batch, self.ahead, stream = self.ahead, None, torch.cuda.current_stream()
        stream.wait_stream(self.beside)
        for tensor in batch[1:]:
            tensor.record_stream(stream)
        return batch

    def draw_timesteps(self, generator: torch.Generator) -> torch.Tensor:
        config, steps = self.config, self.scheduler.config.num_train_timesteps
        timesteps = torch.randint(steps, (config.train_batch_size,), device=generator.device, generator=generator)
        if config.noise_sampling == "uniform":
            return timesteps
        return log_normal_timesteps(self.scheduler, timesteps, config.noise_median, config.noise_std, generator)


def trainable(
    config: TextToImageConfig,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    new_tokens: list[int],
    device: torch.device,
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
        learns = torch.zeros(len(table), 1)
        learns[new_tokens] = 1
        learns = learns.to(device)
        table.register_hook(lambda grad: grad * learns)
        groups.append({"params": [table], "peak": config.text_encoder_learning_rate, "weight_decay": 0.0})
    return groups


def make_anchor(unet: UNet2DConditionModel, text_encoder: CLIPTextModel, train_text_encoder: bool) -> Denoise:
    """The base as it is before training, frozen. A text encoder that is not trained reads old captions for both."""
    anchor = Denoise(copy.deepcopy(unet), copy.deepcopy(text_encoder) if train_text_encoder else text_encoder)
    anchor.unet.requires_grad_(False).eval()
    if train_text_encoder:
        anchor.text_encoder.requires_grad_(False).eval()
    return anchor
