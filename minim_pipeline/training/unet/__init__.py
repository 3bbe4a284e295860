"""The parts of the U-Net's training, which `text_to_image.train` puts together."""
