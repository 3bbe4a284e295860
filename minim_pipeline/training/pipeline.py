"""The pipeline that is trained: made new or from a base, and its trained parts written whole or not at all."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from .. import FilterHead, MinimPipeline
from ..disk import save_model, whole_folder
from ..finite import check_weights
from ..licenses import license_of
from ..loading import load_with_unet, unet_folder
from ..schedules import karras_timesteps
from ..tokens import add_modality_tokens, modality_tokens
from .config import Count, Options, Positive, Share, Weight, Whole, option
from .filter.heads import inherited_filter


# The text reaches the U-Net by cross-attention and, pooled, by the time embedding (`addition_embed_type`): at this
# size that makes it follow the finding sooner.
_MINIM = dict(
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    addition_embed_type="text",
    addition_embed_type_num_heads=4,
)
PRESETS = {
    # The embedded model's: 27 M parameters, heads of 64 channels; dropout, since it sees an image some hundred times.
    "minim-256": dict(_MINIM, block_out_channels=(128, 256, 256), attention_head_dim=(2, 4, 4), dropout=0.1),
    # For tests: trains in seconds on a CPU.
    "tiny": dict(_MINIM, block_out_channels=(8, 16, 16), attention_head_dim=2, norm_num_groups=4),
}
# A new model's, as `ModelOptions` names them.
SAMPLING = dict(num_inference_steps=20, guidance_scale=3.0, guidance_rescale=0.0, guidance_interval=[0.0, 1.0])


@dataclass(kw_only=True)
class ModelOptions(Options):
    """What is trained, and the settings that the pipeline samples with by default."""

    pretrained_model_name_or_path: str | None = option(None, "Start from this pipeline: SD-1.x, SD-2.x or minim's.")
    preset: Literal["minim-256", "tiny"] | None = option(None, "Shape of a new U-Net; needs --vae and --text_encoder.")
    layers_per_block: Count | None = option(None, "Of a new U-Net; the preset's is 1: 27 M parameters, 2 makes 40 M.")
    dropout: Share | None = option(None, "Of a new U-Net; default: the preset's.")
    vae: str | None = option(None, "Folder of a trained autoencoder (train_autoencoder.py).")
    text_encoder: str | None = option(None, "Folder with `tokenizer` and `text_encoder` (train_text_encoder.py).")
    unet: str | None = option(None, "Start from this U-Net, such as MINIM's checkpoint/unet, not the pipeline's own.")
    lora_rank: Whole = option(0, "Train a LoRA of this rank instead of the U-Net.")
    prediction_type: Literal["epsilon", "v_prediction"] | None = option(None, "New models: v_prediction.")
    num_inference_steps: Count | None = option(None, "Default, as for the guidance: the base's, or 20.")
    sigma_max: Positive | None = option(
        None, "Sample at pure noise, then at Karras's noise levels from this one down; default: as the base."
    )
    guidance_scale: Weight | None = option(None, "Of a new model: 3.")
    guidance_rescale: Weight | None = option(None, "Of a new model: 0.")
    guidance_interval: list[Share] | None = option(None, "Of a new model: all steps, 0 1.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.pretrained_model_name_or_path) == bool(self.preset):
            raise ValueError("Give either --pretrained_model_name_or_path or --preset.")
        if self.preset and not (self.vae and self.text_encoder):
            raise ValueError("--preset needs --vae and --text_encoder, the folders of trained ones.")
        if self.pretrained_model_name_or_path and (self.vae or self.text_encoder):
            raise ValueError("--vae and --text_encoder belong to --preset; a pretrained pipeline brings its own.")
        if self.unet_options and not self.preset:
            raise ValueError("--layers_per_block and --dropout belong to --preset; a pretrained U-Net has its own.")
        if self.unet and not (self.pretrained_model_name_or_path and unet_folder(self.unet)):
            raise ValueError(
                f"--unet has to be the folder of a U-Net, beside --pretrained_model_name_or_path; got {self.unet!r}."
            )
        if self.guidance_interval is not None and len(self.guidance_interval) != 2:
            raise ValueError(f"--guidance_interval has to be two shares of the steps, got {self.guidance_interval}.")

    @property
    def unet_options(self) -> dict[str, float]:
        """Of a new U-Net, what is not to be the preset's."""
        asked = self.values("layers_per_block", "dropout")
        return {name: value for name, value in asked.items() if value is not None}


@dataclass
class Trainee:
    """A pipeline to be trained."""

    pipe: MinimPipeline  # without a filter head, as what is sampled while it trains is the U-Net alone
    new_tokens: list[int]  # ids of the modalities' tokens that the base does not have
    filter_head: FilterHead | None  # what `pipe` gets back at the end
    message: str  # what becomes of the base's filter head; empty where it has none
    lora: bool  # whether a LoRA is trained instead of the U-Net

    def save_weights(self, folder: Path) -> None:
        """Writes the trained parts, the text encoder among them, as the function of this name does."""
        save_weights(self.pipe, self.lora, folder, text_encoder=True)

    def save_pipeline(self, weights: Path, folder: Path) -> None:
        """Writes the whole pipeline with what `save_weights` wrote to the folder `weights`.

        Of a LoRA that is the base with its new tokens, and the LoRA lies in `weights`.
        """
        if self.lora:
            self.pipe.unet.unload_lora()
        else:
            self.pipe.unet = UNet2DConditionModel.from_pretrained(weights / "unet")
        self.pipe.text_encoder = CLIPTextModel.from_pretrained(weights / "text_encoder", dtype=torch.float32)
        self.pipe.filter_head = self.filter_head
        save_model(self.pipe, folder)


def build_pipeline(
    options: ModelOptions, resolution: int, modalities: list[str], findings: dict[str, list[str]]
) -> Trainee:
    """The pipeline to train: loaded, with tokens added for modalities that it does not know, or new.

    It learns `findings` of each of `modalities`, by their ids, from images of `resolution` pixels.

    Raises:
        ValueError: the base was trained for another prediction type than the one asked for.
    """
    source, asked_type = options.pretrained_model_name_or_path, options.prediction_type
    if source is None:
        base = new_pipeline(options, resolution, modalities)
    elif options.unet:
        base = load_with_unet(source, options.unet, bare=False)
    else:
        base = MinimPipeline.from_pretrained(source)
    learned = base.scheduler.config.prediction_type
    if asked_type not in (None, learned):
        raise ValueError(f"{source} was trained for {learned!r}, --prediction_type asks for {asked_type!r}.")
    modalities = list(dict.fromkeys([*(base.config.modalities or []), *modalities]))
    known = base.config.findings or {}
    findings = {m: list(dict.fromkeys([*known.get(m, []), *findings.get(m, [])])) for m in modalities}
    base.unet.register_to_config(sample_size=resolution // base.vae_scale_factor)
    new = [m for m in modalities if f"<{m}>" not in base.tokenizer.get_vocab()]
    if new:
        add_modality_tokens(base.tokenizer, base.text_encoder, new)
    filter_head, message = inherited_filter(base, new, resolution)
    asked = {name: getattr(options, name) for name in SAMPLING if getattr(options, name) is not None}
    timesteps = base.config.timesteps
    if options.sigma_max:
        count = asked.get("num_inference_steps", base.config.num_inference_steps)
        timesteps = karras_timesteps(base.scheduler, count, options.sigma_max)
    pipe = MinimPipeline(
        **(base.components | {"filter_head": None}),
        modalities=modalities,
        findings=findings,
        num_candidates=base.config.num_candidates if filter_head is not None else 1,
        weights_license=base.weights_license or (license_of(source) if source else None),
        timesteps=timesteps,
        **({name: base.config[name] for name in SAMPLING} | asked),
    )
    new_tokens = base.tokenizer.convert_tokens_to_ids([f"<{m}>" for m in new])
    return Trainee(pipe, new_tokens, filter_head, message, bool(options.lora_rank))


def new_pipeline(options: ModelOptions, resolution: int, modalities: list[str]) -> MinimPipeline:
    """A new U-Net of the preset's shape between a trained autoencoder and a trained text encoder."""
    vae_folder, text_folder = str(options.vae), str(options.text_encoder)
    vae = AutoencoderKL.from_pretrained(vae_folder)
    text_encoder = CLIPTextModel.from_pretrained(text_folder, subfolder="text_encoder", dtype=torch.float32)
    unet = UNet2DConditionModel(
        sample_size=resolution // 2 ** (len(vae.config.block_out_channels) - 1),
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        cross_attention_dim=text_encoder.config.hidden_size,
        **(PRESETS[str(options.preset)] | options.unet_options),
    )
    prediction_type = options.prediction_type or "v_prediction"
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = DPMSolverMultistepScheduler(
        **betas,
        prediction_type=prediction_type,
        # Epsilon says nothing of the image where there is nothing but noise.
        rescale_betas_zero_snr=prediction_type == "v_prediction",
        timestep_spacing="trailing",
    )
    return MinimPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(text_folder, subfolder="tokenizer"),
        unet=unet,
        scheduler=scheduler,
        filter_head=None,
        modalities=modalities,
        weights_license=license_of(Path(vae_folder).parent) or license_of(text_folder),
        **SAMPLING,
    )


def add_lora(unet: UNet2DConditionModel, rank: int) -> None:
    """Freezes the U-Net, and adds a LoRA that changes nothing yet."""
    from peft import LoraConfig

    unet.requires_grad_(False)
    layers = ["to_k", "to_q", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=layers))


def save_weights(pipe: MinimPipeline, lora: bool, folder: Path, text_encoder: bool = False) -> None:
    """Writes trained parts of a pipeline, finite and whole, or not at all.

    With `lora` not the U-Net, but what was trained beside it, and the tokens that it was trained with.
    """
    check_weights(pipe.unet)
    check_weights(pipe.text_encoder)
    with whole_folder(folder) as unfinished:
        if lora:
            from peft.utils import get_peft_model_state_dict

            layers, tokens = get_peft_model_state_dict(pipe.unet), modality_tokens(pipe.tokenizer)
            MinimPipeline.save_lora_weights(unfinished, unet_lora_layers=layers, modality_tokens=tokens)
        else:
            pipe.unet.save_pretrained(unfinished / "unet")
        if text_encoder:
            pipe.text_encoder.save_pretrained(unfinished / "text_encoder")
