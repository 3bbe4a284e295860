"""Trains the autoencoder; what is asked of it: `minim_pipeline/training/autoencoder.py`.

    accelerate launch train/train_autoencoder.py --train_data data.csv --output_dir runs/autoencoder \
        --mixed_precision bf16 --compile

A second run, `--pretrained_model_name_or_path ... --freeze_encoder --crop 256`, ends the decoder's training on whole
images.
"""

from minim_pipeline.training.autoencoder import AutoencoderConfig, train
from minim_pipeline.training.config import parse


def main(argv: list[str] | None = None) -> None:
    train(parse(AutoencoderConfig, argv, __doc__))


if __name__ == "__main__":
    main()
