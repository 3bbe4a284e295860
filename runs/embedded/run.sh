#!/usr/bin/env bash
# The embedded model, from images to its card: some 50 minutes on two H100. Every step goes on where it was stopped, or
# is done again; started again, the script goes through all of them.
#
#     bash runs/embedded/run.sh
#
# The data: CSV files with path,Text,modality,finding,split,part.
set -euo pipefail

FIVE=${FIVE:-data.csv}           # OCT, fundus, chest X-ray, chest CT and brain MRI
NEW=${NEW:-new_domain.csv}       # breast ultrasound, which is learned last
ALL=${ALL:-all.csv}              # both
JUDGED=${JUDGED:-judged.csv}     # ALL without the findings that carry no claims
REPLAY=${REPLAY:-replay.csv}     # every third train row of ALL
RATINGS=${RATINGS:-ratings.csv}  # people's grades of quality
OUT=${OUT:-runs/out/embedded}
JUDGES=${JUDGES:-$OUT/judges}    # research/judges holds those that were published
LAUNCH=${LAUNCH:-accelerate launch --num_processes 2 --multi_gpu --mixed_precision bf16}

# Puts a filter head into a pipeline: take_head PIPELINE HEAD OUTPUT
take_head() {
    python -c '
import sys
from minim_pipeline import FilterHead, MinimPipeline
model, head, output = sys.argv[1:]
head = FilterHead.from_pretrained(head)
MinimPipeline.from_pretrained(model, filter_head=head, num_candidates=4).save_pretrained(output)
' "$@"
}

# Autoencoder, text encoder, U-Net: the model of five modalities
$LAUNCH train/train_autoencoder.py runs/embedded/autoencoder.yaml --train_data "$FIVE" --output_dir "$OUT/autoencoder"
$LAUNCH train/train_autoencoder.py runs/embedded/decoder.yaml --train_data "$FIVE" --output_dir "$OUT/decoder" \
    --pretrained_model_name_or_path "$OUT/autoencoder"
python train/train_autoencoder.py runs/embedded/sharpness.yaml --train_data "$FIVE" --output_dir "$OUT/sharpness" \
    --pretrained_model_name_or_path "$OUT/decoder"
python train/train_text_encoder.py --train_data "$FIVE" --output_dir "$OUT/text_encoder" --threads 1 --seed 0
$LAUNCH train/train_text_to_image.py runs/embedded/unet.yaml --train_data "$FIVE" --output_dir "$OUT/unet" \
    --vae "$OUT/sharpness/vae" --text_encoder "$OUT/text_encoder"

# The judges, of part B, and the encoder that scores and reports look through, of part A
python train/train_classifier.py --train_data "$JUDGED" --output_dir "$JUDGES" --mixed_precision bf16 --seed 0 \
    --max_train_steps 2000 --min_val 7 --architectures resnet --width 48
python train/train_classifier.py --train_data "$JUDGED" --output_dir "$JUDGES" --mixed_precision bf16 --seed 0 \
    --max_train_steps 2000 --min_val 7 --architectures convnextv2 --width 64
python train/train_encoder.py --train_data "$FIVE" --output_dir "$OUT/encoder" --mixed_precision bf16 --seed 0

# Breast ultrasound
python train/add_modality.py --pretrained_model_name_or_path "$OUT/unet/pipeline" --modality breast_us \
    --train_data "$NEW" --replay "$FIVE" --skip_filter --output_dir "$OUT/breast" --mixed_precision bf16 \
    --max_train_minutes 2.8 --max_train_steps 100000 --latent_variants 4

# The filter head, of part A, and the stand-in for a clinician, of part C
python train/train_classifier.py --train_data "$ALL" --part A --architectures resnet --width 48 --min_val 5 \
    --max_train_steps 1600 --output_dir "$OUT/teacher" --mixed_precision bf16 --seed 0
python train/train_filter.py --pretrained_model_name_or_path "$OUT/breast/pipeline" --train_data "$ALL" \
    --ratings "$RATINGS" --teacher "$OUT/teacher" --output_dir "$OUT/head" --mixed_precision bf16 \
    --max_train_minutes 3.5 --max_train_steps 100000 --rating_steps 200
python research/stand_in.py --pretrained_model_name_or_path "$OUT/breast/pipeline" --train_data "$JUDGED" \
    --output_dir "$OUT/stand_in" --mixed_precision bf16 --batch_size 256 --min_val 7
take_head "$OUT/breast/pipeline" "$OUT/head/filter_head" "$OUT/six"

# Two rounds of preference training
before=$OUT/six
for round in 1 2; do
    python train/self_improve.py --pretrained_model_name_or_path "$before" --output_dir "$OUT/round-$round" \
        --stand_in "$OUT/stand_in" --encoder "$OUT/encoder" --seed "$round" --mixed_precision bf16 --batch_size 256 \
        --preference "--patience 9 --least_spread 0.8 --latent_variants 2 --replay $REPLAY"
    before=$OUT/round-$round/pipeline
done

# The head that ships learned from people's grades, the rubric and the teacher: not from the stand-in
python train/calibrate_filter.py --filter_head "$OUT/head/filter_head" --train_data "$ALL" --ratings "$RATINGS" \
    --pretrained_model_name_or_path "$before" --teacher "$OUT/teacher" --min_val 7 --output_dir "$OUT/calibrated" \
    --mixed_precision bf16 --batch_size 256
take_head "$before" "$OUT/calibrated/filter_head" "$OUT/model"

# What it is worth: the reports, and the card that claims nothing else
python research/report_model.py --model "$OUT/model" --judges "$JUDGES" --data "$ALL" --output "$OUT/docs/report.json" \
    --sheets "$OUT/docs/sheets" --dtype bfloat16 --batch_size 128
for seed in 300000 400000; do
    python research/evaluate_filter.py --model "$OUT/model" --judges "$JUDGES" --encoder "$OUT/encoder" --data "$ALL" \
        --output_dir "$OUT/filter-$seed" --mixed_precision bf16 --batch_size 256 --ratings "$RATINGS" --seed "$seed"
done
python research/gather_filter.py --training "$OUT/head/report.json" --calibration "$OUT/calibrated/report.json" \
    --comparisons "$OUT/filter-300000" "$OUT/filter-400000" --output "$OUT/docs/filter/report.json"
python research/compare_models.py --before "$OUT/six" --after "$OUT/round-2/pipeline" --data "$ALL" --judges "$JUDGES" \
    --encoder "$OUT/encoder" --stand_in "$OUT/stand_in" --comparison_seed 30000000 --mixed_precision bf16 \
    --batch_size 256 --output_dir "$OUT/comparison"
mkdir -p "$OUT/docs/rounds"
cp "$OUT/comparison/report.json" "$OUT/docs/rounds/both-rounds.json"
python train/evaluate.py --real "$ALL" --real-split val --train "$ALL" --train-split train --pipeline "$OUT/model" \
    --no-filter --judges "$JUDGES" --encoder "$OUT/encoder" --no-real-images --output-dir "$OUT/docs/evaluation" \
    --downstream --classifier-steps 1000 --batch-size 128 --dtype bfloat16
python research/make_card.py --model "$OUT/model" --docs "$OUT/docs" --output "$OUT/pipeline_card.md"
