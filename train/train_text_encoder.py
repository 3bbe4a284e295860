"""Distils a sentence encoder into a small CLIP text encoder; how: `minim_pipeline/training/text/encoder.py`.

python train/train_text_encoder.py --train_data data.csv --output_dir runs/text_encoder
"""

from minim_pipeline.training.config import parse
from minim_pipeline.training.text.encoder import TextEncoderConfig, train


def main(argv: list[str] | None = None) -> list[float]:
    return train(parse(TextEncoderConfig, argv, __doc__))


if __name__ == "__main__":
    main()
