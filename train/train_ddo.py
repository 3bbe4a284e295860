"""Trains a pipeline's U-Net on against its own images: `minim_pipeline/training/ddo/trainer.py`.

    accelerate launch train/train_ddo.py --pretrained_model_name_or_path runs/unet/pipeline --train_data data.csv \
        --output_dir runs/ddo --mixed_precision bf16 --compile --balance 0.5 --max_train_minutes 4

`--balance`, `--latent_variants` and `--caption_variants` are best as the U-Net was trained with. A YAML file of
options may stand in front of the others; the same command goes on where it was stopped.
"""

from minim_pipeline.training.config import parse
from minim_pipeline.training.ddo.config import DdoConfig
from minim_pipeline.training.ddo.trainer import train


def main(argv: list[str] | None = None) -> None:
    train(parse(DdoConfig, argv, __doc__))


if __name__ == "__main__":
    main()
