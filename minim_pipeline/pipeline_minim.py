"""The pipeline: a modality and a sentence in, synthetic medical images out."""

import importlib.util
import inspect
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import FromSingleFileMixin, TextualInversionLoaderMixin
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput, scale_lora_layers, unscale_lora_layers
from diffusers.utils.torch_utils import randn_tensor
from transformers import CLIPTextModel, CLIPTokenizer

from .call_checks import (
    callback_embeds,
    check_attention_arguments,
    check_callback,
    check_counts,
    check_flags,
    check_generator,
    check_kinds,
    check_numbers,
    check_seeds,
    check_steps,
    check_tensor,
    check_threshold,
    check_wishes,
    is_whole,
    same_shape,
    shown,
    to_pictures,
)
from .captions import check_caption
from .data.image_pixels import convert_pictures
from .licenses import license_of
from .lora import LoraLoading
from .minim_filter import FILTER_LIBRARY, FilterHead, FilterHeadOutput
from .minim_filter.fingerprints import distances
from .minim_filter.funnel import REASONS, Funnel, combine, plan_stages, select_state, weaker
from .modalities import (
    AMBIGUOUS,
    Modality,
    custom_definitions,
    register_definitions,
    resolve_modality,
    split_prefix,
)
from .notices import logger, warn_once
from .schedules import check_scheduler, keep_from_clipping, settings_of
from .standalone import source_code
from .tokens import modality_tokens, negative_text, prompt_text
from .turns import draws_in_turn, in_turn


OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# Thresholds for a modality that the filter's config has none for: the middle of the scale.
UNCALIBRATED = {"score": 2.0, "finding": 2.0, "copy": -1}
# Of people's, from which on a modality's thresholds are said to be calibrated.
FEWEST_RATINGS = 20


@dataclass
class MinimPipelineOutput(BaseOutput):
    """What a call returns; every list has one entry an image, in the order of `images`.

    Args:
        images: `len(prompt) * num_images_per_prompt` images, all of the first prompt first: `list[PIL.Image.Image]`,
            `np.ndarray` (N, H, W, 3) in [0, 1], `torch.Tensor` (N, 3, H, W) in [0, 1], or latents (N, C, H/8, W/8).
        scores: the filter's expected rating of the finished picture, 1.0 to 3.0, as [`~MinimPipeline.score`] gives
            it; `None` where no filter ran.
        accepted: whether the filter accepts the picture, as `score` does; `None` where no filter ran.
        seeds: the int64 that draws the image again as `seeds=[seed]`; `None` where no single number does, because the
            noise came from `latents`, from one generator for several images, or from a generator already in use.
        candidates: how many were drawn for the image.
        rejected: how many of them were dropped on the way or not accepted, by reason: `"quality"`, `"finding"` and
            `"copy"` (of a training image); `None` where no filter ran.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    scores: list[float | None]
    accepted: list[bool | None]
    seeds: list[int | None]
    candidates: list[int]
    rejected: list[dict[str, int] | None]


@dataclass
class MinimScores(BaseOutput):
    """The filter's ratings of images, lists of one entry an image.

    Args:
        scores: expected rating, 1.0 to 3.0, of quality and finding together.
        accepted: whether score and finding reach the thresholds of the modality, and the image is no copy.
        reasons: why it is not accepted, `"quality"`, `"finding"` or `"copy"`; `None` if it is.
        quality: expected rating, 1.0 to 3.0, of the picture.
        finding: likewise, of whether it shows what the prompt says.
    """

    scores: list[float]
    accepted: list[bool]
    reasons: list[str | None]
    quality: list[float]
    finding: list[float]


# Copied from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion.rescale_noise_cfg
def rescale_noise_cfg(noise_cfg, noise_pred_text, guidance_rescale=0.0):
    r"""
    Rescales `noise_cfg` tensor based on `guidance_rescale` to improve image quality and fix overexposure. Based on
    Section 3.4 from [Common Diffusion Noise Schedules and Sample Steps are
    Flawed](https://huggingface.co/papers/2305.08891).

    Args:
        noise_cfg (`torch.Tensor`):
            The predicted noise tensor for the guided diffusion process.
        noise_pred_text (`torch.Tensor`):
            The predicted noise tensor for the text-guided diffusion process.
        guidance_rescale (`float`, *optional*, defaults to 0.0):
            A rescale factor applied to the noise predictions.

    Returns:
        noise_cfg (`torch.Tensor`): The rescaled noise prediction tensor.
    """
    std_text = noise_pred_text.std(dim=list(range(1, noise_pred_text.ndim)), keepdim=True)
    std_cfg = noise_cfg.std(dim=list(range(1, noise_cfg.ndim)), keepdim=True)
    # rescale the results from guidance (fixes overexposure)
    noise_pred_rescaled = noise_cfg * (std_text / std_cfg)
    # mix with the original results from guidance by factor guidance_rescale to avoid "plain looking" images
    noise_cfg = guidance_rescale * noise_pred_rescaled + (1 - guidance_rescale) * noise_cfg
    return noise_cfg


def retrieve_timesteps(
    scheduler,
    num_inference_steps: int,
    device: torch.device,
    timesteps: list[int] | None = None,
    sigmas: list[float] | None = None,
) -> tuple[torch.Tensor, int]:
    """The timesteps of `scheduler` and their number; `timesteps` or `sigmas` take the place of its own spacing."""
    if timesteps is None and sigmas is None:
        scheduler.set_timesteps(num_inference_steps, device=device)
        return scheduler.timesteps, num_inference_steps
    asked = {"timesteps": timesteps} if timesteps is not None else {"sigmas": sigmas}
    scheduler.set_timesteps(**asked, device=device)
    return scheduler.timesteps, len(scheduler.timesteps)


def check_finite(values: torch.Tensor, what: str, networks: dict[str, torch.nn.Module | None]) -> None:
    """Raises ValueError if latents or pixels (N, ...) are not finite: no picture is made of them.

    Args:
        what: they are.
        networks: by name, those that made them, or None; the first whose weights are not finite is told.
    """
    networks = {name: network for name, network in networks.items() if network is not None}
    broken = int((~values.isfinite()).flatten(1).any(1).sum())
    if not broken:
        return
    why = ""
    if networks:
        dtypes = " and ".join(dict.fromkeys(str(network.dtype) for network in networks.values()))
        why = f": numbers grew too large for {dtypes}; `dtype=torch.float32`, or less guidance, may help"
    for name, network in networks.items():
        weights = [p for p in network.parameters() if p.is_floating_point() and p.device.type != "meta"]
        if not all(p.isfinite().all() for p in weights):
            why = f": the weights of `{name}` are not finite, as of a training that has diverged"
            break
    raise ValueError(f"{what} are not finite for {broken} of {len(values)} images{why}.")


def redrawing_seed(generator: torch.Generator) -> int | None:
    """The int64 that makes `generator` anew, or None if it has been drawn from or is no CPU generator."""
    if generator.device.type != "cpu":
        return None
    fresh = torch.Generator("cpu").manual_seed(generator.initial_seed())
    if not torch.equal(fresh.get_state(), generator.get_state()):
        return None
    return (generator.initial_seed() + 2**63) % 2**64 - 2**63  # torch tells a seed of -1 as 2**64 - 1


class MinimPipeline(
    DiffusionPipeline,
    StableDiffusionMixin,
    TextualInversionLoaderMixin,
    LoraLoading,
    FromSingleFileMixin,
):
    r"""
    Pipeline for medical images from a modality and a sentence. Works like [`StableDiffusionPipeline`], whose
    checkpoints (1.x and 2.x) load too, as base models.

    The pipeline inherits the following loading methods:
        - [`~loaders.TextualInversionLoaderMixin.load_textual_inversion`] for loading textual inversion embeddings
        - [`~LoraLoading.load_lora_weights`] for loading LoRA weights, of diffusers, kohya or PEFT
        - [`~LoraLoading.save_lora_weights`] for saving LoRA weights
        - [`~loaders.FromSingleFileMixin.from_single_file`] for loading `.ckpt` files

    One call at a time: calls from several threads wait for each other, also where pipelines share components, as after
    `from_pipe`. To draw in several threads at once, give each a `copy.deepcopy(pipe)`.

    `MinimPipeline.from_pipe(pipe)` makes a second one of the same components and settings; `pipe.components` are the
    parts alone, without modalities and defaults.

    Args:
        vae ([`AutoencoderKL`]): decodes latents (N, C, H/8, W/8) to images (N, 3, H, W) in [-1, 1].
        text_encoder ([`~transformers.CLIPTextModel`]): encodes the modality's token and the prompt.
        tokenizer ([`~transformers.CLIPTokenizer`]): holds the modalities' tokens as special tokens.
        unet ([`UNet2DConditionModel`]): denoises the latents.
        scheduler ([`SchedulerMixin`]): one of DDIM, DDPM, DPM-Solver++ (multistep), Euler, Euler ancestral and UniPC;
            for a model with a non-zero terminal SNR any other of Stable Diffusion's as well.
        filter_head ([`FilterHead`]): rates candidates on their way and at the end; `None` for none. It has no default
            here because `DiffusionPipeline.from_pretrained(..., filter_head=None)` leaves out only what has none.
        modalities: ids of the modalities trained, a list or, as `model_index.json` has it, one string with spaces
            between. `None` for a base model, which takes any known modality.
        findings: the findings learned, by modality id.
        num_inference_steps: default of the call's argument; saved with the model, as are the next four.
        guidance_scale: likewise.
        guidance_rescale: likewise.
        guidance_interval: likewise.
        num_candidates: likewise.
        zero_terminal_snr: whether the model's noise schedule ends in pure noise. Read from `scheduler` if not given,
            and kept when the scheduler is swapped.
        custom_modalities: by id the definitions of modalities that are not in the package's table, as
            `register_modality` takes them. They are registered; those of `modalities` are added and saved.
        bare_prompts: whether the text encoder is given the prompt alone, without the modality: for a U-Net that was
            trained on captions as they stand.
        weights_license: the license of what the weights were made from, as `licenses.license_of` gives it; saved.
            Without it, that of the folder that the pipeline was loaded from.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components = ["filter_head"]
    # It is needed at many steps, and so small that it may stay where it is.
    _exclude_from_cpu_offload = ["filter_head"]
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        filter_head: FilterHead | None,
        modalities: list[str] | str | None = None,
        findings: dict[str, list[str]] | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        guidance_interval: list[float] | tuple[float, float] = (0.0, 1.0),
        num_candidates: int = 1,
        zero_terminal_snr: bool | None = None,
        custom_modalities: dict[str, dict] | None = None,
        bare_prompts: bool = False,
        weights_license: dict[str, str] | None = None,
    ):
        super().__init__()
        if zero_terminal_snr is None:
            zero_terminal_snr = scheduler is not None and scheduler.config.get("rescale_betas_zero_snr", False)
        if scheduler is not None:
            keep_from_clipping(scheduler)
        if isinstance(modalities, str):
            modalities = modalities.split()
        if not modalities and tokenizer is not None and modality_tokens(tokenizer):
            logger.warning(
                f"This pipeline is made without `modalities`, but its tokenizer knows"
                f" {', '.join(modality_tokens(tokenizer))}: `pipe.components` hold neither the modalities trained nor"
                " the model's defaults of steps, guidance and candidates. `MinimPipeline.from_pipe(pipe)` keeps them."
            )
        register_definitions(custom_modalities or {})
        custom_modalities = {**(custom_modalities or {}), **custom_definitions(modalities or [])}
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            filter_head=filter_head,
        )
        self.register_to_config(
            modalities=modalities,
            findings=findings,
            num_inference_steps=num_inference_steps,
            guidance_scale=float(guidance_scale),
            guidance_rescale=float(guidance_rescale),
            guidance_interval=[float(fraction) for fraction in guidance_interval],
            num_candidates=num_candidates,
            zero_terminal_snr=zero_terminal_snr,
            custom_modalities=custom_modalities or None,
            bare_prompts=bare_prompts,
            weights_license=weights_license,
        )
        self.vae_scale_factor = 2 ** (len(self.vae.config.block_out_channels) - 1) if getattr(self, "vae", None) else 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        if filter_head is not None:
            self.check_filter_head()

    def __setattr__(self, name: str, value: Any):
        super().__setattr__(name, value)
        # diffusers goes on taking for absent what was absent once, and would save the pipeline without it.
        if name == "filter_head" and value is not None and self.config.get(name, (FILTER_LIBRARY,))[0] is None:
            self.register_to_config(filter_head=(FILTER_LIBRARY, FilterHead.__name__))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """As [`DiffusionPipeline.from_pretrained`], but everything is fp32 unless `dtype` says otherwise.

        diffusers alone would load a text encoder in the dtype of its files and the rest in fp32.
        """
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
            kwargs["dtype"] = torch.float32
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @property
    def weights_license(self) -> dict[str, str] | None:
        """The license of what the weights were made from: the config's, or that of the folder they were loaded from.

        What lies on the Hub has it in its config, if it was published by this class.
        """
        origin = str(self.config.get("_name_or_path") or "")
        return self.config.weights_license or (license_of(origin) if os.path.isdir(origin) else None)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs):
        """As [`DiffusionPipeline.from_pipe`], but in the dtype of `pipeline`, whose components it shares.

        diffusers alone would bring both to fp32. Without a filter head if `pipeline`, as Stable Diffusion, has none.
        """
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
            kwargs["dtype"] = (getattr(pipeline, "unet", None) or pipeline).dtype  # a filter head is fp32 always
        if "filter_head" not in pipeline.components:
            kwargs.setdefault("filter_head", None)
        return super().from_pipe(pipeline, **kwargs)

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **kwargs):
        """As [`ConfigMixin.extract_init_dict`], but the filter head's class is always the one this pipeline knows.

        Also where another version of this code has been loaded in the same process.
        """
        init_dict, unused_kwargs, hidden_config_dict = super().extract_init_dict(config_dict, **kwargs)
        if "filter_head" in init_dict and init_dict["filter_head"][0] is not None:
            init_dict["filter_head"] = (FILTER_LIBRARY, FilterHead.__name__)
        return init_dict, unused_kwargs, hidden_config_dict

    def save_config(self, save_directory: str | os.PathLike, **kwargs):
        """Writes `model_index.json` and the code, and takes this machine's paths out of all configs.

        The code is for those who load the model without the package. `save_pretrained` calls this after it has
        written the components and before it uploads them.
        """
        super().save_config(save_directory, **kwargs)
        folder = Path(save_directory)
        (folder / "pipeline.py").write_text(source_code(), encoding="utf-8")
        if self.filter_head is not None and (folder / "filter_head").is_dir():
            (folder / "filter_head" / "minim_filter.py").write_text(source_code(), encoding="utf-8")
        components = [path for name in self.components for path in folder.glob(f"{name}/*config.json")]
        for path in [folder / self.config_name, *components]:
            config = json.loads(path.read_text(encoding="utf-8"))
            config.pop("_name_or_path", None)
            config.pop("name_or_path", None)
            if path.name == self.config_name and self.filter_head is not None:
                config["filter_head"] = ["minim_filter", "FilterHead"]  # whatever the module is called here
            if path.name == self.config_name and config["modalities"] is not None:
                # diffusers takes a list of strings for a component, and then refuses to download the model.
                config["modalities"] = " ".join(config["modalities"])
            if path.name == self.config_name:
                config["weights_license"] = self.weights_license
            for name in ("custom_modalities", "bare_prompts", "weights_license"):
                if path.name == self.config_name and not config[name]:
                    del config[name]
            if path.parent.name == "scheduler" and "clip_sample" not in settings_of(self.scheduler):
                config["clip_sample"] = False  # as `keep_from_clipping`, for a scheduler that was swapped in
            if path.parent.name == "text_encoder":
                # transformers loads in the dtype that is written here, diffusers in fp32 whatever the files hold.
                config["dtype"] = "float32"
            path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def push_to_hub(self, repo_id: str, **kwargs) -> str:
        """Publishes the model with its card, code, fp16 variant and sample images: as `train/push_to_hub.py` does.

        See `minim_pipeline.publishing.publish` for the arguments. Where the package is not installed, diffusers' own
        [`~DiffusionPipeline.push_to_hub`] uploads weights and code, with a bare card.
        """
        if importlib.util.find_spec("minim_pipeline") is None:
            return super().push_to_hub(repo_id, **kwargs)
        return importlib.import_module("minim_pipeline.publishing").publish(self, repo_id, **kwargs)

    def enable_vae_slicing(self):
        """Decodes one image at a time, for less memory."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self):
        self.vae.disable_slicing()

    def enable_vae_tiling(self):
        """Decodes large images tile by tile, for less memory."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self):
        self.vae.disable_tiling()

    def check_filter_head(self):
        """Raises ValueError if the filter head was trained for another U-Net, autoencoder or tokenizer.

        Tokens that the tokenizer has got since, as by a textual inversion, are those that the head does not read.
        """
        head, pairs = self.filter_head.config, []
        if self.unet is not None:
            pairs.append(("latent channels", head.in_channels, self.unet.config.in_channels))
        if self.vae is not None:
            pairs.append(("latent scale", head.latent_scale, self.vae.config.scaling_factor))
        if self.tokenizer is not None and len(self.tokenizer) < head.vocab_size:
            pairs.append(("tokens", head.vocab_size, len(self.tokenizer)))
        for name, of_head, of_pipeline in pairs:
            if of_head != of_pipeline:
                raise ValueError(
                    f"This filter head does not fit: it was trained for {of_head} {name}, the pipeline has"
                    f" {of_pipeline}. Load the pipeline with `filter_head=None`, or train a head for it."
                )

    @property
    def learned_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images that the U-Net has learned."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.vae_scale_factor, width * self.vae_scale_factor

    def tell_what_is_not_learned(self, height: int, width: int):
        """Warns once of a size, and of a model, that has not learned what it is asked for."""
        if (height, width) != self.learned_size:
            learned = "{} x {}".format(*self.learned_size)
            warn_once(
                f"{height} x {width} (height x width) is no size that this model has learned, which is {learned}:"
                " expect organs drawn twice, or stretched."
            )
        if not self.config.modalities:
            warn_once(
                "This model names no modality that it has learned: what it draws need not be what `modality` says."
            )

    def check_inputs(
        self,
        prompt,
        modality,
        height,
        width,
        num_inference_steps,
        num_images_per_prompt,
        num_candidates=None,
        max_rounds=1,
        use_filter=None,
        negative_prompt=None,
        prompt_embeds=None,
        negative_prompt_embeds=None,
        generator=None,
        seeds=None,
        latents=None,
        output_type="pil",
        callback_on_step_end_tensor_inputs=None,
        guidance_interval=(0.0, 1.0),
        filter_threshold=None,
        guidance_scale=1.0,
        guidance_rescale=0.0,
        eta=0.0,
        timesteps=None,
        sigmas=None,
        clip_skip=None,
        cross_attention_kwargs=None,
        callback_on_step_end=None,
        return_dict=True,
        reject_copies=True,
    ):
        """Raises ValueError for anything the call cannot work with, before any work is done."""
        check_counts(
            num_inference_steps=num_inference_steps,
            num_images_per_prompt=num_images_per_prompt,
            num_candidates=self.config.num_candidates if num_candidates is None else num_candidates,
            max_rounds=max_rounds,
        )
        for name, size in (("height", height), ("width", width)):
            if not is_whole(size) or size < 1 or size % self.vae_scale_factor:
                raise ValueError(f"`{name}` has to be a positive multiple of {self.vae_scale_factor}, got {size!r}.")
        layers = self.text_encoder.config.num_hidden_layers if self.text_encoder is not None else 0
        check_numbers(guidance_scale, guidance_rescale, guidance_interval, eta, clip_skip, layers)
        check_threshold(filter_threshold)
        check_steps(self.scheduler, timesteps, sigmas)
        check_attention_arguments(cross_attention_kwargs)
        if not isinstance(output_type, str) or output_type not in OUTPUT_TYPES:
            raise ValueError(
                f"`output_type` has to be one of {', '.join(map(repr, OUTPUT_TYPES))}, got {output_type!r}."
            )
        check_flags(return_dict=return_dict, reject_copies=reject_copies)
        check_kinds({"use_filter": (use_filter, use_filter is None or isinstance(use_filter, bool), "True or False")})
        check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)

        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("Pass exactly one of `prompt` and `prompt_embeds`.")
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise ValueError("Pass `negative_prompt` or `negative_prompt_embeds`, not both.")
        hidden = self.unet.config.cross_attention_dim
        hidden = hidden if isinstance(hidden, int) else None  # some have a number for each block
        if prompt is None:
            check_tensor("prompt_embeds", prompt_embeds, (None, None, hidden))
            batch_size = prompt_embeds.shape[0]
        else:
            batch_size = len(self.prompt_list(prompt))
        if negative_prompt_embeds is not None:
            length = None if prompt_embeds is None else prompt_embeds.shape[1]
            check_tensor("negative_prompt_embeds", negative_prompt_embeds, (batch_size, length, hidden))
        self.resolve_prompts(prompt, modality, batch_size)
        texts = (
            negative_prompt
            if isinstance(negative_prompt, (list, tuple))
            else ["" if negative_prompt is None else negative_prompt]
        )
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"`negative_prompt` has to be a string or a list of strings, got {shown(negative_prompt)}."
            )
        if isinstance(negative_prompt, (list, tuple)) and len(negative_prompt) != batch_size:
            raise ValueError(
                f"`negative_prompt` has {len(negative_prompt)} entries for {batch_size} prompts: {negative_prompt!r}."
            )
        for text in [negative_prompt] if isinstance(negative_prompt, str) else negative_prompt or []:
            check_caption(text)

        num_images = batch_size * num_images_per_prompt
        if seeds is not None:
            if generator is not None or latents is not None:
                raise ValueError("`seeds` replaces `generator` and `latents`; pass only one of the three.")
            check_seeds(seeds, num_images)
        check_generator(generator, num_images)
        if latents is not None:
            rows, columns = height // self.vae_scale_factor, width // self.vae_scale_factor
            check_tensor("latents", latents, (num_images, self.unet.config.in_channels, rows, columns))

        why = None
        if self.filter_head is None:
            why = "and this pipeline has no filter head"
        elif use_filter is False:
            why = "but `use_filter=False`"
        elif prompt is None:
            why = "which reads the prompt's words: pass `prompt`"
        elif output_type == "latent":
            why = "which output_type='latent' bypasses"
        wishes = {"num_candidates": num_candidates, "max_rounds": max_rounds, "filter_threshold": filter_threshold}
        check_wishes(wishes | {"use_filter": use_filter or None}, why, {"seeds": seeds, "latents": latents})

    @staticmethod
    def prompt_list(prompt: str | list[str]) -> list[str]:
        """The prompts as a list; ValueError if they are not text."""
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) for p in prompts):
            raise ValueError(f"`prompt` has to be a string or a list of strings, got {shown(prompt)}.")
        return prompts

    def resolve_prompts(
        self, prompt: str | list[str] | None, modality: str | list[str] | None, batch_size: int
    ) -> tuple[list[str] | None, list[Modality]]:
        """The prompts without MINIM's "OCT: " in front, and the modality of each.

        Raises:
            ValueError: a prompt is empty, or its modality is missing, unknown, ambiguous, not trained, or another one
                than its prefix says; or there are not as many modalities as prompts.
        """
        trained = self.config.modalities or None
        names = list(modality) if isinstance(modality, (list, tuple)) else [modality] * batch_size
        if len(names) != batch_size:
            raise ValueError(f"`modality` has {len(names)} entries for {batch_size} prompts: {modality!r}.")
        if prompt is None:
            if modality is None:
                raise ValueError("`prompt_embeds` need `modality`: it decides how the image is decoded.")
            return None, [resolve_modality(name, trained) for name in names]

        prompts, modalities = [], []
        for text, name in zip([prompt] if isinstance(prompt, str) else prompt, names):
            prefix, rest = split_prefix(text, trained)
            if name is None and prefix is None:
                allowed = ", ".join(map(repr, trained)) if trained else "see `minim_pipeline.MODALITIES`"
                raise ValueError(
                    f"`modality` is missing for {text!r}: pass `modality=` ({allowed}), or begin the prompt with it,"
                    ' as in "OCT: macular edema".'
                )
            resolved = resolve_modality(prefix if name is None else name, trained)
            if prefix is not None and prefix.lower() in AMBIGUOUS and name is not None:
                rest = text  # "CT: ..." beside modality="chest_ct" is part of the sentence
            elif prefix is not None and resolve_modality(prefix) != resolved:
                raise ValueError(f"The prompt {text!r} begins with {prefix!r}, but `modality` is {name!r}.")
            if not rest.strip():
                raise ValueError(f"`prompt` is empty: {text!r}.")
            check_caption(rest)
            if self.config.bare_prompts and name is not None:
                rest = text  # as it stands
            prompts.append(rest.strip())
            modalities.append(resolved)
        return prompts, modalities

    @in_turn
    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
        modality: str | list[str] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encodes the modalities' tokens with the prompts, and for guidance the tokens with the negative prompts.

        Arguments as in `__call__`; embeddings that are passed are only repeated for `num_images_per_prompt`. Needs
        nothing of the pipeline but tokenizer and text encoder.

        Returns:
            Two tensors (N * num_images_per_prompt, L, hidden), for the prompts and for the negative side; the latter
            is None without guidance.
        """
        device = device or self._execution_device
        if lora_scale is not None:
            # set lora scale so that the LoRA function of the text encoder can correctly access it
            self._lora_scale = lora_scale
            if self.text_encoder is not None:
                scale_lora_layers(self.text_encoder, lora_scale)

        if prompt is None:
            batch_size = prompt_embeds.shape[0]
        else:
            batch_size = 1 if isinstance(prompt, str) else len(prompt)
        if prompt_embeds is None or (do_classifier_free_guidance and negative_prompt_embeds is None):
            prompts, modalities = self.resolve_prompts(prompt, modality, batch_size)
        if prompt_embeds is None:
            bare = self.config.bare_prompts
            texts = prompts if bare else [prompt_text(p, m, self.tokenizer) for p, m in zip(prompts, modalities)]
            prompt_embeds = self.encode_texts(texts, device, clip_skip)
        if do_classifier_free_guidance and negative_prompt_embeds is None:
            negatives = (
                [negative_prompt or ""] * batch_size
                if not isinstance(negative_prompt, (list, tuple))
                else negative_prompt
            )
            bare = self.config.bare_prompts
            texts = negatives if bare else [negative_text(n, m, self.tokenizer) for n, m in zip(negatives, modalities)]
            negative_prompt_embeds = self.encode_texts(texts, device, clip_skip, max_length=prompt_embeds.shape[1])

        # The U-Net's dtype wherever there is one: a text encoder may run in another.
        dtype = next((m.dtype for m in (self.unet, self.text_encoder) if m is not None), prompt_embeds.dtype)
        prompt_embeds = prompt_embeds.to(device, dtype).repeat_interleave(num_images_per_prompt, dim=0)
        if do_classifier_free_guidance:
            negative_prompt_embeds = negative_prompt_embeds.to(device, dtype)
            negative_prompt_embeds = negative_prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0)
        else:
            negative_prompt_embeds = None

        if lora_scale is not None and self.text_encoder is not None:
            unscale_lora_layers(self.text_encoder, lora_scale)
        return prompt_embeds, negative_prompt_embeds

    def encode_texts(
        self, texts: list[str], device: torch.device, clip_skip: int | None = None, max_length: int | None = None
    ) -> torch.Tensor:
        """The text encoder's hidden states (N, L, hidden) of texts as `prompt_text` makes them.

        What is beyond the token limit is cut, with a warning that quotes it.
        """
        texts = self.maybe_convert_prompt(texts, self.tokenizer)
        max_length = max_length or self.tokenizer.model_max_length
        inputs = self.tokenizer(
            texts, padding="max_length", max_length=max_length, truncation=True, return_tensors="pt"
        )
        # The last id of the uncut sequence is the end-of-text token.
        cut = [ids[max_length - 1 : -1] for ids in self.tokenizer(texts).input_ids]
        if any(cut):
            logger.warning(
                "The following part of your input was truncated because the text encoder can only handle sequences up"
                f" to {max_length} tokens: {self.tokenizer.batch_decode([ids for ids in cut if ids])}"
            )

        input_ids = inputs.input_ids.to(device)  # (N, L)
        use_mask = getattr(self.text_encoder.config, "use_attention_mask", False)
        attention_mask = inputs.attention_mask.to(device) if use_mask else None
        if clip_skip is None:
            return self.text_encoder(input_ids, attention_mask=attention_mask).last_hidden_state
        output = self.text_encoder(input_ids, attention_mask=attention_mask, output_hidden_states=True)
        # The final LayerNorm belongs to the last layer's output, and is needed after an earlier one as well. Newer
        # versions of transformers have it one level up.
        text_model = getattr(self.text_encoder, "text_model", self.text_encoder)
        return text_model.final_layer_norm(output.hidden_states[-(clip_skip + 1)])

    def prepare_generators(
        self,
        num_images: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
        seeds: list[int] | None = None,
        latents: torch.Tensor | None = None,
    ) -> tuple[torch.Generator | list[torch.Generator] | None, list[int | None]]:
        """Where the noise comes from, and for each image the seed that draws it again, if there is one.

        Each seed makes a CPU generator of its own, so that an image depends neither on the rest of the batch nor on
        the device. With neither `generator` nor `latents`, seeds are drawn from torch's global generator.
        """
        if seeds is None and generator is None and latents is None:
            seeds = torch.randint(2**63 - 1, (num_images,)).tolist()
        if seeds is not None:
            seeds = [int(seed) for seed in seeds]
            return [torch.Generator("cpu").manual_seed(seed) for seed in seeds], seeds

        generators = generator if isinstance(generator, list) else [generator]
        if latents is not None or len(set(map(id, generators))) != num_images:
            return generator, [None] * num_images
        return generator, [redrawing_seed(g) for g in generators]

    def prepare_latents(self, batch_size, num_channels_latents, height, width, dtype, device, generator, latents=None):
        """Noise (N, C, H/8, W/8) as the scheduler wants it to start from."""
        shape = (batch_size, num_channels_latents, height // self.vae_scale_factor, width // self.vae_scale_factor)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        else:
            latents = latents.to(device, dtype)
        # scale the initial noise by the standard deviation required by the scheduler
        return latents * self.scheduler.init_noise_sigma

    def prepare_extra_step_kwargs(self, generator, eta) -> dict[str, Any]:
        """`eta` (DDIM only) and `generator` for those schedulers whose `step` takes them."""
        parameters = inspect.signature(self.scheduler.step).parameters
        return {k: v for k, v in (("eta", eta), ("generator", generator)) if k in parameters}

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Latents (N, C, H/8, W/8), scaled as the U-Net takes them, of images (N, 3, H, W) in [-1, 1]."""
        check_finite(pixels, "Pixels", {})
        upcast = self.vae.dtype == torch.float16 and self.vae.config.force_upcast
        if upcast:
            self.vae.float()
        latents = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.mode().float()
        if upcast:
            self.vae.half()
        check_finite(latents, "Encoded latents", {"vae": self.vae})
        return latents * self.vae.config.scaling_factor

    def decode_latents(self, latents: torch.Tensor, modalities: list[Modality]) -> torch.Tensor:
        """Images (N, 3, H, W) in fp32, about [-1, 1]; those of grey modalities get three equal channels."""
        # An autoencoder that overflows in fp16 says so in its config.
        upcast = self.vae.dtype == torch.float16 and self.vae.config.force_upcast
        if upcast:
            self.vae.float()
        images = self.vae.decode(latents.to(self.vae.dtype) / self.vae.config.scaling_factor, return_dict=False)[0]
        if upcast:
            self.vae.half()
        images = images.float()
        check_finite(images, "Decoded pixels", {"vae": self.vae})
        grey = torch.tensor([m.grey for m in modalities], device=images.device).view(-1, 1, 1, 1)
        return torch.where(grey, images.mean(1, keepdim=True), images)

    @torch.no_grad()
    @in_turn
    def score(
        self,
        images,
        prompt: str | list[str],
        modality: str | list[str] | None = None,
        reject_copies: bool = True,
        filter_threshold: float | None = None,
        fit: str = "stretch",
        window: tuple[float, float] | None = None,
    ) -> MinimScores:
        """The filter's ratings of any images, real ones too.

        Args:
            images: one image or several, as `PIL.Image`, `np.ndarray` (N, H, W, 3) in [0, 1] or `torch.Tensor`
                (N, 3, H, W) in [0, 1]. They are rated as pictures of 8 bits, and at the size that the U-Net has
                learned. `PIL.Image`s of any mode are read as files are, with a warning that says what was done;
                those of more than 8 bits are scaled alike.
            prompt: what each is to show, one sentence for all or a list.
            modality: as for `__call__`.
            reject_copies: `False` also accepts copies of training images, and those images themselves.
            filter_threshold: as for `__call__`.
            fit: what becomes of an image of other proportions: `"stretch"`, `"crop"` or `"pad"`.
            window: the values that become black and white in a `PIL.Image` of more than 8 bits; `None` finds out.

        Raises:
            ValueError: the pipeline has no filter head, an argument is not possible, as for `__call__`, or what the
                values of an image mean cannot be known.
        """
        if self.filter_head is None:
            raise ValueError("This pipeline has no filter head to score with.")
        check_flags(reject_copies=reject_copies)
        check_threshold(filter_threshold)
        pictures = to_pictures(images)
        prompts = [prompt] * len(pictures) if isinstance(prompt, str) else self.prompt_list(prompt)
        if len(prompts) != len(pictures):
            raise ValueError(f"`prompt` has {len(prompts)} entries for {len(pictures)} images.")
        prompts, modalities = self.resolve_prompts(prompts, modality, len(prompts))
        height, width = self.learned_size
        pictures, changes = convert_pictures(pictures, modalities, (width, height), fit, window)
        for change in changes:
            logger.warning(change)
        rated = self.rate_pictures(pictures, prompts, modalities, self._execution_device)
        self.maybe_free_model_hooks()
        scores, accepted, reasons = self.judge(rated, modalities, filter_threshold, reject_copies)
        return MinimScores(scores.tolist(), accepted.tolist(), reasons, rated.quality.tolist(), rated.finding.tolist())

    def rate_pictures(
        self, pictures: list[PIL.Image.Image], prompts: list[str], modalities: list[Modality], device: torch.device
    ) -> FilterHeadOutput:
        """The filter head's ratings of finished pictures, which are brought to the size that it has learned."""
        pixels = self.image_processor.preprocess(pictures, *self.learned_size)  # (N, 3, H, W) in [-1, 1]
        funnel = self.prepare_funnel(prompts, modalities, list(range(len(prompts))), 1, device)
        return funnel.rate(self.encode_images(pixels.to(device)))

    def prepare_funnel(
        self,
        prompts: list[str],
        modalities: list[Modality],
        wanted: list[int],
        candidates: int,
        device: torch.device,
    ) -> Funnel:
        """The funnel of a round: `candidates` for each of the `wanted` prompts, numbered as they stand there."""
        texts = [prompt_text(prompts[i], modalities[i], self.tokenizer) for i in wanted]
        length = self.filter_head.config.max_length
        ids = self.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        # What was added to the tokenizer since, as by a textual inversion, says nothing to the head.
        known = ids.input_ids < self.filter_head.config.vocab_size
        ids = torch.where(known, ids.input_ids, self.filter_head.config.pad_token_id).to(device)
        image = torch.arange(len(wanted), device=device).repeat_interleave(candidates)
        stages = plan_stages(self.filter_head.config.stages, candidates)
        return Funnel(self.filter_head, self.filter_head.encode_text(ids)[image], image, stages)

    def judge(
        self,
        rated: FilterHeadOutput,
        modalities: list[Modality],
        filter_threshold: float | None = None,
        reject_copies: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor, list[str | None]]:
        """Scores (N,) in [1, 3]; bool (N,), whether finished images are accepted; and if not, why not.

        Accepted is an image whose score and finding reach the thresholds of its modality, and that is no copy of a
        training image. `filter_threshold` takes the place of the score's.
        """
        calibration = self.filter_head.config.calibration or {}
        for name in dict.fromkeys(m.id for m in modalities):
            if name not in calibration:
                warn_once(
                    f"The filter's thresholds are not calibrated for {name}; those taken are {UNCALIBRATED['score']}"
                    f" of 3 for the score and {UNCALIBRATED['finding']} for the finding."
                )
            elif calibration[name].get("ratings", 0) < FEWEST_RATINGS:
                warn_once(
                    f"The filter's thresholds for {name} are not calibrated by people, who rated fewer than"
                    f" {FEWEST_RATINGS} images of it: what is good there follows a rubric."
                )
        thresholds = [calibration.get(m.id, UNCALIBRATED) for m in modalities]
        scores = combine(rated.quality, rated.finding)
        least, found = (scores.new_tensor([t[name] for t in thresholds]) for name in ("score", "finding"))
        if filter_threshold is not None:
            least = torch.full_like(scores, filter_threshold)
        reason = torch.where(rated.finding < found, REASONS.index("finding"), weaker(rated))
        passed = (scores >= least) & (rated.finding >= found)
        if reject_copies:
            near = torch.tensor([t.get("copy", -1) for t in thresholds], device=scores.device)
            copies = distances(rated.code, self.filter_head.fingerprints) <= near
            reason, passed = torch.where(copies, REASONS.index("copy"), reason), passed & ~copies
        return scores, passed, [None if p else REASONS[r] for p, r in zip(passed.tolist(), reason.tolist())]

    def draw_seeds(
        self, wanted: list[int], candidates: int, generator: torch.Generator | list[torch.Generator] | None
    ) -> list[int]:
        """One int64 for each candidate of each wanted image, from the image's generator, or the one for all."""
        seeds = []
        for i in wanted:
            source = generator[i] if isinstance(generator, list) else generator
            device = "cpu" if source is None else source.device
            seeds += torch.randint(2**63 - 1, (candidates,), generator=source, device=device).tolist()
        return seeds

    def denoise(
        self,
        latents: torch.Tensor,
        prompt_embeds: torch.Tensor,
        negative_prompt_embeds: torch.Tensor | None,
        timesteps: torch.Tensor,
        num_inference_steps: int,
        guidance_interval: tuple[float, float],
        extra_step_kwargs: dict[str, Any],
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        funnel: Funnel | None = None,
    ) -> torch.Tensor:
        """From noise to latents (N, C, h, w), or to those that the funnel left of them.

        With guidance `prompt_embeds` holds the negative side first.
        """
        num_warmup_steps = len(timesteps) - num_inference_steps * self.scheduler.order
        self._num_timesteps = len(timesteps)
        guided_from, guided_to = (fraction * len(timesteps) for fraction in guidance_interval)
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue

                # expand the latents if we are doing classifier free guidance
                guide = self.do_classifier_free_guidance and guided_from <= i < guided_to
                latent_model_input = torch.cat([latents] * 2) if guide else latents
                latent_model_input = self.scheduler.scale_model_input(latent_model_input, t)

                # predict the noise residual
                noise_pred = self.unet(
                    latent_model_input,
                    t,
                    # outside of the guidance interval the half without the negative side
                    encoder_hidden_states=prompt_embeds[-len(latent_model_input) :],
                    cross_attention_kwargs=self.cross_attention_kwargs,
                    return_dict=False,
                )[0]
                noise_pred_text = noise_pred[-len(latents) :]

                # perform guidance
                if guide:
                    noise_pred_uncond = noise_pred[: len(latents)]
                    noise_pred = noise_pred_uncond + self.guidance_scale * (noise_pred_text - noise_pred_uncond)
                    if funnel is not None:
                        funnel.add_guidance(noise_pred_text, noise_pred_uncond)
                    if self.guidance_rescale > 0.0:
                        noise_pred = rescale_noise_cfg(noise_pred, noise_pred_text, self.guidance_rescale)

                # drop the worst candidates, and all that belongs to them
                count = funnel.due(self.scheduler, t) if funnel is not None else None
                if count is not None:
                    seen = latent_model_input[-len(latents) :]
                    keep = funnel.prune(count, seen, noise_pred_text, self.scheduler, t)
                    select_state(self.scheduler, keep, latents.shape)
                    prompt_embeds = torch.cat([half[keep] for half in prompt_embeds.split(len(latents))])
                    if negative_prompt_embeds is not None:
                        negative_prompt_embeds = negative_prompt_embeds[keep]
                    if isinstance(extra_step_kwargs.get("generator"), list):
                        generators = [extra_step_kwargs["generator"][k] for k in keep.tolist()]
                        extra_step_kwargs = {**extra_step_kwargs, "generator": generators}
                    latents, noise_pred = latents[keep], noise_pred[keep]

                # compute the previous noisy sample x_t -> x_t-1
                latents = self.scheduler.step(noise_pred, t, latents, **extra_step_kwargs, return_dict=False)[0]

                if callback_on_step_end is not None:
                    callback_kwargs = {}
                    for k in callback_on_step_end_tensor_inputs:
                        callback_kwargs[k] = locals()[k]
                    callback_outputs = callback_on_step_end(self, i, t, callback_kwargs)
                    if not isinstance(callback_outputs, dict):
                        raise ValueError(f"`callback_on_step_end` has to return a dict, got {callback_outputs!r}.")

                    count, guided = len(latents), self.do_classifier_free_guidance
                    latents = same_shape("latents", callback_outputs.pop("latents", latents), latents)
                    prompt_embeds = callback_embeds(
                        callback_outputs.pop("prompt_embeds", prompt_embeds), prompt_embeds, count, guided
                    )
                    if negative_prompt_embeds is not None:
                        negative_prompt_embeds = same_shape(
                            "negative_prompt_embeds",
                            callback_outputs.pop("negative_prompt_embeds", negative_prompt_embeds),
                            negative_prompt_embeds,
                        )

                if i == len(timesteps) - 1 or ((i + 1) > num_warmup_steps and (i + 1) % self.scheduler.order == 0):
                    progress_bar.update()
        return latents

    @property
    def guidance_scale(self):
        return self._guidance_scale

    @property
    def guidance_rescale(self):
        return self._guidance_rescale

    @property
    def clip_skip(self):
        return self._clip_skip

    @property
    def do_classifier_free_guidance(self):
        return self._guidance_scale > 1

    @property
    def cross_attention_kwargs(self):
        return self._cross_attention_kwargs

    @property
    def num_timesteps(self):
        return self._num_timesteps

    @property
    def interrupt(self):
        return self._interrupt

    @torch.no_grad()
    @draws_in_turn
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        modality: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | PipelineCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        num_candidates: int | None = None,
        max_rounds: int = 1,
        use_filter: bool | None = None,
        filter_threshold: float | None = None,
        reject_copies: bool = True,
        seeds: list[int] | None = None,
    ) -> MinimPipelineOutput | tuple:
        r"""
        Generates `len(prompt) * num_images_per_prompt` images.

        Where an argument's default is the model's, it is a number saved in the model's own config.

        Args:
            prompt: what the images show, one sentence or a list. May begin with the modality as MINIM writes it,
                `"OCT: macular edema"`. Not together with `prompt_embeds`.
            modality: id, name or alias of the modality, one for all prompts or a list. May be left out where the
                prompts begin with it.
            height: in pixels, a multiple of 8; defaults to the U-Net's `sample_size` times 8. Others are warned of:
                the model has not learned them, and draws things twice there.
            width: likewise.
            num_inference_steps: denoising steps; defaults to the model's.
            timesteps: timesteps in descending order instead of the scheduler's own, for schedulers that take them.
            sigmas: likewise with noise levels.
            guidance_scale: weight of classifier-free guidance, off at 1 and below; defaults to the model's.
            negative_prompt: what to lead away from, one text or a list; defaults to the modality's token alone.
            num_images_per_prompt: images for each prompt.
            eta: η of [DDIM](https://huggingface.co/papers/2010.02502), in [0, 1]; other schedulers ignore it.
            generator: one for all images, or a list with one for each. With one for each, an image is the same
                whatever the batch.
            latents: noise (N, C, H/8, W/8) of unit variance instead of drawing it.
            prompt_embeds: embeddings (len(prompt), L, hidden) instead of `prompt`; needs `modality`.
            negative_prompt_embeds: the same for the negative side.
            output_type: `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict: `False` for a plain tuple in the order of [`MinimPipelineOutput`].
            cross_attention_kwargs: passed to the U-Net's attention; `{"scale": s}` weighs a LoRA.
            guidance_rescale: φ of section 3.4 of [Common Diffusion Noise Schedules and Sample Steps are
                Flawed](https://huggingface.co/papers/2305.08891), in [0, 1]; defaults to the model's.
            guidance_interval: from which to which fraction of the steps guidance acts ([Applying Guidance in a
                Limited Interval](https://huggingface.co/papers/2404.07724)); a step without it costs half. Defaults
                to the model's.
            clip_skip: how many of the text encoder's last layers to leave out, on both sides of guidance.
            callback_on_step_end: called after each step as `callback(pipe, step, timestep, tensors)`; tensors in the
                dict it returns replace those of the call. Setting `pipe._interrupt = True` ends the loop. It sees the
                candidates, not the images: all of them at first, fewer from step to step as the filter drops some. It
                is called in the first round only, and what it sets of the call, such as `pipe._guidance_scale`, holds
                for that round: further ones begin as the first did.
            callback_on_step_end_tensor_inputs: which of `latents`, `prompt_embeds` and `negative_prompt_embeds` it
                gets, by default `latents`. As in Stable Diffusion, `prompt_embeds` holds the negative side first.
            num_candidates: candidates for each image, of which the filter chooses; defaults to the model's. More than
                one needs a filter head.
            max_rounds: rounds in which what falls short is drawn again; more than one needs a filter head.
            use_filter: `False` switches the filter off for this call; by default it runs if there is one.
            filter_threshold: score in [1, 3] from which an image is accepted; defaults to that of its modality in the
                filter head's config. The threshold of the finding stays.
            reject_copies: `False` lets the filter accept copies of training images.
            seeds: one int64 for each image, instead of `generator`: `out.seeds` of an earlier call draws its images
                again, in any batch.

        Examples:
            ```py
            >>> from minim_pipeline import EMBEDDED_CHECKPOINT, MinimPipeline

            >>> pipe = MinimPipeline.from_pretrained(EMBEDDED_CHECKPOINT)
            >>> out = pipe("diabetic macular edema", modality="oct", num_images_per_prompt=4)
            >>> again = pipe("diabetic macular edema", modality="oct", seeds=out.seeds[2:3])
            ```

        Returns:
            [`MinimPipelineOutput`], or a tuple of its fields.

        Raises:
            ValueError: an argument is not possible; the message has the value given and those allowed.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        elif callback_on_step_end_tensor_inputs is None:
            callback_on_step_end_tensor_inputs = ["latents"]

        # 0. The model's defaults
        height = self.learned_size[0] if height is None else height
        width = self.learned_size[1] if width is None else width
        num_inference_steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        guidance_interval = self.config.guidance_interval if guidance_interval is None else guidance_interval
        guidance_scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        guidance_rescale = self.config.guidance_rescale if guidance_rescale is None else guidance_rescale

        # 1. Check inputs. Raise error if not correct
        self.check_inputs(
            prompt,
            modality,
            height,
            width,
            num_inference_steps,
            num_images_per_prompt,
            num_candidates,
            max_rounds,
            use_filter,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            generator,
            seeds,
            latents,
            output_type,
            callback_on_step_end_tensor_inputs,
            guidance_interval,
            filter_threshold,
            guidance_scale,
            guidance_rescale,
            eta,
            timesteps,
            sigmas,
            clip_skip,
            cross_attention_kwargs,
            callback_on_step_end,
            return_dict,
            reject_copies,
        )
        check_scheduler(self.scheduler, self.config.zero_terminal_snr)
        self.tell_what_is_not_learned(height, width)

        self._guidance_scale = guidance_scale
        self._guidance_rescale = guidance_rescale
        self._clip_skip = clip_skip
        self._cross_attention_kwargs = cross_attention_kwargs
        self._interrupt = False

        # 2. Define call parameters
        if prompt is None:
            batch_size = prompt_embeds.shape[0]
        else:
            batch_size = 1 if isinstance(prompt, str) else len(prompt)
        num_images = batch_size * num_images_per_prompt
        timesteps_asked = timesteps
        device = self._execution_device
        prompt, modalities = self.resolve_prompts(prompt, modality, batch_size)

        # 3. Encode the prompts
        prompt_embeds, negative_prompt_embeds = self.encode_prompt(
            prompt,
            device,
            num_images_per_prompt,
            self.do_classifier_free_guidance,
            negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            lora_scale=cross_attention_kwargs.get("scale") if cross_attention_kwargs is not None else None,
            clip_skip=clip_skip,
            modality=[m.id for m in modalities],
        )

        # 4. The filter, and how many candidates it chooses from
        prompts = [p for p in prompt for _ in range(num_images_per_prompt)] if prompt is not None else None
        modalities = [m for m in modalities for _ in range(num_images_per_prompt)]
        filtering = (
            self.filter_head is not None and use_filter is not False and prompt is not None and output_type != "latent"
        )
        candidates = self.config.num_candidates if num_candidates is None else num_candidates
        if not filtering or seeds is not None or latents is not None:
            candidates = 1
        choosing = candidates > 1 or max_rounds > 1

        # 5. Rounds of drawing: the first draws everything, further ones what fell short
        wanted, drawn = list(range(num_images)), [0] * num_images
        scores, accepted, chosen = [None] * num_images, [None] * num_images, [None] * num_images
        final = [None] * num_images  # pixels (3, H, W) of each image, without a decoder its latents (C, h, w)
        rejected = [dict.fromkeys(REASONS, 0) if filtering else None for _ in range(num_images)]
        for number in range(max_rounds):
            # What a callback changed, as diffusers' own that end guidance do, was meant for its round
            self._guidance_scale, self._guidance_rescale = guidance_scale, guidance_rescale
            self._cross_attention_kwargs = cross_attention_kwargs
            # A compiled network would be compiled anew for another batch: fewer images are filled up.
            compiled = getattr(self.unet, "_compiled_call_impl", None) is not None
            places = wanted + [wanted[-1]] * (num_images - len(wanted) if compiled else 0)
            slots = [i for i in places for _ in range(candidates)]
            if choosing:
                round_seeds = self.draw_seeds(wanted, candidates, generator)
                round_seeds += round_seeds[-candidates:] * (len(places) - len(wanted))
            else:
                round_seeds = seeds
            timesteps, num_inference_steps = retrieve_timesteps(
                self.scheduler, num_inference_steps, device, timesteps_asked, sigmas
            )
            round_generator, round_seeds = self.prepare_generators(
                len(slots), None if choosing else generator, round_seeds, latents
            )
            noise = self.prepare_latents(
                len(slots),
                self.unet.config.in_channels,
                height,
                width,
                prompt_embeds.dtype,
                device,
                round_generator,
                latents,
            )
            # For classifier free guidance, we need to do two forward passes.
            # Here we concatenate the unconditional and text embeddings into a single batch
            # to avoid doing two forward passes
            guided = self.do_classifier_free_guidance
            negative = negative_prompt_embeds[slots] if guided else None
            embeds = torch.cat([negative, prompt_embeds[slots]]) if guided else prompt_embeds[slots]
            funnel = self.prepare_funnel(prompts, modalities, places, candidates, device) if filtering else None
            result = self.denoise(
                noise,
                embeds,
                negative,
                timesteps,
                num_inference_steps,
                guidance_interval,
                self.prepare_extra_step_kwargs(round_generator, eta),
                callback_on_step_end if number == 0 else None,
                callback_on_step_end_tensor_inputs,
                funnel,
            )
            check_finite(result, "Latents", {"text_encoder": self.text_encoder, "unet": self.unet})
            if not filtering:
                final, chosen, drawn = result, round_seeds, [1] * num_images
                break

            # The best candidate of each image: one that is accepted before one that is not
            rated, left = funnel.rate(result), funnel.alive.tolist()
            kinds = [modalities[slots[k]] for k in left]
            _, passed, reasons = self.judge(rated, kinds, filter_threshold, reject_copies)
            best = funnel.keep(funnel.rank(rated) + 4 * passed, 1).tolist()[: len(wanted)]
            left_places = funnel.image[left].tolist()
            lost = funnel.dropped + [(left_places[k], reason) for k, reason in enumerate(reasons) if k not in best]

            # The filter's word is on the picture, as `score` gives it: latents may promise more than it holds
            kinds = [modalities[i] for i in wanted]
            pixels = self.decode_latents(result[best], kinds)
            pictures = self.image_processor.postprocess(pixels, output_type="pil")
            rated = self.rate_pictures(pictures, [prompts[i] for i in wanted], kinds, device)
            found, passed, reasons = self.judge(rated, kinds, filter_threshold, reject_copies)
            for place, reason in lost + list(enumerate(reasons)):
                if reason and place < len(wanted):
                    rejected[wanted[place]][reason] += 1
            for place, i in enumerate(wanted):
                drawn[i] += candidates
                word = passed[place].item(), found[place].item()
                if final[i] is None or word > (accepted[i], scores[i]):
                    final[i], chosen[i] = pixels[place], round_seeds[left[best[place]]]
                    accepted[i], scores[i] = word
            wanted = [i for i in wanted if not accepted[i]]
            if not wanted or self.interrupt:
                break
        if filtering and wanted:
            logger.warning(
                f"{len(wanted)} of {num_images} images fall short of the filter's thresholds and come back with"
                f" accepted=False: raise `num_candidates` ({candidates}) or `max_rounds` ({max_rounds})."
            )

        # 6. Decode, where the filter has not
        if output_type == "latent":
            images = final
        else:
            images = torch.stack(final) if filtering else self.decode_latents(final, modalities)
            images = self.image_processor.postprocess(images, output_type=output_type)

        # Offload all models
        self.maybe_free_model_hooks()

        output = MinimPipelineOutput(
            images=images,
            scores=scores,
            accepted=accepted,
            seeds=chosen,
            candidates=drawn,
            rejected=rejected,
        )
        return output if return_dict else output.to_tuple()


# `DiffusionPipeline.from_pretrained` looks up the class that a model_index.json names among diffusers' own.
diffusers.MinimPipeline = MinimPipeline
