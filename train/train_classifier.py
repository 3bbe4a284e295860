"""Trains the judges, two classifiers of modality and finding; how: `minim_pipeline/training/classifier.py`.

    python train/train_classifier.py --train_data data.csv --output_dir runs/judges

The CSV has path,Text,modality,finding[,split,part]. Architectures may be trained one by one into the same folder.
"""

from minim_pipeline.training.classifier import ClassifierConfig, train
from minim_pipeline.training.config import parse


def main(argv: list[str] | None = None) -> dict:
    return train(parse(ClassifierConfig, argv, __doc__))


if __name__ == "__main__":
    main()
