"""Trains a stand-in for a clinician, where none is at hand; its rule: `minim_pipeline/evaluation/stand_in.py`.

    python research/stand_in.py --train_data data.csv --output_dir runs/stand_in

The CSV has path,Text,modality,finding,part[,split,group].
"""

from minim_pipeline.training.config import parse
from minim_pipeline.training.stand_in import StandInConfig, train


def main(argv: list[str] | None = None) -> dict:
    return train(parse(StandInConfig, argv, __doc__))


if __name__ == "__main__":
    main()
