"""Trains the image-text encoder of reports and copy checks; how: `minim_pipeline/training/image_text_encoder.py`.

    python train/train_encoder.py --train_data data.csv --output_dir runs/encoder --mixed_precision bf16

The CSV has path,Text,modality,finding[,split,part].
"""

from minim_pipeline.training.config import parse
from minim_pipeline.training.image_text_encoder import ImageTextEncoderConfig, train


def main(argv: list[str] | None = None) -> dict:
    return train(parse(ImageTextEncoderConfig, argv, __doc__))


if __name__ == "__main__":
    main()
