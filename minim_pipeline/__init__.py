"""minim: synthetic medical images from a modality and a sentence, as a diffusers pipeline.

Names are imported on first use, because diffusers takes seconds to import and most of the package does without it.
`from minim_pipeline import MinimPipeline` (or any other use of that name) also registers the class with diffusers, so
that from then on `DiffusionPipeline.from_pretrained(...)` finds it too.
"""

from importlib import import_module
from pathlib import Path


__version__ = "0.1.0"

# The model that ships with the package: 256 px, six modalities, fp16 safetensors.
EMBEDDED_CHECKPOINT: Path = Path(__file__).parent / "checkpoints" / "minim-256"
# The image-text encoder that reports and copy checks look through: 6 MB.
EMBEDDED_ENCODER: Path = Path(__file__).parent / "checkpoints" / "minim-encoder"
# Phrasings of every finding, to train with and to measure by.
CAPTIONS: Path = Path(__file__).parent / "training" / "captions.json"

_MODULE_OF = {
    "MinimPipeline": "pipeline_minim",
    "MinimPipelineOutput": "pipeline_minim",
    "MinimScores": "pipeline_minim",
    "FilterHead": "minim_filter",
    "MODALITIES": "modalities",
    "Modality": "modalities",
    "check_caption": "captions",
    "may_mirror": "captions",
    "names_a_side": "captions",
    "register_modality": "modalities",
    "resolve_modality": "modalities",
    "split_prefix": "modalities",
    "save_dicom": "dicom",
    "add_modality_tokens": "tokens",
    "negative_text": "tokens",
    "prompt_text": "tokens",
}

__all__ = ["CAPTIONS", "EMBEDDED_CHECKPOINT", "EMBEDDED_ENCODER", "__version__", *_MODULE_OF]


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)


from . import auto_pipeline  # noqa: E402, F401  last, as it may import the rest: diffusers' Auto class finds the pipeline
