"""Preference training for `accelerate launch --module`, from where the package is installed."""

from ..config import parse
from .config import PreferenceConfig
from .trainer import train


if __name__ == "__main__":
    train(parse(PreferenceConfig))
