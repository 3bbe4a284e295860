"""Sets what a trained filter head decides by: `minim_pipeline/training/filter/calibration.py`.

    python train/calibrate_filter.py --filter_head runs/filter/filter_head --train_data data.csv \
        --ratings ratings.csv --output_dir runs/calibrated

Writes `filter_head`, `report.json`, `acceptance.png` (the acceptance curve of each modality) and `noise.png`.
"""

from minim_pipeline.training.config import parse
from minim_pipeline.training.filter.calibration import CalibrationConfig, calibrate


def main(argv: list[str] | None = None) -> dict:
    return calibrate(parse(CalibrationConfig, argv, __doc__))


if __name__ == "__main__":
    main()
