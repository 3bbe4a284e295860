"""Measures synthetic images against real ones: faithful, diverse, what was asked for, useful, and new?

Thin, over minim_pipeline.evaluation; `minim evaluate` is the same.

    python train/evaluate.py --real real.csv --synthetic synthetic.csv --train train.csv --output-dir report
"""

import argparse

from minim_pipeline.evaluation.command import add_arguments, run


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(parse_args())
