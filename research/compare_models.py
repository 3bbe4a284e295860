"""A model before and after: the same prompts and seeds from both; what is reported: evaluation/comparison.py.

python research/compare_models.py --before runs/old --after runs/new --data data.csv --output_dir runs/comparison
"""

from pathlib import Path

from minim_pipeline.evaluation.comparison import ComparisonConfig, compare, summary
from minim_pipeline.training.config import parse


def main(argv: list[str] | None = None) -> dict:
    config = parse(ComparisonConfig, argv, __doc__)
    report = compare(config, config.before, config.after, Path(config.output_dir))
    print(summary(report))
    return report


if __name__ == "__main__":
    main()
