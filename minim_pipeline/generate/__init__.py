"""Sets of images from a list of prompts, written so that the same command goes on where it stopped."""
