"""What the filter does in a pipeline: rates its pictures, and says which of a round's candidates come back."""

import PIL.Image
import torch
from diffusers import ConfigMixin

from ..modalities import Modality
from ..tokens import prompt_text
from .filter_head import FilterHeadOutput
from .funnel import REASONS, Funnel
from .seeds import draw_seeds
from .selection import RoundResult, choose_best, judge


class Filtering(ConfigMixin):
    """A mixin of [`MinimPipeline`], whose filter head, tokenizer and autoencoder it uses."""

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

    def why_unfiltered(self, use_filter: bool | None, prompt: str | list[str] | None, output_type: str) -> str | None:
        """Why no filter runs in a call, as the rest of a sentence; None if one does."""
        if self.filter_head is None:
            return "and this pipeline has no filter head"
        if use_filter is False:
            return "but `use_filter=False`"
        if prompt is None:
            return "which reads the prompt's words: pass `prompt`"
        return "which output_type='latent' bypasses" if output_type == "latent" else None

    @property
    def reject_reasons(self) -> tuple[str, ...]:
        """Why a candidate may not come back: without "realism" where the head does not rate that."""
        return REASONS if self.filter_head is not None and self.filter_head.config.rates_realism else REASONS[:-1]

    def rate_pictures(
        self, pictures: list[PIL.Image.Image], prompts: list[str], modalities: list[Modality], device: torch.device
    ) -> FilterHeadOutput:
        """The filter head's ratings of finished pictures, which are brought to the size that it has learned."""
        funnel = self.prepare_funnel(prompts, modalities, list(range(len(prompts))), 1, device)
        return funnel.rate(self.encode_pictures(pictures, device))

    def encode_pictures(self, pictures: list[PIL.Image.Image], device: torch.device) -> torch.Tensor:
        """Latents (N, C, h, w) of the size that the filter head has learned."""
        pixels = self.image_processor.preprocess(pictures, *self.learned_size)  # (N, 3, H, W) in [-1, 1]
        return self.encode_images(pixels.to(device))

    def prepare_funnel(
        self, prompts: list[str], modalities: list[Modality], wanted: list[int], candidates: int, device: torch.device
    ) -> Funnel:
        """The funnel of a round: `candidates` for each of the `wanted` prompts, numbered as they stand there."""
        texts = [prompt_text(prompts[i], modalities[i], self.tokenizer) for i in wanted]
        return Funnel.prepare(self.filter_head, self.tokenizer, texts, candidates, device)

    def judge(
        self, rated: FilterHeadOutput, modalities: list[Modality], **options
    ) -> tuple[torch.Tensor, torch.Tensor, list[str | None]]:
        """Scores (N,), whether finished images are accepted, bool (N,), and if not, why not: see `selection.judge`."""
        return judge(self.filter_head, rated, modalities, **options)

    draw_seeds = staticmethod(draw_seeds)

    def choose(
        self,
        latents: torch.Tensor,
        funnel: Funnel | None,
        prompts: list[str],
        modalities: list[Modality],
        decode: bool,
        **options,
    ) -> RoundResult:
        """What a round of drawing gives for each of its images: the best candidate, decoded and judged.

        Args:
            latents: finished ones (m, C, h, w) of the candidates left; without a filter, of the images.
            funnel: of the round; None where no filter runs.
            prompts, modalities: of each image of the round.
            decode: whether latents become pixels.
            options: `filter_threshold` and `reject_copies`, as of `judge`.
        """
        count = len(modalities)
        if funnel is None:
            images = self.decode_latents(latents, modalities) if decode else latents
            return RoundResult(images, list(range(count)), [None] * count, [None] * count, [])

        left = funnel.alive.tolist()
        # A batch that was filled up holds the last image again.
        kinds = [modalities[min(i, count - 1)] for i in funnel.image[funnel.alive].tolist()]
        finished = latents
        if self.filter_head.config.rates_realism and len(left) > count:
            # Realism is learned of pictures: latents that come from no picture lie elsewhere, whatever they show
            pictures = self.image_processor.postprocess(self.decode_latents(latents, kinds), output_type="pil")
            finished = self.encode_pictures(pictures, latents.device)
        rated = funnel.rate(finished)
        _, passed, reasons = self.judge(rated, kinds, **options)
        best, rejected = choose_best(funnel, rated, passed, reasons)
        best = best[:count]

        # The filter's word is on the picture, as `score` gives it: latents may promise more than it holds
        pixels = self.decode_latents(latents[best], modalities)
        pictures = self.image_processor.postprocess(pixels, output_type="pil")
        rated = self.rate_pictures(pictures, prompts, modalities, latents.device)
        scores, passed, reasons = self.judge(rated, modalities, **options)
        rejected += enumerate(reasons)
        return RoundResult(pixels, [left[k] for k in best], scores.tolist(), passed.tolist(), rejected)
