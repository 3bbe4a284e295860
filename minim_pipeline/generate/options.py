"""What `minim generate` can be told of how to draw and to choose."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from .. import EMBEDDED_CHECKPOINT
from ..loading import DTYPES, SCHEDULERS
from ..options import Count, Options, Range, Weight, option
from .plan_table import SHARD_SIZE
from .shortfall import MAX_ROUNDS
from .sinks import FORMATS


Side = Annotated[int, Range(8, multiple=8)]
Score = Annotated[float, Range(1)]
SIDE_HELP = "Pixels, a multiple of 8 (default: the model's own; it has learned no other)."


@dataclass(kw_only=True)
class ModelOptions(Options):
    """The model."""

    separator = "-"

    model: str = option(str(EMBEDDED_CHECKPOINT), "A folder or a model on the Hub (default: the embedded model).")


@dataclass(kw_only=True)
class SamplingOptions(Options):
    """How images are drawn."""

    num_inference_steps: Count | None = option(None, "Default: the model's own.")
    guidance_scale: Weight | None = option(None, "Default: the model's own.")
    no_filter: bool = option(False, "Leave the model's filter out: what the generator draws comes back.")
    batch_size: Count | None = option(None, "Images drawn together (default 4 on a CPU, else as many as are fast).")
    dtype: str = option("float32", "To draw in.", choices=DTYPES)
    device: str | None = option(None, "E.g. cpu, cuda, cuda:1 (default: a GPU if there is one).")


@dataclass(kw_only=True)
class DrawingOptions(ModelOptions, SamplingOptions):
    """What is drawn with. Where nothing is said it is as `MinimPipeline` has it."""

    unet: Path | None = option(
        None,
        "Draw with this U-Net, such as MINIM's checkpoint/unet; --model is what it was trained from. If that is "
        "Stable Diffusion, the prompt is read as it stands, as in MINIM's training.",
    )
    negative_prompt: str | None = option(None, "What the image shall not show.")
    height: Side | None = option(None, SIDE_HELP)
    width: Side | None = option(None, SIDE_HELP)
    scheduler: str | None = option(None, "Default: the model's own.", choices=tuple(SCHEDULERS))
    lora: str | None = option(None, "LoRA weights to add, of diffusers, kohya or PEFT: a file, a folder or a Hub id.")
    quiet: bool = option(False, "No progress bar, and nothing said at the end.")


@dataclass(kw_only=True)
class GenerateOptions(DrawingOptions):
    """The model's filter, which chooses among candidates.

    What falls short is drawn again in up to `max_rounds` rounds, and `data.csv` says of each image whether it was
    accepted. With `accepted_only`, what falls short is in `fell_short.jsonl` alone, and drawn again where `max_rounds`
    is larger than it was.
    """

    num_candidates: Count | None = option(None, "Of which the filter chooses (default: the model's).")
    filter_threshold: Score | None = option(None, "Score from 1 to 3 to accept (default: the model's).")
    max_rounds: Count | None = option(None, f"Draw what falls short again (default 1; --accepted-only: {MAX_ROUNDS}).")
    accepted_only: bool = option(
        False,
        "Write accepted images alone, drawn on until there are as many as asked for, at most --max-rounds times; "
        "exit code 3 if some fall short.",
    )
    keep_copies: bool = option(False, "Let the filter accept copies of training images.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.no_filter and self.steering:
            raise ValueError(f"{', '.join(self.steering)} would steer the filter, but no_filter leaves it out.")

    @property
    def rounds(self) -> int:
        """In how many rounds an image is drawn at most."""
        return self.max_rounds or (MAX_ROUNDS if self.accepted_only else 1)

    @property
    def steering(self) -> list[str]:
        """The options given that need a filter."""
        given = {"accepted_only": self.accepted_only, "num_candidates": self.num_candidates is not None}
        given |= {"filter_threshold": self.filter_threshold is not None, "max_rounds": self.rounds > 1}
        given |= {"keep_copies": self.keep_copies}
        return [name for name, there in given.items() if there]


@dataclass(kw_only=True)
class ShardOptions(Options):
    """The files of large sets, which are written in shards.

    So is whatever has one of these options, a URL as its folder, or more than `SHARD_SIZE` images.
    """

    separator = "-"

    plan: str | None = option(None, "Draw this plan, a Parquet file of minim plan: columns id,prompt,modality,seed.")
    format: str = option("png", "Of the images, or of their shards.", choices=tuple(FORMATS))
    shard: str | None = option(None, "Draw only every n-th shard, from i on (from 0).", metavar="i/n")
    shard_size: Count | None = option(None, f"Images a shard, drawn and written as one (default {SHARD_SIZE}).")
    ray: str | None = option(
        None,
        "Draw with Ray, an actor a GPU, or a CPU where there is none: of the cluster at this address, host:port; by "
        "default of the one that this machine is of, or of this machine.",
        nargs="?",
        const="",
        metavar="ADDRESS",
    )
    native_dicom: bool = option(False, "Chest X-rays as CR and ultrasound as US images, no Secondary Captures.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.native_dicom and self.format != "dicom":
            raise ValueError(f"--native-dicom is for --format dicom, got --format {self.format}.")
        if self.ray and not re.fullmatch(r"(ray://)?[^/\s]+:\d+", self.ray):
            raise ValueError(f"--ray has to be an address such as host:6379 or ray://host:10001, got {self.ray!r}.")
        part, parts = self.part
        if not 0 <= part < parts:
            raise ValueError(f"--shard has to be i/n with i from 0 to n - 1, got {self.shard!r}.")

    @property
    def part(self) -> tuple[int, int]:
        """Which part of how many is drawn."""
        if self.shard is None:
            return 0, 1
        part, _, parts = self.shard.partition("/")
        return (int(part), int(parts)) if part.isdecimal() and parts.isdecimal() else (-1, 0)

    @property
    def size(self) -> int:
        return self.shard_size or SHARD_SIZE

    @property
    def asks_for_shards(self) -> bool:
        ray = self.ray is not None
        return bool(self.plan or self.shard or self.shard_size or self.format != "png" or ray)
