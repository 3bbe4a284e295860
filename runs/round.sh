#!/usr/bin/env bash
# A round of self-improvement: from a pipeline to a better one, by way of ratings.
#
#     bash runs/round.sh                       draws candidates, and stops for people to rate them
#     RATINGS=given.csv bash runs/round.sh     goes on with their ratings
#     STAND_IN=1 bash runs/round.sh            goes on with a stand-in's, where nobody is at hand
set -euo pipefail

DATA=${DATA:-data.csv}  # path,Text,modality,finding,split,part
MODEL=${MODEL:-minim_pipeline/checkpoints/minim-256}
OUT=${OUT:-runs/out/round-1}
SEED=${SEED:-1}  # another one for every round
RATINGS=${RATINGS:-}
STAND_IN=${STAND_IN:-}

rated=()
if [ -n "$RATINGS" ]; then
    rated=(--ratings "$RATINGS")
elif [ -n "$STAND_IN" ]; then
    python research/stand_in.py --pretrained_model_name_or_path "$MODEL" --train_data "$DATA" \
        --output_dir "$OUT-stand_in" --mixed_precision bf16
    rated=(--stand_in "$OUT-stand_in")
fi
python train/self_improve.py --pretrained_model_name_or_path "$MODEL" --output_dir "$OUT" --data "$DATA" \
    --seed "$SEED" --mixed_precision bf16 --batch_size 256 \
    --preference "--max_train_minutes 4 --replay $DATA" "${rated[@]}"
