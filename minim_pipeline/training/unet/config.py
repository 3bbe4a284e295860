"""Options of the U-Net's training."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from ..config import OF_THE_TABLE, Count, DataOptions, Positive, RunOptions, Share, Weight, option
from ..pipeline import ModelOptions


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
    balance: Share = option(
        0.0, "How far findings are drawn alike: each in proportion to its images to the power of 1 - balance."
    )
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
        """The same options for `--replay`, but for those that are of --train_data's table; None without it."""
        if not self.replay:
            return None
        usual: dict[str, Any] = dict.fromkeys(OF_THE_TABLE)
        return dataclasses.replace(self, train_data=self.replay, **usual)
