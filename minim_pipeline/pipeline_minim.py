"""The pipeline: a modality and a sentence in, synthetic medical images out."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import FromSingleFileMixin, TextualInversionLoaderMixin
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import scale_lora_layers, unscale_lora_layers
from diffusers.utils.torch_utils import randn_tensor
from transformers import CLIPTextModel, CLIPTokenizer

from .call_checks import (
    check_callback,
    check_counts,
    check_encoding,
    check_finite,
    check_flags,
    check_guidance,
    check_noise,
    check_output_type,
    check_prompts,
    check_size,
    check_steps,
    check_threshold,
    check_wishes,
    prompt_list,
    replace_tensors,
    to_pictures,
)
from .captions import resolve_prompts
from .data.image_pixels import convert_pictures
from .lora import LoraLoading
from .minim_filter import FilterHead
from .minim_filter.filtering import Filtering
from .minim_filter.funnel import Batch, Funnel, select_state
from .minim_filter.seeds import Generators, draw_seeds, prepare_generators
from .minim_filter.selection import Selection
from .modalities import Modality, custom_definitions, read_definitions
from .notices import logger, warn_once
from .pipeline_output import MinimPipelineOutput, MinimScores
from .saving import LoadingAndSaving
from .schedules import (
    check_scheduler,
    keep_from_clipping,
    model_timesteps,
    rescale_noise_cfg,
    retrieve_timesteps,
)
from .tokens import cut_texts, modality_tokens, negative_text, prompt_text
from .turns import draws_in_turn, in_turn


class MinimPipeline(
    LoadingAndSaving,
    Filtering,
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
        num_inference_steps, guidance_scale, guidance_rescale, guidance_interval, num_candidates: defaults of the
            call's arguments; saved with the model.
        zero_terminal_snr: whether the model's noise schedule ends in pure noise. Read from `scheduler` if not given,
            and kept when the scheduler is swapped.
        custom_modalities: by id the definitions of modalities that are not in the package's table, as
            `register_modality` takes them; those of `modalities` that this process has registered are added and saved.
            The pipeline knows them by itself; `from_pretrained` registers them too.
        bare_prompts: whether the text encoder is given the prompt alone, without the modality: for a U-Net that was
            trained on captions as they stand.
        weights_license: the license of what the weights were made from, as `licenses.license_of` gives it; saved.
            Without it, that of the folder that the pipeline was loaded from.
        timesteps: at which the model is sampled unless the call says otherwise, in descending order; spread anew for
            another number of steps. `None` for the scheduler's own spacing; saved with the model.
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
        timesteps: list[int] | None = None,
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
        custom_modalities = {**(custom_modalities or {}), **custom_definitions(modalities or [])}
        self.own_modalities = read_definitions(custom_modalities)
        networks = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer, "unet": unet}
        self.register_modules(**networks, scheduler=scheduler, filter_head=filter_head)
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
            timesteps=timesteps,
        )
        self.vae_scale_factor = 2 ** (len(self.vae.config.block_out_channels) - 1) if getattr(self, "vae", None) else 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        if filter_head is not None:
            self.check_filter_head()

    @property
    def learned_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images that the U-Net has learned."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.vae_scale_factor, width * self.vae_scale_factor

    def warn_of_what_is_not_learned(self, height: int, width: int):
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

    def resolve_prompts(
        self, prompt: str | list[str] | None, modality: str | Sequence[Any] | None, batch_size: int
    ) -> tuple[list[str], list[Modality]]:
        """The prompts without MINIM's "OCT: " in front, and the modality of each: see `captions.resolve_prompts`."""
        own, bare = self.own_modalities, self.config.bare_prompts
        return resolve_prompts(prompt, modality, batch_size, self.config.modalities or None, own, bare)

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
        modality: str | list[str] | list[Modality] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encodes the modalities' tokens with the prompts, and for guidance the tokens with the negative prompts.

        Arguments as in `__call__`, or prompts and modalities as `resolve_prompts` gives them; embeddings that are
        passed are only repeated for `num_images_per_prompt`. Needs nothing of the pipeline but tokenizer and text
        encoder.

        Returns:
            Two tensors (N * num_images_per_prompt, L, hidden), for the prompts and for the negative side; the latter
            is None without guidance.
        """
        device = device or self._execution_device
        prompts = [prompt] if isinstance(prompt, str) else prompt or []
        modalities = [m for m in modality if isinstance(m, Modality)] if isinstance(modality, list) else []
        given = prompt_embeds is not None and (negative_prompt_embeds is not None or not do_classifier_free_guidance)
        if not given and not modalities:
            batch_size = len(prompts if prompt_embeds is None else prompt_embeds)
            prompts, modalities = self.resolve_prompts(prompt, modality, batch_size)
        if lora_scale is not None:
            # set lora scale so that the LoRA function of the text encoder can correctly access it
            self._lora_scale = lora_scale
            if self.text_encoder is not None:
                scale_lora_layers(self.text_encoder, lora_scale)

        bare = self.config.bare_prompts
        if prompt_embeds is None:
            texts = prompts if bare else [prompt_text(p, m, self.tokenizer) for p, m in zip(prompts, modalities)]
            prompt_embeds = self.encode_texts(texts, device, clip_skip)
        if not do_classifier_free_guidance:
            negative_prompt_embeds = None
        elif negative_prompt_embeds is None:
            if negative_prompt is None or isinstance(negative_prompt, str):
                negative_prompt = [negative_prompt or ""] * len(modalities)
            texts = [n if bare else negative_text(n, m, self.tokenizer) for n, m in zip(negative_prompt, modalities)]
            negative_prompt_embeds = self.encode_texts(texts, device, clip_skip, max_length=prompt_embeds.shape[1])

        # The U-Net's dtype wherever there is one: a text encoder may run in another.
        dtype = next((m.dtype for m in (self.unet, self.text_encoder) if m is not None), prompt_embeds.dtype)
        prompt_embeds = prompt_embeds.to(device, dtype).repeat_interleave(num_images_per_prompt, dim=0)
        if negative_prompt_embeds is not None:
            negative_prompt_embeds = negative_prompt_embeds.to(device, dtype)
            negative_prompt_embeds = negative_prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0)

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
        length = max_length or self.tokenizer.model_max_length
        inputs = self.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        if cut := cut_texts(self.tokenizer, texts, length):
            logger.warning(
                "The following part of your input was truncated because the text encoder can only handle sequences up"
                f" to {length} tokens: {[lost for _, lost in cut]}"
            )

        input_ids = inputs.input_ids.to(device)  # (N, L)
        use_mask = getattr(self.text_encoder.config, "use_attention_mask", False)
        attention_mask = inputs.attention_mask.to(device) if use_mask else None
        if clip_skip is None:
            return self.text_encoder(input_ids, attention_mask=attention_mask).last_hidden_state
        output = self.text_encoder(input_ids, attention_mask=attention_mask, output_hidden_states=True)
        # The final LayerNorm belongs to the last layer's output, and is needed after an earlier one as well. Newer
        # versions of transformers have it one level up.
        text_model: Any = getattr(self.text_encoder, "text_model", self.text_encoder)
        return text_model.final_layer_norm(output.hidden_states[-(clip_skip + 1)])

    def prepare_latents(self, batch_size, num_channels_latents, height, width, dtype, device, generator, latents=None):
        """Noise (N, C, H/8, W/8) as the scheduler wants it to start from."""
        shape = (batch_size, num_channels_latents, height // self.vae_scale_factor, width // self.vae_scale_factor)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        else:
            latents = latents.to(device, dtype)
        # scale the initial noise by the standard deviation required by the scheduler
        return latents * self.scheduler.init_noise_sigma

    def prepare_batch(
        self,
        slots: list[int],
        prompt_embeds: torch.Tensor,
        negative_prompt_embeds: torch.Tensor | None,
        height: int,
        width: int,
        generator: Generators,
        latents: torch.Tensor | None = None,
    ) -> Batch:
        """Noise and embeddings of candidates; `slots` has the number of each one's image, for its embeddings."""
        channels, dtype, device = self.unet.config.in_channels, prompt_embeds.dtype, prompt_embeds.device
        noise = self.prepare_latents(len(slots), channels, height, width, dtype, device, generator, latents)
        # For classifier free guidance, we need to do two forward passes.
        # Here we concatenate the unconditional and text embeddings into a single batch
        # to avoid doing two forward passes
        negative = negative_prompt_embeds[slots] if negative_prompt_embeds is not None else None
        embeds = prompt_embeds[slots] if negative is None else torch.cat([negative, prompt_embeds[slots]])
        return Batch(noise, embeds, negative, generator)

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

        Raises ValueError without a filter head, for an argument that is not possible, as `__call__`, and if what the
        values of an image mean cannot be known.
        """
        if self.filter_head is None:
            raise ValueError("This pipeline has no filter head to score with.")
        check_flags(reject_copies=reject_copies)
        check_threshold(filter_threshold)
        pictures = to_pictures(images)
        given = [prompt] * len(pictures) if isinstance(prompt, str) else prompt_list(prompt)
        if len(given) != len(pictures):
            raise ValueError(f"`prompt` has {len(given)} entries for {len(pictures)} images.")
        prompts, modalities = self.resolve_prompts(given, modality, len(given))
        height, width = self.learned_size
        pictures, changes = convert_pictures(pictures, modalities, (width, height), fit, window)
        for change in changes:
            logger.warning(change)
        rated = self.rate_pictures(pictures, prompts, modalities, self._execution_device)
        self.maybe_free_model_hooks()
        options = {"filter_threshold": filter_threshold, "reject_copies": reject_copies}
        scores, accepted, reasons = self.judge(rated, modalities, **options)
        realism = None if rated.realism is None else rated.realism.tolist()
        ratings = rated.quality.tolist(), rated.finding.tolist(), realism
        return MinimScores(scores.tolist(), accepted.tolist(), reasons, *ratings)

    def denoise(
        self,
        batch: Batch,
        timesteps: torch.Tensor,
        num_inference_steps: int,
        eta: float = 0.0,
        funnel: Funnel | None = None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> torch.Tensor:
        """From noise to latents (N, C, h, w), or to those that the funnel left of them."""
        num_warmup_steps = len(timesteps) - num_inference_steps * self.scheduler.order
        self._num_timesteps = len(timesteps)
        guided_from, guided_to = (fraction * len(timesteps) for fraction in self._guidance_interval)
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue

                # expand the latents if we are doing classifier free guidance
                guide = self.do_classifier_free_guidance and guided_from <= i < guided_to
                latent_model_input = torch.cat([batch.latents] * 2) if guide else batch.latents
                latent_model_input = self.scheduler.scale_model_input(latent_model_input, t)

                # predict the noise residual
                noise_pred = self.unet(
                    latent_model_input,
                    t,
                    # outside of the guidance interval the half without the negative side
                    encoder_hidden_states=batch.prompt_embeds[-len(latent_model_input) :],
                    cross_attention_kwargs=self.cross_attention_kwargs,
                    return_dict=False,
                )[0]
                noise_pred_text = noise_pred[-len(batch.latents) :]

                # perform guidance
                if guide:
                    noise_pred_uncond = noise_pred[: len(batch.latents)]
                    noise_pred = noise_pred_uncond + self.guidance_scale * (noise_pred_text - noise_pred_uncond)
                    if funnel is not None:
                        funnel.add_guidance(noise_pred_text, noise_pred_uncond)
                    if self.guidance_rescale > 0.0:
                        noise_pred = rescale_noise_cfg(noise_pred, noise_pred_text, self.guidance_rescale)

                # drop the worst candidates, and all that belongs to them
                if funnel is not None and (count := funnel.due(self.scheduler, t)) is not None:
                    seen = latent_model_input[-len(batch.latents) :]
                    keep = funnel.prune(count, seen, noise_pred_text, self.scheduler, t)
                    select_state(self.scheduler, keep, batch.latents.shape)
                    batch.select(keep)
                    noise_pred = noise_pred[keep]

                # compute the previous noisy sample x_t -> x_t-1
                kwargs = self.prepare_extra_step_kwargs(batch.generator, eta)
                batch.latents = self.scheduler.step(noise_pred, t, batch.latents, **kwargs, return_dict=False)[0]

                if callback_on_step_end is not None:
                    tensors = {name: getattr(batch, name) for name in callback_on_step_end_tensor_inputs or ()}
                    given = callback_on_step_end(self, i, t, tensors)
                    replace_tensors(batch, given, self.do_classifier_free_guidance)

                if i == len(timesteps) - 1 or ((i + 1) > num_warmup_steps and (i + 1) % self.scheduler.order == 0):
                    progress_bar.update()
        return batch.latents

    # What a call was made with, for callbacks
    guidance_scale = property(lambda self: self._guidance_scale)
    guidance_rescale = property(lambda self: self._guidance_rescale)
    clip_skip = property(lambda self: self._clip_skip)
    do_classifier_free_guidance = property(lambda self: self._guidance_scale > 1)
    cross_attention_kwargs = property(lambda self: self._cross_attention_kwargs)
    num_timesteps = property(lambda self: self._num_timesteps)
    interrupt = property(lambda self: self._interrupt)

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
        generator: Generators = None,
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
            timesteps: timesteps in descending order instead of the model's or the scheduler's own, for schedulers that
                take them.
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
                one needs a filter head. All candidates of all images begin in one batch, so the first steps take the
                memory of `num_candidates` times as many images; the decoder sees one for each image.
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
        candidates = self.config.num_candidates if num_candidates is None else num_candidates
        check_counts(num_inference_steps=num_inference_steps, num_images_per_prompt=num_images_per_prompt)
        check_counts(num_candidates=candidates, max_rounds=max_rounds)
        check_size(height, width, self.vae_scale_factor)
        check_guidance(guidance_scale, guidance_rescale, guidance_interval, eta)
        check_encoding(clip_skip, cross_attention_kwargs, self.text_encoder)
        check_threshold(filter_threshold)
        check_steps(self.scheduler, timesteps, sigmas)
        if timesteps is None and sigmas is None:
            timesteps = model_timesteps(self.scheduler, self.config.timesteps, num_inference_steps)
        check_output_type(output_type)
        check_flags(return_dict=return_dict, reject_copies=reject_copies)
        if use_filter is not None:
            check_flags(use_filter=use_filter)
        check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        hidden, channels = self.unet.config.cross_attention_dim, self.unet.config.in_channels
        batch_size = check_prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, hidden)
        num_images, factor = batch_size * num_images_per_prompt, self.vae_scale_factor
        check_noise(generator, seeds, latents, (num_images, channels, height // factor, width // factor))
        why_unfiltered = self.why_unfiltered(use_filter, prompt, output_type)
        check_wishes(why_unfiltered, num_candidates, max_rounds, filter_threshold, use_filter, seeds, latents)
        prompts, modalities = self.resolve_prompts(prompt, modality, batch_size)
        check_scheduler(self.scheduler, self.config.zero_terminal_snr)
        self.warn_of_what_is_not_learned(height, width)

        self._guidance_scale = guidance_scale
        self._guidance_rescale = guidance_rescale
        self._guidance_interval = guidance_interval
        self._clip_skip = clip_skip
        self._cross_attention_kwargs = cross_attention_kwargs
        self._interrupt = False
        device = self._execution_device

        # 2. Encode the prompts
        prompt_embeds, negative_prompt_embeds = self.encode_prompt(
            prompts,
            device,
            num_images_per_prompt,
            self.do_classifier_free_guidance,
            negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            lora_scale=cross_attention_kwargs.get("scale") if cross_attention_kwargs is not None else None,
            clip_skip=clip_skip,
            modality=modalities,
        )

        # 3. One entry an image, and how many candidates the filter chooses from
        prompts = [p for p in prompts for _ in range(num_images_per_prompt)]
        modalities = [m for m in modalities for _ in range(num_images_per_prompt)]
        filtering = why_unfiltered is None
        if not filtering or seeds is not None or latents is not None:
            candidates = 1
        choosing = candidates > 1 or max_rounds > 1

        # 4. Rounds of drawing: the first draws everything, further ones what fell short
        selection = Selection(num_images, filtering, self.reject_reasons)
        for number in range(max_rounds):
            # What a callback changed, as diffusers' own that end guidance do, was meant for its round
            self._guidance_scale, self._guidance_rescale = guidance_scale, guidance_rescale
            self._cross_attention_kwargs = cross_attention_kwargs

            # The image of each candidate. A compiled network would be compiled anew for another batch: fewer images
            # are filled up with the last.
            wanted = selection.wanted
            compiled = getattr(self.unet, "_compiled_call_impl", None) is not None
            places = wanted + [wanted[-1]] * (num_images - len(wanted) if compiled else 0)
            slots = [i for i in places for _ in range(candidates)]

            # Prepare seeds, timesteps, noise and embeddings
            round_seeds = seeds
            if choosing:
                round_seeds = draw_seeds(wanted, candidates, generator)
                round_seeds += round_seeds[-candidates:] * (len(places) - len(wanted))
            source = None if choosing else generator
            source, known_seeds = prepare_generators(len(slots), source, round_seeds, latents)
            round_timesteps, num_inference_steps = retrieve_timesteps(
                self.scheduler, num_inference_steps, device, timesteps, sigmas
            )
            batch = self.prepare_batch(slots, prompt_embeds, negative_prompt_embeds, height, width, source, latents)

            # Denoise; the funnel drops the worst candidates on the way
            funnel = self.prepare_funnel(prompts, modalities, places, candidates, device) if filtering else None
            callback = (callback_on_step_end, callback_on_step_end_tensor_inputs) if number == 0 else ()
            result = self.denoise(batch, round_timesteps, num_inference_steps, eta, funnel, *callback)
            check_finite(result, "Latents", {"text_encoder": self.text_encoder, "unet": self.unet})

            # Decode the best candidate of each image, and keep it where it is better than what there was
            texts = [prompts[i] for i in wanted] if filtering else []
            kinds, decode = [modalities[i] for i in wanted], output_type != "latent"
            judging: dict[str, Any] = {"filter_threshold": filter_threshold, "reject_copies": reject_copies}
            chosen = self.choose(result, funnel, texts, kinds, decode, **judging)
            selection.add(chosen, known_seeds, candidates)
            if not selection.wanted or self.interrupt:
                break
        if selection.wanted:
            logger.warning(
                f"{len(selection.wanted)} of {num_images} images fall short of the filter's thresholds and come back"
                f" with accepted=False: raise `num_candidates` ({candidates}) or `max_rounds` ({max_rounds})."
            )

        images = torch.stack([image for image in selection.images if image is not None])
        if output_type != "latent":
            images = self.image_processor.postprocess(images, output_type=output_type)

        # Offload all models
        self.maybe_free_model_hooks()

        output = MinimPipelineOutput(
            images, selection.scores, selection.accepted, selection.seeds, selection.candidates, selection.rejected
        )
        return output if return_dict else output.to_tuple()


# `DiffusionPipeline.from_pretrained` looks up the class that a model_index.json names among diffusers' own.
diffusers.MinimPipeline = MinimPipeline
