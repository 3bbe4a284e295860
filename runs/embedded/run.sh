#!/usr/bin/env bash
# The next embedded model, from images to its card: some 80 minutes on four H200. Every step goes on where it was
# stopped, or is done again; started again, the script goes through all of them.
#
#     bash runs/embedded/run.sh
#
# The data: CSV files with path,Text,modality,finding,family,split,part,source. Those of the five modalities are of
# another set than those of all.
set -euo pipefail

FIRST=${FIRST:-first.csv}        # OCT, fundus, chest X-ray, chest CT and brain MRI: of autoencoder and encoder
ALL=${ALL:-data.csv}             # all seven modalities
RATINGS=${RATINGS:-ratings.csv}  # people's grades of quality
ANATOMY=${ANATOMY:-anatomy.csv}  # prompts and seeds, rated by eye: research/plan_prompts.py begins it
OUT=${OUT:-runs/out/embedded}
JUDGES=${JUDGES:-$OUT/judges}    # research/judges holds those that were published
LAUNCH=${LAUNCH:-accelerate launch --multi_gpu --mixed_precision bf16 --num_processes}

# Autoencoder, text encoder, U-Net, and that against its own images
$LAUNCH 2 train/train_autoencoder.py runs/embedded/autoencoder.yaml --train_data "$FIRST" \
    --output_dir "$OUT/autoencoder"
$LAUNCH 2 train/train_autoencoder.py runs/embedded/decoder.yaml --train_data "$FIRST" --output_dir "$OUT/decoder" \
    --pretrained_model_name_or_path "$OUT/autoencoder"
python train/train_autoencoder.py runs/embedded/sharpness.yaml --train_data "$FIRST" --output_dir "$OUT/sharpness" \
    --pretrained_model_name_or_path "$OUT/decoder"
python train/train_text_encoder.py --train_data "$ALL" --output_dir "$OUT/text_encoder" --threads 8 --seed 0 \
    --num_layers 6 --vocab_size 4096 --corpus_size 32000 --max_train_steps 2400
$LAUNCH 4 train/train_text_to_image.py runs/embedded/unet.yaml --train_data "$ALL" --output_dir "$OUT/unet" \
    --vae "$OUT/sharpness/vae" --text_encoder "$OUT/text_encoder"
python train/train_ddo.py runs/embedded/ddo.yaml --pretrained_model_name_or_path "$OUT/unet/pipeline" \
    --train_data "$ALL" --output_dir "$OUT/ddo"
generator=$OUT/ddo/pipeline

# The judges, of part B, the filter's teacher, of part A, and the encoder that reports look through, of part A
python train/train_classifier.py --train_data "$ALL" --output_dir "$JUDGES" --mixed_precision bf16 --seed 0 \
    --min_val 5 --architectures efficientnet-lite0 efficientnet-lite2 --autoencoder "$generator"
python train/train_classifier.py --train_data "$ALL" --part A --output_dir "$OUT/teacher" --mixed_precision bf16 \
    --seed 0 --min_val 5 --architectures efficientnet-lite0 efficientnet-lite2 --autoencoder "$generator"
python train/train_encoder.py --train_data "$FIRST" --output_dir "$OUT/encoder" --mixed_precision bf16 --seed 0

# The filter head: quality, finding and realism
python train/train_filter.py --pretrained_model_name_or_path "$generator" --train_data "$ALL" --ratings "$RATINGS" \
    --teacher "$OUT/teacher" --output_dir "$OUT/head" --mixed_precision bf16 --max_train_minutes 3.5 \
    --max_train_steps 100000 --rating_steps 200 --realism_loss_weight 0.5 --latent_variants 4 --drawn_images 8000
python train/calibrate_filter.py --filter_head "$OUT/head/filter_head" --train_data "$ALL" --ratings "$RATINGS" \
    --pretrained_model_name_or_path "$generator" --teacher "$OUT/teacher" --min_val 5 --output_dir "$OUT/calibrated" \
    --mixed_precision bf16 --batch_size 256 --acceptance 0.8 --most_cost 1.5
python -c '
import sys
from minim_pipeline import FilterHead, MinimPipeline
model, head, output = sys.argv[1:]
head = FilterHead.from_pretrained(head)
MinimPipeline.from_pretrained(model, filter_head=head, num_candidates=4).save_pretrained(output)
' "$generator" "$OUT/calibrated/filter_head" "$OUT/model"

# What it is worth: images as a user gets them, beside real ones
measure() {
    python train/evaluate.py --real "$ALL" --real-split val --train "$ALL" --train-split train --judges "$JUDGES" \
        --encoder "$OUT/encoder" --extractor judges --extractor efficientnet-lite0 --no-real-images "$@"
}
draw() {  # CSV FOLDER
    minim generate --model "$OUT/model" --prompts-file "$1" --output-dir "$2" --batch-size 128 --dtype bfloat16
}
for phrasing in train new test; do
    python research/plan_prompts.py --model "$OUT/model" --judges "$JUDGES" --phrasing "$phrasing" \
        --output "$OUT/$phrasing.csv"
    draw "$OUT/$phrasing.csv" "$OUT/drawn/$phrasing"
    measure --synthetic "$OUT/drawn/$phrasing/data.csv" --autoencoder "$OUT/model/vae" \
        --output-dir "$OUT/docs/evaluation/$phrasing"
done
python research/report_model.py --model "$OUT/model" --judges "$JUDGES" --data "$ALL" --output "$OUT/docs/report.json" \
    --sheets "$OUT/docs/sheets" --drawn "$OUT"/drawn/{train,new}/data.csv

# The curve that the sampling defaults were chosen from
measure --pipeline "$OUT/model" --dtype bfloat16 --batch-size 128 --curve-guidance 1 1.5 2 3 --curve-candidates 1 2 4 \
    --output-dir "$OUT/docs/evaluation/curve"

# The filter: with it and without on the same seeds, and beside somebody's eyes
for seed in 300000 400000; do
    python research/evaluate_filter.py --model "$OUT/model" --judges "$JUDGES" --encoder "$OUT/encoder" --data "$ALL" \
        --output_dir "$OUT/filter-$seed" --mixed_precision bf16 --batch_size 256 --ratings "$RATINGS" --seed "$seed"
done
python research/gather_filter.py --training "$OUT/head/report.json" --calibration "$OUT/calibrated/report.json" \
    --comparisons "$OUT/filter-300000" "$OUT/filter-400000" --output "$OUT/docs/filter/report.json"
draw "$ANATOMY" "$OUT/drawn/anatomy"
minim score --model "$OUT/model" --data "$OUT/drawn/anatomy/data.csv"
python research/anatomy.py --images "$OUT/drawn/anatomy/data-scored.csv" --sheets "$OUT/anatomy" --ratings "$ANATOMY" \
    --output "$OUT/docs/anatomy.json"

# The card, which claims nothing else
python research/describe_data.py --data "$ALL" --name minim-open-2 --model "$OUT/model" --output "$OUT/docs/data.json"
python research/make_card.py --model "$OUT/model" --docs "$OUT/docs" --output "$OUT/pipeline_card.md"
