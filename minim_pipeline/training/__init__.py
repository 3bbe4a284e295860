"""What the trainers are made of; the commands are in `train/`."""
