"""Options of the filter head's training."""

from dataclasses import dataclass

from ... import EMBEDDED_CHECKPOINT
from ..config import Count, DataOptions, RunOptions, Share, Weight, Whole, option


@dataclass(kw_only=True)
class FilterConfig(DataOptions, RunOptions):
    """Options of the filter head's training; `mixed_precision` is that of the frozen networks."""

    train_batch_size: Count = option(256, "Images a step of each kind: from the pool, and from trajectories.")
    learning_rate: Weight = 1e-3
    adam_weight_decay: Weight = 0.3
    max_train_steps: Count = 5000

    pretrained_model_name_or_path: str = option(str(EMBEDDED_CHECKPOINT), "The pipeline.")
    teacher: str = option(help="Classifiers of part A: say what generated images show.")
    pretrained_filter_head: str | None = option(None, "Start from this head; its config stays.")
    block_out_channels: list[Count] = option([80, 144], "Two, of a head from scratch.")

    part: str = option("A", "Rows of the train split with this `part`; 'all' takes every row.")
    ratings: str | None = option(None, "CSV of quality, 1 to 3: path,Text,modality,rating[,rater,part,group].")
    captions: str | None = option(None, "JSON with phrasings of every finding; default: the package's own.")
    caption_variants: Count = option(16, "Phrasings of every caption.")
    latent_variants: Count = option(8, "Augmented versions of every image.")
    drawn_images: Count = option(16_000, "Images drawn to learn from.")
    trajectory_steps: Count = option(6, "Steps kept of each.")
    draw_batch_size: Count = 256
    min_train: Count = option(20, "Findings with fewer train images are left out.")

    clean_share: Share = option(0.5, "Share of finished images among the pool's.")
    class_weight: Weight = option(0.5, "Of telling all findings apart by their texts.")
    code_weight: Weight = option(0.2, "Of telling images apart by their codes.")
    realism_loss_weight: Weight | None = option(
        None, "Of telling real from generated images: a new head rates realism if it is given, such as 0.5."
    )
    realism_part: str | None = option(
        None, "Rows whose real images are told from generated ones, beside those of --part; default: C."
    )
    rating_steps: Whole = option(300, "Further steps with people's grades, if any.")
    rating_learning_rate: Weight = 2e-4
    folds: Whole = option(5, "Folds of the ratings, by group; 0 leaves that out.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("compile", "gradient_checkpointing"):
            if getattr(self, name):
                raise ValueError(f"--{name} does nothing here: leave it out.")
        if self.realism_part is not None and not (self.realism_loss_weight or self.pretrained_filter_head):
            given = f"--realism_part {self.realism_part} does nothing without --realism_loss_weight"
            raise ValueError(f"{given}, unless --pretrained_filter_head names a head that rates realism.")
        if self.folds == 1:
            raise ValueError(f"--folds has to be 0 or at least 2, got {self.folds}.")
        if len(self.block_out_channels) != 2:
            raise ValueError(f"--block_out_channels has to be two numbers, got {self.block_out_channels}.")
