"""Teaches a trained pipeline one more modality; how, in stages: `minim_pipeline/training/add_modality.py`.

A modality of the package's table needs no more than its name:

    python train/add_modality.py --modality breast_mri \
        --train_data new_domain.csv --replay data.csv --output_dir runs/breast_mri --mixed_precision bf16 --compile

Any other has to be defined, and the pipeline takes the definition along:

    python train/add_modality.py --pretrained_model_name_or_path runs/breast_mri/pipeline \
        --modality dermoscopy --color --flip --aliases dermatoscopy "skin lesion" \
        --words "color photograph of a skin lesion" \
        --train_data skin.csv --replay data.csv --output_dir runs/dermoscopy
"""

from minim_pipeline.training.add_modality import AddModalityConfig, train
from minim_pipeline.training.config import parse


def main(argv: list[str] | None = None) -> dict:
    return train(parse(AddModalityConfig, argv, __doc__))


if __name__ == "__main__":
    main()
