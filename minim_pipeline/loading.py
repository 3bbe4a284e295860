"""Pipelines in folders and on the Hub: what their files say of them, by which names they are known, and loading them.

Also with a U-Net that lies apart, as MINIM's training leaves it: `checkpoint/unet`, trained from Stable Diffusion,
whose text encoder and autoencoder it goes on using. torch and diffusers are imported by what loads weights only.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from . import EMBEDDED_CHECKPOINT
from .data.sources import read_json
from .modalities import register_definitions


# Names on the command line, and diffusers' classes.
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
}
DTYPES = ("float32", "float16", "bfloat16")


def read_model_index(model: str) -> dict:
    """The `model_index.json` of a pipeline: which modalities and findings it has learned, among others.

    `model` is a folder, or an id on the Hub; ValueError if that holds no pipeline, or the Hub cannot be reached.
    """
    file = Path(model) / "model_index.json"
    if Path(model) == EMBEDDED_CHECKPOINT and not file.is_file():
        raise ValueError(f"the embedded model is missing ({file}): name another one with --model.")
    if not file.is_file():
        if Path(model).exists() or Path(model).is_absolute():
            if unet_folder(model):
                raise ValueError(
                    f"{model!r} holds a U-Net alone, as MINIM's training leaves it in checkpoint/unet. Name the Stable"
                    f" Diffusion that it was trained from, too: minim generate --model BASE --unet {model} (the prompt"
                    " is then the bare caption, as in that training), or train_text_to_image.py"
                    f" --pretrained_model_name_or_path BASE --unet {model}."
                )
            raise ValueError(f"{model!r} is no model: it holds no model_index.json.")
        from huggingface_hub import hf_hub_download

        try:
            file = Path(hf_hub_download(model, "model_index.json"))
        except (OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"{model!r} is neither a folder nor a model that the Hub gives: {reason}") from error
    index = read_json(file)
    if isinstance(index.get("modalities"), str):
        index["modalities"] = index["modalities"].split()
    return index


def register_modalities(model: str) -> dict:
    """Registers the modalities that a pipeline defines, so that rows of them are read; returns its index.

    Args, errors: as `read_model_index`.
    """
    index = read_model_index(model)
    register_definitions(index.get("custom_modalities") or {})
    return index


def model_identity(model: str) -> tuple[str, str]:
    """The name and the revision that provenance gives of `model`: on the Hub its id and its commit.

    Of a folder: its name (never its path, which may tell of people), and a digest of the files of its components.
    """
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        return model, Path(str(try_to_load_from_cache(model, "model_index.json"))).parent.name
    components = [name for name, value in read_model_index(model).items() if isinstance(value, list)]
    files = [folder / "model_index.json", *(file for name in components for file in (folder / name).glob("*"))]
    return folder.resolve().name, _digest(file for file in files if file.is_file())


def unet_identity(path: str | Path) -> str:
    """The name of the folder, and a digest of its files: what provenance says of a U-Net."""
    folder = _need_unet(path)
    files = (file for file in folder.iterdir() if file.suffix in (".json", ".safetensors", ".bin"))
    return f"{folder.resolve().name} {_digest(files)}"


def lora_identity(lora: str) -> str:
    """The name of the file or folder, and a digest of it, or the id on the Hub: what provenance says of a LoRA."""
    path = Path(lora)
    if not path.exists():
        return lora
    folder, weights = (path.parent, [path]) if path.is_file() else (path, [*path.glob("*.safetensors")])
    # PEFT's own adapters have their weight in a file beside.
    return f"{path.name} {_digest([*weights, *folder.glob('adapter_config.json')])}"


def _digest(files: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for path in sorted(files):
        with open(path, "rb") as file:
            total.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return f"sha256-{total.hexdigest()[:16]}"


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


def _need_unet(path: str | Path) -> Path:
    if (folder := unet_folder(path)) is None:
        raise ValueError(f"--unet {str(path)!r} is no folder of a U-Net: it has no config.json of one.")
    return folder


def load_pipeline(
    model: str,
    scheduler: str | None = None,
    lora: str | None = None,
    device: str | None = None,
    dtype: str = "float32",
    unet: str | Path | None = None,
):
    """The `MinimPipeline` that the options of `generate` describe, without progress bars of its own.

    `scheduler` may also be the name of diffusers' class, as provenance has it; `unet` as of `generate`.
    """
    if scheduler is not None and scheduler not in {*SCHEDULERS, *SCHEDULERS.values()}:
        raise ValueError(f"scheduler has to be one of {', '.join(SCHEDULERS)}, got {scheduler!r}.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype has to be one of {', '.join(DTYPES)}, got {dtype!r}.")
    import diffusers
    import torch
    import transformers
    from safetensors import SafetensorError

    from . import MinimPipeline

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device {device!r} cannot be used here: {reason}") from error

    try:
        if unet is None:
            pipe = MinimPipeline.from_pretrained(model, dtype=getattr(torch, dtype))
        else:
            bare = not read_model_index(model).get("modalities")
            pipe = load_with_unet(model, unet, bare, getattr(torch, dtype))
        pipe.to(device)
    except SafetensorError as error:
        raise ValueError(f"{model!r} has broken weights: {error}.") from error
    if scheduler is not None:
        # DDIM and DDPM clip to [-1, 1] unless told otherwise, which is right for pixels and wrong for latents.
        options: dict[str, dict] = {k: {"clip_sample": False} for k in ("DDIMScheduler", "DDPMScheduler")}
        options["DPMSolverMultistepScheduler"] = {"algorithm_type": "dpmsolver++"}
        name = SCHEDULERS.get(scheduler, scheduler)
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **options.get(name, {}))
    if lora is not None:
        try:
            pipe.load_lora_weights(lora)
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split()).partition(": copying a param")[0]
            raise ValueError(f"{lora!r} holds no LoRA for this model: {reason}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_with_unet(model: str, path: str | Path, bare: bool, dtype=None):
    """`MinimPipeline.from_pretrained(model)` with the U-Net in `path`, or in its folder `unet`, in place of its own.

    Args:
        model: the pipeline that the U-Net was trained from, a folder or a Hub id; ValueError if it does not fit.
        bare: the U-Net has learned captions as they stand, without a modality, as MINIM's training has it.
        dtype: of all weights; by default float32.
    """
    import torch
    from diffusers import UNet2DConditionModel

    from . import MinimPipeline

    folder = _need_unet(path)
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
            of = f"--unet {str(path)!r} {what} {needs}, {model} has {has}"
            raise ValueError(f"{of}: name the model it was trained from.")
    return pipe
