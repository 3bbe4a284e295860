"""What is measured while the U-Net learns: losses of val images, and whether what it draws is copied."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ... import MinimPipeline
from ...contact_sheet import contact_sheet
from ...evaluation.sampling import bytes_of, decode_latents
from ...finite import check_loss
from ..captions import load_captions, phrase
from ..denoising import Denoise, loss_weights, noise_scheduler, validation_errors
from ..latents import Latents, memorised_share
from ..pipeline import Trainee
from ..rows import Rows, modality_of
from ..run import Run
from .config import TextToImageConfig
from .trainer import Trainer


class Validation:
    """Measures a model in a run, and keeps its best weights in `best/`.

    The val rows are encoded once; the autoencoder has to be on the device for that.

    Args:
        learned: latents of the train rows, to find copies of.
        keep_last: the last weights are the best, whatever their loss.
    """

    def __init__(
        self,
        config: TextToImageConfig,
        run: Run,
        rows: Rows,
        trainee: Trainee,
        learned: Latents,
        keep_last: bool = False,
    ):
        self.keep_last = keep_last
        self.config, self.run, self.rows, self.trainee, self.learned = config, run, rows, trainee, learned
        self.pipe, self.val_rows = trainee.pipe, rows.val + rows.old_val
        self.names = [modality_of(row) for row in self.val_rows]
        if self.val_rows:
            latents = Latents.encode(run, self.pipe.vae, config, rows.val, "val", 1)
            if config.replay_data and rows.old_val:
                old = Latents.encode(run, self.pipe.vae, config.replay_data, rows.old_val, "replay-val", 1)
                latents = latents.join(old)
            self.latents = latents
            self.distances: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # as of `memorised_share`
            captions = load_captions(config.captions)
            self.ids = phrase(self.val_rows, captions, self.pipe.tokenizer, 1, config.seed)[:, 0]  # [N, L]

    @contextmanager
    def eager(self) -> Iterator[None]:
        """In the run's precision, and uncompiled, as each shape would be compiled anew."""
        with self.run.accelerator.autocast(), torch.compiler.set_stance("force_eager"):
            yield

    def log_base(self, trainer: Trainer) -> None:
        """What there is to lose. The base as it is: its averaged weights are all that it has."""
        trainer.set_mode(training=False)
        with self.eager():
            self.run.log.write("base", **self.losses())
        trainer.set_mode(training=True)

    def __call__(self, trainer: Trainer) -> None:
        """Looks at the averaged weights, by the main process."""
        if self.run.is_main:
            with trainer.averaged():
                self.look()
        self.run.accelerator.wait_for_everyone()

    def look(self) -> None:
        run, best = self.run, self.run.output / "best"
        with self.eager():
            figures = self.losses() if self.val_rows else {}
            samples = self.draw_samples()
        if self.val_rows:
            names = [modality_of(row) for row in self.rows.train + self.rows.old_train]
            held_out = self.latents, self.names
            figures["memorised"] = memorised_share(samples, *held_out, self.learned, names, self.distances)
        run.log.write("val", **figures)
        if self.val_rows:
            check_loss(figures["loss"], run.schedule.step)
        if not best.is_dir():  # a run that goes on in another folder
            run.best.score = float("-inf")
        # Where nothing is measured, the last weights are kept.
        score = -figures["loss"] if figures and not self.keep_last else float("inf")
        if run.best.take(score, run.schedule.step):
            self.trainee.save_weights(best)

    def losses(self) -> dict[str, float]:
        """The loss on val images, in all and per modality, and the error that it weighs by tenths of the timesteps.

        Those of --replay are many and the new ones few, so `loss` is not the mean of all then, but that of `loss_old`
        and `loss_new` in the shares that they have in training.
        """
        config, old = self.config, len(self.rows.old_val)
        scheduler = noise_scheduler(self.pipe.scheduler.config, "cpu")
        model = Denoise(self.pipe.unet, self.pipe.text_encoder)
        errors, timesteps = validation_errors(model, scheduler, self.latents, self.ids, config.seed)
        losses = errors * loss_weights(scheduler, timesteps, config.snr_gamma)
        figures = {"loss": losses.mean().item()}
        if old:
            figures |= {"loss_old": losses[-old:].mean().item(), "loss_new": losses[:-old].mean().item()}
            share = config.replay_share
            figures["loss"] = share * figures["loss_old"] + (1 - share) * figures["loss_new"]
        for name in dict.fromkeys(self.names):
            figures[f"loss_{name}"] = losses[torch.tensor([n == name for n in self.names])].mean().item()
        tenth = scheduler.config.num_train_timesteps // 10
        for start in range(0, 10 * tenth, tenth):
            if (own := timesteps // tenth * tenth == start).any():  # few val images may leave a tenth out
                figures[f"error_t{start}"] = errors[own].mean().item()
        return {name: round(value, 5) for name, value in figures.items()}

    def draw_samples(self) -> dict[str, torch.Tensor]:
        """A grid a modality of the captions that are validated on, or else trained on; gives the latents of each."""
        config, vae = self.config, self.pipe.vae.to(self.run.device)
        rows = self.val_rows or self.rows.train + self.rows.old_train
        folder = self.run.output / f"samples-{self.run.schedule.step}"
        drawn = draw_samples(self.pipe, rows, config.resolution, config.validation_samples, folder)
        vae.to("cpu")
        return drawn


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
