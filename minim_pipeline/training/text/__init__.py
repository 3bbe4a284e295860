"""What the text encoder learns from."""
