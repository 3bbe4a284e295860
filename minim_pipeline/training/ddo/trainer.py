"""Trains a U-Net on against itself: direct discriminative optimization (DDO, arXiv 2503.01103).

A diffusion model that is trained by likelihood covers the data and is blurred where it has no room for all of it: a
network tells its images from real ones. A GAN would learn from such a network; DDO needs none. How much more likely a
model makes an image than the frozen model it began as, the `reference`, is itself such a network: it is trained to be
high for real images and low for those that the reference draws,

    d(x) = beta * (|error of the reference|^2 - |error of the model|^2),  summed over the latent, at one noise level
    loss = softplus(-d(real)) + alpha * softplus(d(own))

and where it tells them apart perfectly, the model's own distribution is that of the data. Images of its own are drawn
without guidance, for captions and findings as they are trained on. A further round begins with the model so far as its
reference. There is no dropout, whose noise would be larger than the differences. The last averaged weights are kept,
whatever the validation loss, which is what likelihood asks for.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel

from ...evaluation.sampling import batches as parts_of
from ..denoising import Denoise, squared_error
from ..hub import push_pipeline
from ..pipeline import Trainee, build_pipeline
from ..randomness import step_generator
from ..rows import Rows, modality_of
from ..run import Run
from ..unet.batches import Batches
from ..unet.trainer import Trainer
from ..unet.validation import Validation
from .config import DdoConfig


DRAWN_TOGETHER = 512  # images of its own


class Reference:
    """The frozen model that a round began with, and images that it draws.

    Attributes:
        round: from 0; with the weights it is what a checkpoint holds.
        latents: of its images [N, C, h, w]; drawn when they are first needed.
        rows, variants: whose captions they were drawn for, and which of them [N].
    """

    def __init__(self, config: DdoConfig, run: Run, trainee: Trainee, batches: Batches, modalities: list[str]):
        self.config, self.run, self.pipe = config, run, trainee.pipe
        self.batches, self.modalities = batches, modalities
        self.unet: UNet2DConditionModel = copy.deepcopy(trainee.pipe.unet).requires_grad_(False).eval().to(run.device)
        self.denoise = Denoise(self.unet, trainee.pipe.text_encoder)
        self.round, self.latents = 0, torch.empty(0)

    def state_dict(self) -> dict:
        return {"round": self.round, "unet": self.unet.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.round = state["round"]
        self.unet.load_state_dict(state["unet"])

    def follow(self, unet: UNet2DConditionModel, number: int) -> None:
        """Becomes the model so far, for the round of that number."""
        self.unet.load_state_dict(unet.state_dict())
        self.round, self.latents = number, torch.empty(0)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """The pipeline draws with the reference, uncompiled, as the last batch has another shape."""
        learning, self.pipe.unet = self.pipe.unet, self.unet
        self.pipe.vae.to(self.run.device)  # the pipeline draws where it is
        with self.run.accelerator.autocast(), torch.compiler.set_stance("force_eager"):
            yield
        self.pipe.vae.to("cpu")
        self.pipe.unet = learning

    @torch.no_grad()
    def draw(self) -> None:
        """Draws images for captions that are as often in the data as in training; the same in every round's start."""
        config, device = self.config, self.run.device
        # Steps of the run have the numbers from 0 on; rounds those from the last one down.
        generator = step_generator(config.seed, 2**31 - 1 - self.round, self.run.rank, device)
        count, shares = config.own_images, self.batches.shares
        self.rows = torch.multinomial(shares, count, replacement=True, generator=generator)
        self.variants = torch.randint(config.caption_variants, (count,), device=device, generator=generator)
        whole = torch.ones(count, device=device)  # no text is dropped
        drawn = []
        self.pipe.set_progress_bar_config(disable=True)
        with self.drawing():
            for part in parts_of(count, DRAWN_TOGETHER, "its own images" if self.run.is_main else None):
                text = self.batches.texts.draw(self.rows[part], self.variants[part], whole[part], 0.0, 0.0)
                if not text.is_floating_point():
                    text = self.pipe.text_encoder(text).last_hidden_state
                modality = [self.modalities[i] for i in self.rows[part].tolist()]
                call = {"guidance_scale": 1.0, "output_type": "latent", "generator": generator}
                drawn.append(self.pipe(prompt_embeds=text.float(), modality=modality, **call).images.half())
        self.latents = torch.cat(drawn)

    def take(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """`count` of its images, by chance, and their texts, of which some are dropped as those of real images."""
        config = self.config
        index = torch.randint(len(self.latents), (count,), device=generator.device, generator=generator)
        chance = torch.rand(count, device=generator.device, generator=generator)
        rows, variants = self.rows[index], self.variants[index]
        text = self.batches.texts.draw(rows, variants, chance, config.drop_text, config.drop_all)
        return self.latents[index].float(), text


class DdoTrainer(Trainer):
    """As `Trainer`, against a `Reference`."""

    config: DdoConfig

    def __init__(self, config: DdoConfig, run: Run, trainee: Trainee, batches: Batches, reference: Reference):
        self.reference = reference
        super().__init__(config, run, trainee, batches)
        if config.compile:
            reference.unet.compile(dynamic=False)

    @property
    def stateful(self) -> list[object]:
        return [self.ema, self.reference]

    def set_mode(self, training: bool) -> None:
        self.unet.eval()
        self.text_encoder.eval()

    def step(self) -> dict[str, torch.Tensor | float]:
        """One step; the first of a round makes the averaged weights the model's and the reference's."""
        config, reference = self.config, self.reference
        number = min(int(self.run.schedule.progress * config.rounds), config.rounds - 1)
        if reference.round != number:
            self.ema.copy_to(self.weights)
            reference.follow(self.unet, number)
        if not len(reference.latents):
            reference.draw()
        return super().step() | {"told_apart": self.told_apart, "round": reference.round}

    def objective(self, generator: torch.Generator, latents: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        config, scheduler = self.config, self.scheduler
        own, own_text = self.reference.take(len(latents), generator)
        latents, text = torch.cat([latents, own]), torch.cat([text, own_text])
        timesteps = self.draw_timesteps(generator).repeat(2)
        noise = torch.randn(latents.shape, device=latents.device, generator=generator)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        prediction = self.model(noisy, timesteps, text).float()
        with torch.no_grad(), self.run.accelerator.autocast():
            before = self.reference.denoise(noisy, timesteps, text).float()
        errors = (squared_error(scheduler, x, latents, noise, timesteps) for x in (before, prediction))
        scale = config.beta * latents[0].numel()  # errors are means over a latent
        of_real, of_own = (scale * (next(errors) - next(errors))).chunk(2)  # [B] each
        self.told_apart = (of_real > of_own).float().mean().detach()
        return F.softplus(-of_real).mean() + config.alpha * F.softplus(of_own).mean()


def train(config: DdoConfig) -> None:
    """Trains the U-Net on, and writes the whole pipeline to `pipeline/` in `--output_dir`.

    The filter head, if there is one, stays as it was, and has to be calibrated anew.

    Raises:
        ValueError: the data has modalities that the pipeline does not know; and as `Run.open`.
    """
    with Run.open(config, "minim-ddo", gradient_accumulation_steps=config.gradient_accumulation_steps) as run:
        if not run.finished:
            learn(config, run)
        if run.is_main:
            push_pipeline(config, run.output / "pipeline")


def learn(config: DdoConfig, run: Run) -> None:
    rows = Rows.read(config, None, config.pretrained_model_name_or_path)
    trainee = build_pipeline(config, config.resolution, list(rows.learned), rows.learned)
    if trainee.new_tokens:
        tokens = trainee.pipe.tokenizer.convert_ids_to_tokens(trainee.new_tokens)
        unknown = [name for name in rows.learned if f"<{name}>" in tokens]
        known = [name for name in trainee.pipe.config.modalities if name not in unknown]
        model, able = config.pretrained_model_name_or_path, ", ".join(known) or "nothing"
        raise ValueError(
            f"{config.train_data} has images of {', '.join(unknown)}, which {model} cannot draw, but {able};"
            " add_modality.py teaches it others."
        )
    pipe = trainee.pipe
    pipe.vae.requires_grad_(False).eval().to(run.device)
    batches = Batches.encode(config, run, rows, trainee)
    validation = Validation(config, run, rows, trainee, batches.latents, keep_last=True)
    pipe.vae.to("cpu")
    pipe.text_encoder.to(run.device)
    reference = Reference(config, run, trainee, batches, [modality_of(row) for row in rows.train])
    trainer = DdoTrainer(config, run, trainee, batches, reference)
    if rows.val and run.schedule.step == 0 and run.is_main:
        validation.log_base(trainer)
    run.train(trainer.step, partial(validation, trainer))
    if run.is_main:
        trainee.save_pipeline(run.output / "best", run.output / "pipeline")
    run.finish()
