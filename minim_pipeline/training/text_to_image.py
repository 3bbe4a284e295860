"""Trains the U-Net: latents of medical images from a modality and a sentence.

A latent diffusion model (arXiv 2112.10752) on latents that are encoded once, as captions are if the text encoder does
not learn. What is not the textbook's:

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

from functools import partial

from .hub import push_parts, push_pipeline
from .pipeline import build_pipeline
from .rows import Rows
from .run import Run
from .unet.batches import Batches
from .unet.config import TextToImageConfig
from .unet.trainer import Trainer
from .unet.validation import Validation


def train(config: TextToImageConfig) -> None:
    """Trains the U-Net, and writes the whole pipeline to `pipeline/` in `--output_dir`; raises as `Run.open`."""
    with Run.open(
        config, "minim-text-to-image", gradient_accumulation_steps=config.gradient_accumulation_steps
    ) as run:
        if not run.finished:
            learn(config, run)
        if run.is_main:
            if config.lora_rank:
                lora = sorted((run.output / "best").glob("pytorch_lora_weights.safetensors"))
                push_parts(config, "train_text_to_image", *lora)
            else:
                push_pipeline(config, run.output / "pipeline")


def learn(config: TextToImageConfig, run: Run) -> None:
    """The run from the rows to the pipeline with the best weights; a LoRA lies beside it in `best/`."""
    rows = Rows.read(config, config.replay_data, config.pretrained_model_name_or_path)
    trainee = build_pipeline(config, config.resolution, list(rows.learned), rows.learned)
    if trainee.message:
        run.accelerator.print(trainee.message)
    vae = trainee.pipe.vae.requires_grad_(False).eval().to(run.device)
    batches = Batches.encode(config, run, rows, trainee)
    validation = Validation(config, run, rows, trainee, batches.latents)
    vae.to("cpu")
    trainer = Trainer(config, run, trainee, batches)
    if config.replay and rows.val and run.schedule.step == 0 and run.is_main:
        validation.log_base(trainer)
    run.train(trainer.step, partial(validation, trainer))
    if run.is_main:
        run.log.write("best", **({"loss": -run.best.score} if rows.val else {}), at_step=run.best.step)
        trainee.save_pipeline(run.output / "best", run.output / "pipeline")
    run.finish()
