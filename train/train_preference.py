"""Trains the U-Net on a reward; how, and what keeps it honest: `minim_pipeline/training/preference/trainer.py`.

From the pipeline's filter head:

    accelerate launch train/train_preference.py --pretrained_model_name_or_path runs/model --prompts prompts.csv \
        --output_dir runs/preference --mixed_precision bf16 --max_train_minutes 4

or from people's ratings of its images, as `minim ratings` writes them; the head learns from them first:

    accelerate launch train/train_preference.py --pretrained_model_name_or_path runs/model --ratings ratings.csv \
        --output_dir runs/preference --mixed_precision bf16
"""

from minim_pipeline.training.config import parse
from minim_pipeline.training.preference.config import PreferenceConfig
from minim_pipeline.training.preference.trainer import train


def main(argv: list[str] | None = None) -> dict:
    return train(parse(PreferenceConfig, argv, __doc__))


if __name__ == "__main__":
    main()
