"""Options of a round of self-improvement."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch

from ... import EMBEDDED_CHECKPOINT
from ...evaluation.comparison import ComparisonOptions
from ..config import Count, HubOptions, Positive, Range, option, parse
from ..filter.tune import TuningOptions
from ..preference.config import PreferenceConfig


SEEDS = 10**6


@dataclass(kw_only=True)
class SelfImproveConfig(TuningOptions, ComparisonOptions, HubOptions):
    """Options of a round: of the head's further training, the comparison, and what is between."""

    pretrained_model_name_or_path: str = option(str(EMBEDDED_CHECKPOINT), "A pipeline with a filter head.")
    prompts: str | None = option(None, "CSV with Text,modality,finding; default: all phrasings of what was learned.")
    candidates: Count = option(2, "Images of each prompt that are rated.")
    ratings: str | None = option(None, "CSV of ratings of the candidates, as `minim ratings` writes it.")
    preference: str = option("", "Arguments of train_preference.py as one: '--max_train_minutes 4'.")
    num_processes: Count = option(1, "Of preference training, a GPU each, through accelerate.")
    acceptance: Positive = option(0.7, "Share of generated images that the new thresholds accept.")
    calibration_images: Count = option(200, "Of each modality, to set the thresholds by.")
    seed: Annotated[int, Range(0, SEEDS - 1)] = option(0, "Another for every round: no image is to be drawn twice.")
    batch_size: Count = option(128, "Images drawn together.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.acceptance > 1:
            raise ValueError(f"--acceptance has to be above 0 and at most 1, got {self.acceptance}.")
        files = self.values("data", "captions", "prompts", "ratings") | {"replay": self.preference_config.replay}
        for name, path in files.items():
            if path and not Path(path).is_file():
                raise ValueError(f"--{name} has to be a file, and {path!r} is none.")
        for name, path in self.values("judges", "stand_in", "encoder").items():
            if path and not Path(path).is_dir():
                raise ValueError(f"--{name} has to be a folder, and {path!r} is none.")

    @property
    def preference_config(self) -> PreferenceConfig:
        """Of preference training, in `preference/`: what --preference says, and for the rest what the round does."""
        places = {"filter_head": "head/filter_head", "prompts": "prompts.csv", "output_dir": "preference"}
        defaults = {name: str(self.output / place) for name, place in places.items()}
        shared = ("pretrained_model_name_or_path", "mixed_precision", "seed", "encoder", "fit", "window")
        return parse(PreferenceConfig, shlex.split(self.preference), defaults=defaults | self.values(*shared))

    @property
    def dtype(self) -> torch.dtype:
        """In which images are drawn."""
        return torch.bfloat16 if self.bf16 else torch.float32

    @property
    def first_seed(self) -> int:
        """Of the round's candidates; that of the images for its thresholds lies half-way to the next round's."""
        return (self.seed + 1) * 10**9
