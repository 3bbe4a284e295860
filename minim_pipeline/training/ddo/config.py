"""Options of direct discriminative optimization."""

from dataclasses import dataclass, fields
from typing import Literal

from ..config import Count, Positive, Share, Weight, Whole, option
from ..unet.config import TextToImageConfig


# Options of train_text_to_image.py that are of other ways to train, and stay as they are.
UNUSED = (
    *("preset", "layers_per_block", "dropout", "vae", "text_encoder", "unet", "lora_rank", "prediction_type"),
    *("train_text_encoder", "replay", "anchor_weight"),
)


@dataclass(kw_only=True)
class DdoConfig(TextToImageConfig):
    """Options of direct discriminative optimization; what is not named here is as in train_text_to_image.py."""

    pretrained_model_name_or_path: str = option(help="The pipeline that is trained on.")
    train_batch_size: Count = option(256, "Real images a step and a process; as many of its own come beside them.")
    learning_rate: Weight = 3e-5
    lr_warmup_steps: Whole = 100
    adam_weight_decay: Weight = 0.0
    ema_decay: Share = 0.998
    noise_sampling: Literal["uniform", "log-normal"] = option("log-normal", "As in train_text_to_image.py.")
    snr_gamma: Weight = option(0.0, "Of the validation's loss alone; as in train_text_to_image.py.")
    own_images: Count = option(12_288, "Images that each process draws in each round.")
    rounds: Count = option(1, "Each begins with the model so far, and new images of its own.")
    beta: Positive = option(0.02, "Of the log ratio: weighs the difference of squared errors, summed over a latent.")
    alpha: Positive = option(4.0, "Weight of its own images beside real ones.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in fields(self):
            if field.name in UNUSED and getattr(self, field.name) != field.default:
                raise ValueError(
                    f"--{field.name} {getattr(self, field.name)} is of no use here: of a trained pipeline the U-Net"
                    " alone is trained on, as it is."
                )
