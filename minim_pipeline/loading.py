"""A U-Net that lies apart from its pipeline, as MINIM's training leaves it: `checkpoint/unet`, trained from Stable
Diffusion, whose text encoder and autoencoder it goes on using.

diffusers is imported by `load_unet` only.
"""

import hashlib
from pathlib import Path

from .data.sources import read_json


def unet_folder(path: str | Path) -> Path | None:
    """The folder of the U-Net that lies in `path` or in its folder `unet`; `None` if there is none."""
    for folder in (Path(path), Path(path) / "unet"):
        try:
            config = read_json(folder / "config.json")
        except (OSError, ValueError):
            continue
        if config.get("_class_name") == "UNet2DConditionModel":
            return folder
    return None


def unet_identity(path: str | Path) -> str:
    """The name of the folder, and a digest of its files: what provenance says of a U-Net."""
    folder, total = unet_folder(path), hashlib.sha256()
    for file in sorted(file for file in folder.iterdir() if file.suffix in (".json", ".safetensors", ".bin")):
        with open(file, "rb") as opened:
            total.update(file.name.encode() + hashlib.file_digest(opened, "sha256").digest())
    return f"{folder.resolve().name} sha256-{total.hexdigest()[:16]}"


def load_with_unet(model: str, path: str | Path, bare: bool, dtype=None):
    """`MinimPipeline.from_pretrained(model)` with the U-Net in the folder `path` in place of its own.

    Args:
        model: the pipeline that the U-Net was trained from, a folder or an id on the Hub.
        path: folder of the U-Net, or one that holds it as `unet`.
        bare: the U-Net has learned captions as they stand, without a modality, as MINIM's training has it.
        dtype: of all weights; by default float32.

    Raises:
        ValueError: there is no U-Net, or it does not fit the text encoder or the autoencoder.
    """
    import torch
    from diffusers import UNet2DConditionModel

    from . import MinimPipeline

    folder = unet_folder(path)
    if folder is None:
        raise ValueError(f"--unet {str(path)!r} is no folder of a U-Net: it has no config.json of one.")
    dtype = dtype or torch.float32
    try:
        unet = UNet2DConditionModel.from_pretrained(folder, dtype=dtype)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"--unet {str(path)!r} cannot be read: {' '.join(str(error).split())}") from error
    pipe = MinimPipeline.from_pretrained(model, unet=unet, dtype=dtype, bare_prompts=bare)
    for what, needs, has in (
        ("reads text of width", unet.config.cross_attention_dim, pipe.text_encoder.config.hidden_size),
        ("denoises latents of channels", unet.config.in_channels, pipe.vae.config.latent_channels),
    ):
        if needs != has:
            raise ValueError(
                f"--unet {str(path)!r} {what} {needs}, {model} has {has}: name the model it was trained from."
            )
    return pipe
