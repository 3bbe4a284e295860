"""Measures synthetic images against real ones: faithful, diverse, what was asked for, useful, and new?

`minim evaluate`, as a script.

    python train/evaluate.py --real real.csv --synthetic synthetic.csv --train train.csv --output-dir report
"""

import sys

from minim_pipeline.cli import main


if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
