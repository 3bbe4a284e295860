"""Trains the filter head; what it learns from: `minim_pipeline/training/filter/train.py`.

The teacher, which says what generated images show, comes from the same part A of the data:

    python train/train_classifier.py --train_data data.csv --part A --output_dir runs/teacher
    python train/train_filter.py --train_data data.csv --ratings ratings.csv --teacher runs/teacher \
        --output_dir runs/filter --mixed_precision bf16
"""

from minim_pipeline.training.config import parse
from minim_pipeline.training.filter.train import FilterConfig, train


def main(argv: list[str] | None = None) -> dict:
    return train(parse(FilterConfig, argv, __doc__))


if __name__ == "__main__":
    main()
