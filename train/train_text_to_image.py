"""Trains the U-Net; what is not the textbook's: `minim_pipeline/training/text_to_image.py`.

From scratch, as the embedded model:

    accelerate launch train/train_text_to_image.py --preset minim-256 --vae runs/autoencoder/vae \
        --text_encoder runs/text_encoder --train_data data.csv --output_dir runs/unet --mixed_precision bf16 --compile

From Stable Diffusion 1.x or 2.x, as the reference does (the modalities become new tokens), or from a MinimPipeline:

    accelerate launch train/train_text_to_image.py --pretrained_model_name_or_path CompVis/stable-diffusion-v1-4 \
        --resolution 512 --train_data data.csv --output_dir runs/sd --learning_rate 1e-5 --train_batch_size 8 \
        --gradient_accumulation_steps 4 --gradient_checkpointing --mixed_precision bf16

What a MinimPipeline knows it forgets while it learns something else, unless it goes on seeing it (`--replay`);
`add_modality.py` does so. A YAML file of options may stand in front of the others; the same command goes on where it
was stopped.
"""

from minim_pipeline.training.config import parse
from minim_pipeline.training.text_to_image import TextToImageConfig, train


def main(argv: list[str] | None = None) -> None:
    train(parse(TextToImageConfig, argv, __doc__))


if __name__ == "__main__":
    main()
