#!/usr/bin/env bash
# A modality that the model has not learned: first one of the table, then one that is defined on the way.
set -euo pipefail

BREAST=${BREAST:-new_domain.csv}  # path,Text,modality,finding,split,part
SKIN=${SKIN:-skin.csv}
OLD=${OLD:-all.csv}               # rows of what the model has learned already, so that it does not forget them
OLD_AND_BREAST=${OLD_AND_BREAST:-old.csv}
RATINGS=${RATINGS:-ratings.csv}   # people's grades of quality
OUT=${OUT:-runs/out}

python train/add_modality.py --modality breast_mri --train_data "$BREAST" --replay "$OLD" --ratings "$RATINGS" \
    --output_dir "$OUT/breast_mri" --mixed_precision bf16 --compile
python train/add_modality.py --pretrained_model_name_or_path "$OUT/breast_mri/pipeline" --modality dermoscopy \
    --color --flip --aliases dermatoscopy "skin lesion" --words "color photograph of a skin lesion" \
    --train_data "$SKIN" --replay "$OLD_AND_BREAST" --output_dir "$OUT/dermoscopy" --mixed_precision bf16 --compile
