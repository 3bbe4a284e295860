"""What diffusers does not do for this pipeline when it is loaded, saved and published."""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline

from .licenses import license_of
from .minim_filter import FILTER_LIBRARY, FilterHead
from .modalities import register_definitions
from .schedules import settings_of
from .standalone import source_code


# Left out of `model_index.json` where they are empty.
OPTIONAL_ENTRIES = ("custom_modalities", "bare_prompts", "weights_license")


class LoadingAndSaving(ConfigMixin):
    """`from_pretrained`, `from_pipe`, `save_pretrained` and `push_to_hub` of [`MinimPipeline`].

    A mixin, to stand before [`DiffusionPipeline`]: in the one file diffusers looks for the only class that is derived
    from that.
    """

    def __setattr__(self, name: str, value: Any):
        super().__setattr__(name, value)
        # diffusers goes on taking for absent what was absent once, and would save the pipeline without it.
        if name == "filter_head" and value is not None and self.config.get(name, (FILTER_LIBRARY,))[0] is None:
            self.register_to_config(filter_head=(FILTER_LIBRARY, FilterHead.__name__))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """As [`DiffusionPipeline.from_pretrained`], but everything is fp32 unless `dtype` says otherwise.

        diffusers alone would load a text encoder in the dtype of its files and the rest in fp32. The modalities that
        the model defines are registered, so that data of theirs can be read.
        """
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
            kwargs["dtype"] = torch.float32
        pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        register_definitions(pipe.config.get("custom_modalities") or {})
        return pipe

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

    @property
    def weights_license(self) -> dict[str, str] | None:
        """The license of what the weights were made from: the config's, or that of the folder they were loaded from.

        What lies on the Hub has it in its config, if it was published by this class.
        """
        origin = str(self.config.get("_name_or_path") or "")
        return self.config.weights_license or (license_of(origin) if os.path.isdir(origin) else None)

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
            if path.name == self.config_name:
                self.complete_index(config)
            if path.parent.name == "scheduler" and "clip_sample" not in settings_of(self.scheduler):
                config["clip_sample"] = False  # as `keep_from_clipping`, for a scheduler that was swapped in
            if path.parent.name == "text_encoder":
                # transformers loads in the dtype that is written here, diffusers in fp32 whatever the files hold.
                config["dtype"] = "float32"
            path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def complete_index(self, index: dict) -> None:
        """Brings `model_index.json`, as diffusers writes it, into the form that all loaders take, in place."""
        if self.filter_head is not None:
            index["filter_head"] = ["minim_filter", "FilterHead"]  # whatever the module is called here
        if index["modalities"] is not None:
            # diffusers takes a list of strings for a component, and then refuses to download the model.
            index["modalities"] = " ".join(index["modalities"])
        index["weights_license"] = self.weights_license
        for name in OPTIONAL_ENTRIES:
            if not index[name]:
                del index[name]

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
