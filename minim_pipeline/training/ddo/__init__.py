"""Direct discriminative optimization: a trained U-Net, trained on against its own images."""
