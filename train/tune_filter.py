"""Goes on training a filter head with ratings of generated images: `minim_pipeline/training/filter/tune.py`.

python train/tune_filter.py --pretrained_model_name_or_path runs/model --ratings ratings.csv --output_dir runs/head
"""

from minim_pipeline.training.config import parse
from minim_pipeline.training.filter.tune import TuneConfig, train


def main(argv: list[str] | None = None) -> dict:
    return train(parse(TuneConfig, argv, __doc__))


if __name__ == "__main__":
    main()
