"""Options of preference training."""

from dataclasses import dataclass

from ... import EMBEDDED_CHECKPOINT, EMBEDDED_ENCODER
from ..config import Count, DataOptions, ReadingOptions, RunOptions, Share, Weight, Whole, option
from ..filter.tune import TuningOptions


@dataclass(kw_only=True)
class PreferenceConfig(TuningOptions, ReadingOptions, RunOptions):
    """Options of preference training: a step draws images, rates them, and learns from them."""

    train_batch_size: Count = option(256, "Images that are learned from together, on each process.")
    learning_rate: Weight = 4e-5
    lr_warmup_steps: Whole = 5
    adam_weight_decay: Weight = 0.0
    max_train_steps: Count = 12
    validation_steps: Count = 4
    checkpointing_steps: Count = option(4, "Also after the last step, and at SIGTERM.")
    pretrained_model_name_or_path: str = option(str(EMBEDDED_CHECKPOINT), "With a filter head.")
    filter_head: str | None = option(None, "Folder of another filter head than the pipeline's.")
    lora_rank: Whole = option(0, "Train a LoRA of this rank instead of the U-Net.")
    prompts: str | None = option(None, "CSV with Text,modality[,finding]: what the head rates. Or else --ratings.")
    ratings: str | None = option(None, "CSV with path,Text,modality,rating[,rater]: the head learns from it first.")
    enough: Weight = option(1.5, "Log odds of the finding from which on none counts.")
    reward_until: Weight = option(0.4, "Share of noise levels, the lowest, to learn at.")
    diversity_weight: Weight = option(8.0, "Of a prompt's images staying unlike.")
    anchor_weight: Weight = option(50.0, "Of staying near the network begun with.")
    drop_text: Share = option(0.15, "Share of prompts left out, for the anchor only.")
    guidance_scale: Weight | None = option(None, "Of the new pipeline, which needs less; default: as it was.")
    prompts_per_step: Count = option(64, "Prompts a step and a process.")
    images_per_prompt: Count = option(8, "Images of each.")
    timesteps_per_image: Count = option(12, "How often a step learns from each image.")
    num_inference_steps: Count | None = option(None, "Of the images to learn from; default: the pipeline's.")
    sampling_batch_size: Count = 512
    replay: str | None = option(None, "CSV with path,Text,modality[,split]: its train images are learned from, too.")
    replay_weight: Weight = option(1.0, "Of the usual loss on them.")
    snr_gamma: Weight = option(5.0, "As in train_text_to_image.py.")
    latent_variants: Count = option(4, "Augmented versions of every image.")
    caption_variants: Count = option(16, "Phrasings of every caption.")
    captions: str | None = option(None, "JSON with phrasings of every finding; default: the package's own.")
    no_mirror: bool = option(False, "Mirror no image; see train_text_to_image.py.")
    encoder: str = option(str(EMBEDDED_ENCODER), "Image-text encoder that scores unseen, and says when to stop.")
    watch_images: Count = option(16, "Images of each finding that it looks at.")
    patience: Count = option(3, "Looks without a better score before it stops.")
    least_spread: Share = option(0.9, "Of the spread that the images had at first.")

    def __post_init__(self) -> None:
        super().__post_init__()
        group = self.images_per_prompt
        if bool(self.prompts) == bool(self.ratings):
            raise ValueError(
                "Give either --prompts, to be rated by the filter head, or --ratings, which it learns from."
            )
        if group < 2:
            raise ValueError(f"--images_per_prompt has to be at least 2, got {group}: a group is compared.")
        if self.train_batch_size % group:
            why = f"of --images_per_prompt ({group}), whose images are compared"
            raise ValueError(f"--train_batch_size has to be a multiple {why}; got {self.train_batch_size}.")
        if not 0 < self.reward_until <= 1:
            raise ValueError(f"--reward_until has to be above 0 and at most 1, got {self.reward_until}.")

    def replay_data(self, resolution: int) -> DataOptions:
        """How the images of `--replay` are read, of which none are validated on."""
        shared = self.values("fit", "window", "no_mirror")
        return DataOptions(train_data=str(self.replay), val_split="none", resolution=resolution, **shared)
