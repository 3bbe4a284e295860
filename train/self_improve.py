"""One round of self-improvement: `minim_pipeline/training/self_improvement/rounds.py`.

    python train/self_improve.py --pretrained_model_name_or_path runs/model --output_dir runs/round-1 --data data.csv

draws images into `runs/round-1/candidates`, and stops there for people to rate them:

    python space/app.py --images runs/round-1/candidates --store runs/round-1/ratings.sqlite
    minim ratings --store runs/round-1/ratings.sqlite --images runs/round-1/candidates --output given.csv

Run again with `--ratings given.csv`, it goes on to `runs/round-1/pipeline` and `report.json`. Where no rater is at
hand, `--stand_in` names the folder of a stand-in (research/stand_in.py), which is called so wherever its figures
appear.
"""

from minim_pipeline.training.config import parse
from minim_pipeline.training.self_improvement.config import SelfImproveConfig
from minim_pipeline.training.self_improvement.rounds import train


def main(argv: list[str] | None = None) -> dict:
    return train(parse(SelfImproveConfig, argv, __doc__))


if __name__ == "__main__":
    main()
