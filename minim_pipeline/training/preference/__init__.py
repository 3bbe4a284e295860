"""Preference training: rewards, old images that are seen again, and a watch over what it may break."""
