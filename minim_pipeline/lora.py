"""LoRAs as diffusers loads them, and PEFT's own adapters; a file that fits nothing is an error."""

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from diffusers.utils.hub_utils import _get_model_file
from safetensors import safe_open

from .notices import logger


PEFT_WEIGHTS, PEFT_CONFIG, PEFT_PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
# By these the blocks of a U-Net are told from the layers of a text encoder.
UNET_MODULES = re.compile(r"(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding)\b")
# In the header of a file, beside diffusers' own entries.
TOKENS_KEY = "minim_modality_tokens"
HUB_OPTIONS = ("subfolder", "cache_dir", "force_download", "proxies", "local_files_only", "token", "revision")


def find_file(source: str | os.PathLike, name: str, options: dict) -> Path | None:
    """The file `name` of a folder or a repository on the Hub, or beside the file `source`; None if there is none."""
    source = Path(source).parent if os.path.isfile(source) else source
    chosen = {key: options[key] for key in HUB_OPTIONS if options.get(key) is not None}
    try:
        return Path(_get_model_file(source, weights_name=name, **chosen))
    except OSError:
        return None


def from_peft(state_dict: dict[str, torch.Tensor], config: dict) -> tuple[dict[str, torch.Tensor], dict]:
    """An adapter as PEFT saves it, as what diffusers loads: weights, and the settings of each part.

    Its keys are such as `base_model.model.mid_block.attentions.0....to_q.lora_A.weight`, `config` is its
    `adapter_config.json`. Raises ValueError for an adapter of another kind than LoRA.
    """
    from peft import LoraConfig

    if config.get("peft_type") != "LORA":
        raise ValueError(f"{PEFT_CONFIG} says peft_type={config.get('peft_type')!r}; only 'LORA' can be loaded.")
    known = {field.name for field in dataclasses.fields(LoraConfig)} - {"task_type", "auto_mapping", "peft_type"}
    settings = {key: value for key, value in config.items() if key in known}
    weights: dict[str, torch.Tensor] = {}
    metadata: dict[str, Any] = {}
    for key, value in state_dict.items():
        place = key.removeprefix(PEFT_PREFIX)
        part = "unet" if UNET_MODULES.match(place) else "text_encoder"
        weights[f"{part}.{place}"] = value
        metadata |= {f"{part}.{name}": setting for name, setting in settings.items()}
    return weights, metadata


def modules_of(part: str, state_dict: dict[str, torch.Tensor]) -> list[str]:
    """The modules that the weights of `unet` or `text_encoder` in a LoRA belong to, one for each weight."""
    weights = {key.removeprefix(f"{part}."): value for key, value in state_dict.items() if key.startswith(f"{part}.")}
    if part == "unet" and not any(".lokr_" in key for key in weights):
        weights = weights if "lora_A" in next(iter(weights), "lora_A") else convert_unet_state_dict_to_peft(weights)
    elif part == "text_encoder" and weights:
        weights = convert_state_dict_to_peft(convert_state_dict_to_diffusers(weights))
    return [re.split(r"\.(?:lora|lokr)_", key)[0] for key in weights]


class LoraLoading(StableDiffusionLoraLoaderMixin):
    """[`StableDiffusionLoraLoaderMixin`] that takes PEFT's adapters too, and says what fits the pipeline."""

    @classmethod
    def lora_state_dict(cls, pretrained_model_name_or_path_or_dict, **kwargs):
        """As diffusers', and for a file or folder as `PeftModel.save_pretrained` writes it.

        Raises ValueError for PEFT's weights without the `adapter_config.json` that says how to weigh them, and for an
        adapter of another kind.
        """
        source, options = pretrained_model_name_or_path_or_dict, dict(kwargs)
        state_dict, alphas, metadata = super().lora_state_dict(source, **{**kwargs, "return_lora_metadata": True})
        if any(key.startswith(PEFT_PREFIX) for key in state_dict):
            path = None if isinstance(source, dict) else find_file(source, PEFT_CONFIG, options)
            if path is None:
                raise ValueError(f"PEFT's adapters need the {PEFT_CONFIG} that was saved beside {PEFT_WEIGHTS}.")
            state_dict, metadata = from_peft(state_dict, json.loads(path.read_text(encoding="utf-8")))
        return (state_dict, alphas, metadata) if kwargs.get("return_lora_metadata") else (state_dict, alphas)

    def load_lora_weights(self, pretrained_model_name_or_path_or_dict, adapter_name: str | None = None, **kwargs):
        """As [`StableDiffusionLoraLoaderMixin.load_lora_weights`], from PEFT's adapters too.

        Warns if some of the weights have no place here, and if the LoRA was trained with modality tokens that the
        tokenizer does not know; ValueError if none of the weights has a place in U-Net or text encoder.
        """
        source = pretrained_model_name_or_path_or_dict
        options = {key: value for key, value in kwargs.items() if key not in ("hotswap", "low_cpu_mem_usage")}
        state_dict = self.lora_state_dict(source.copy() if isinstance(source, dict) else source, **options)[0]
        strange = [key for key in state_dict if key.partition(".")[0] not in self._lora_loadable_modules]
        fitting = 0
        for part in self._lora_loadable_modules:
            model = getattr(self, part)
            there = {name for name, _ in model.named_modules()} if model is not None else set()
            for name in modules_of(part, state_dict):
                # The text encoder of newer versions of transformers has its layers one level up.
                if name in there or (part == "text_encoder" and name.removeprefix("text_model.") in there):
                    fitting += 1
                else:
                    strange.append(f"{part}.{name}")
        named = "the weights given" if isinstance(source, dict) else repr(str(source))
        if not fitting:
            raise ValueError(
                f"Nothing of {named} fits this pipeline's U-Net or text encoder: it holds {len(strange)} weights such"
                f" as {', '.join(map(repr, strange[:2])) or 'none'}. Is it a LoRA of another model?"
            )
        if strange:
            logger.warning(
                f"{len(strange)} of {len(strange) + fitting} weights of {named} have no place in this pipeline and are"
                f" left out, such as {strange[0]!r}."
            )
        self.tell_unknown_tokens(source, options)
        super().load_lora_weights(source, adapter_name=adapter_name, **kwargs)

    def tell_unknown_tokens(self, source, options: dict) -> None:
        """Warns if a LoRA's file says that it was trained with modality tokens that are not here."""
        if isinstance(source, dict):
            return
        # As diffusers guesses it: its own name, or whatever lies there.
        folder = Path(source, options.get("subfolder") or "")
        guesses = [LORA_WEIGHT_NAME_SAFE, *(file.name for file in sorted(folder.glob("*.safetensors")))]
        names = [options["weight_name"]] if options.get("weight_name") else guesses
        path = source if os.path.isfile(source) else None
        path = path or next((p for p in (find_file(source, name, options) for name in names) if p), None)
        if path is None or Path(path).suffix != ".safetensors":
            return
        with safe_open(path, framework="pt") as file:
            trained = json.loads((file.metadata() or {}).get(TOKENS_KEY, "[]"))
        known = self.tokenizer.added_tokens_encoder if self.tokenizer is not None else trained
        missing = [token for token in trained if token not in known]
        if missing:
            logger.warning(
                f"{str(source)!r} was trained with the modality tokens {', '.join(missing)}, which this pipeline does"
                " not know: its prompts are other words to the LoRA than those it learned. Load the base that it was"
                " trained on."
            )

    @classmethod
    def save_lora_weights(
        cls, save_directory: str | os.PathLike, *args, modality_tokens: list[str] | None = None, **kwargs
    ):
        """As [`StableDiffusionLoraLoaderMixin.save_lora_weights`].

        Args:
            modality_tokens: those that the prompts of the training began with, see `tokens.modality_tokens`; the file
                says so, and `load_lora_weights` warns where a tokenizer lacks one.
        """
        super().save_lora_weights(save_directory, *args, **kwargs)
        path = Path(save_directory, kwargs.get("weight_name") or LORA_WEIGHT_NAME_SAFE)
        if modality_tokens and path.suffix == ".safetensors" and kwargs.get("is_main_process", True):
            with safe_open(path, framework="pt") as file:
                header = dict(file.metadata() or {})
            weights = safetensors.torch.load(path.read_bytes())
            safetensors.torch.save_file(weights, path, metadata=header | {TOKENS_KEY: json.dumps(modality_tokens)})
