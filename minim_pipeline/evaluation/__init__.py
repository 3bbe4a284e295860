"""Figures about images: what others see in them, how near they come to the training images."""
