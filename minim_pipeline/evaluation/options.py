"""What `minim evaluate` can be told, by what it is about."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from .. import EMBEDDED_ENCODER
from ..generate.options import SamplingOptions
from ..options import Count, Options, Range, TableOptions, Weight, Whole, option


OpenShare = Annotated[float, Range(0, 1, open=True)]
# Of classifiers; those of efficientnet-lite start from ImageNet, and need the extra `train`.
Architecture = Literal["resnet", "convnextv2", "efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2"]
Hundreds = Annotated[int, Range(100, multiple=100)]


@dataclass(kw_only=True)
class SetOptions(TableOptions):
    """Sets of images: path,Text,modality[,finding,...] as a CSV, or in another format (docs/data.md)."""

    real: Path = option(help="Real images that the generator has not seen.")
    real_split: str | None = option(None, "Take only its rows of this `split`.")
    synthetic: Path | None = option(None, "The images to measure; or --pipeline.")
    pipeline: str | None = option(None, "Draw them from the captions of --real with this model.")
    train: Path | None = option(None, "What the generator learned from; without: no audit of copies.")
    train_split: str | None = option(None, "Take only its rows of this `split`.")
    image_root: str | None = option(None, "Look for the images of --real and --train here.")
    label_column: str = option("finding", "Column of the finding (default: finding).")
    modalities_from: str | None = option(None, "A model whose own modalities are known, too, as --pipeline's are.")
    skip_bad_rows: bool = option(False, "Leave bad rows out instead of stopping.")
    resolution: Count = option(256, "Side in pixels to which all are brought (default 256).")


@dataclass(kw_only=True)
class ExtractorOptions(Options):
    """What looks at them."""

    encoder: str = option(str(EMBEDDED_ENCODER), "Image-text encoder (default: ours).")
    extractor: list[str] = option(
        [],
        "Another vision model of transformers, efficientnet-lite0 or TorchScript Inception (.pt) to measure through, "
        "or judges, for those of --judges; may be repeated.",
        action="append",
    )
    judges: str | None = option(None, "Classifiers of the finding, of train/train_classifier.py.")
    autoencoder: str | None = option(
        None, "Tell generated from real images through this autoencoder, too (default: --pipeline's)."
    )
    c2st_steps: Whole = option(0, "Steps of a network fine-tuned to tell them apart, on a GPU (default 0: none).")


@dataclass(kw_only=True)
class ReportOptions(Options):
    """Output."""

    output_dir: Path = option(help="For report.json and report.html.")
    no_real_images: bool = option(False, "No picture of a real image in report.html.")
    sheet_images: Whole = option(24, "Images of a modality in report.html (default 24).")


@dataclass(kw_only=True)
class DrawingOptions(SamplingOptions):
    """Drawing, with --pipeline."""

    num_images: Count = option(1, "Images of each caption of --real (default 1).")
    seed: Whole = option(0, "Image i has seed + i (default 0).")
    compile: bool = option(False, "torch.compile the model, where --extraction-captions and --downstream draw.")
    extraction_captions: Whole = option(
        0, "Rarest captions of --train, so many a modality, to draw training images with (default 0: no attempt)."
    )
    extraction_images: Count = option(8, "Images of each of them (default 8).")


@dataclass(kw_only=True)
class CurveOptions(Options):
    """The curve of what is read against how far from real images it lies, with --pipeline."""

    curve_guidance: list[Weight] = option([], "Guidance scales to draw the captions of --real with, again.")
    curve_candidates: list[Count] = option([1], "And numbers of candidates, every one with each scale (default 1).")


@dataclass(kw_only=True)
class DownstreamOptions(Options):
    """Worth as training data, for a GPU."""

    downstream: bool = option(False, "Train classifiers with the synthetic images.")
    low_data_share: OpenShare = option(0.1, "Share of --train for low data (default 0.1).")
    low_data_pipeline: str | None = option(None, "A model trained on OUTPUT/low_data.csv: honest low data.")
    percents: list[Hundreds] = option([100, 200, 500, 1000, 2000], "Synthetic images, % of the real ones.")
    classifier_seeds: Count = option(3, "Classifiers of each kind (default 3).")
    classifier_architecture: Architecture = option(
        "resnet", "What they are; efficientnet-lite starts from ImageNet (default resnet)."
    )
    classifier_steps: Count = option(1500, "Steps of each (default 1500).")
    classifier_resolution: Count = option(128, "What they see, in pixels (default 128).")


@dataclass(kw_only=True)
class EvaluateOptions(SetOptions, ExtractorOptions, ReportOptions, DrawingOptions, CurveOptions, DownstreamOptions):
    """An evaluation; raises ValueError for what cannot be done, before anything is."""

    separator = "-"

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.synthetic) == bool(self.pipeline):
            raise ValueError("give either --synthetic, images that are there, or --pipeline, a model that draws them.")
        if self.extraction_captions and not (self.pipeline and self.train):
            raise ValueError("--extraction-captions needs --pipeline to draw with and --train to compare with.")
        if "judges" in self.extractor and not self.judges:
            raise ValueError("--extractor judges needs --judges, the classifiers whose features are meant.")
        if self.downstream and not self.train:
            raise ValueError("--downstream needs --train, the real images to train on.")
        if self.no_filter and not self.pipeline:
            raise ValueError("--no-filter belongs to --pipeline: images that are there have been chosen already.")
        if self.curve_guidance and not self.pipeline:
            raise ValueError("--curve-guidance needs --pipeline, a model to draw with.")
        if self.curve_candidates != [1] and (self.no_filter or not self.curve_guidance):
            raise ValueError("--curve-candidates needs --curve-guidance, and a filter to choose among them.")
        if self.low_data_pipeline and not (self.downstream and self.pipeline):
            raise ValueError("--low-data-pipeline belongs to --downstream with --pipeline.")
