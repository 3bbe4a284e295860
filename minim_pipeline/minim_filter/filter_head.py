"""The filter head: how good the image will be that these noisy latents become, and whether it shows what was asked.

A small network on what a sampler has in hand at any step: the noisy latents, the estimate of the clean ones that the
U-Net gives for free, the noise level and the prompt's token ids. Scoring latents and not images, at every noise level,
is the idea of latent reward models (arXiv 2502.01051); two ratings, of quality and of agreement with the text, are
ImageReward's (arXiv 2304.05977), here as two outputs. A third, of how far the image is from real ones, is the
discriminator of DiffRS (arXiv 2405.17880).
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.utils import BaseOutput
from torch import nn


@dataclass
class FilterHeadOutput(BaseOutput):
    """Ordinal ratings of each image, in fp32; `*_probs` are those of the ratings 1, 2 and 3.

    Args:
        quality: expected rating in [1, 3], shape (N,).
        finding: likewise, of whether the image shows what the prompt says.
        quality_probs: (N, 3).
        finding_probs: (N, 3).
        features: what the ratings are read from, (N, F).
        code: (N, B), of which the signs are the image's fingerprint; of finished images only.
        realism: log ratio of the densities of real and of generated images there, (N,): above 0, the image is more
            likely a real one. None of a head that does not rate it.
    """

    quality: torch.Tensor
    finding: torch.Tensor
    quality_probs: torch.Tensor
    finding_probs: torch.Tensor
    features: torch.Tensor
    code: torch.Tensor
    realism: torch.Tensor | None = None


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions; the noise level scales and shifts between them (arXiv 2105.05233)."""

    def __init__(self, channels: int, embedding: int, groups: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, channels), nn.GroupNorm(groups, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.modulate = nn.Linear(embedding, 2 * channels)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # [N, C, h, w]
        scale, shift = self.modulate(embedding)[:, :, None, None].chunk(2, dim=1)  # [N, C, 1, 1] each
        return x + self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))


class OrdinalOutput(nn.Module):
    """A rating from 1 to 3 by a cumulative link: P(rating > k) = sigmoid((score - cut_k) / uncertainty).

    McCullagh, Regression Models for Ordinal Data, 1980. The uncertainty follows from features and noise level.
    """

    def __init__(self, features: int, embedding: int):
        super().__init__()
        self.spread = nn.Linear(features + embedding, 1)
        self.cut = nn.Parameter(torch.tensor([-0.5, 0.5]))
        nn.init.zeros_(self.spread.weight)

    def forward(self, score: torch.Tensor, features: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """Probabilities (N, 3) of the ratings, from scores (N,), features (N, F) and noise embeddings (N, E)."""
        spread = F.softplus(self.spread(torch.cat([features, embedding], 1))) + 0.05  # [N, 1]
        first, second = self.cut[0], self.cut[0] + F.softplus(self.cut[1])
        above = torch.sigmoid((score[:, None] - torch.stack([first, second])) / spread)  # [N, 2]: > 1, > 2
        return torch.stack([1 - above[:, 0], above[:, 0] - above[:, 1], above[:, 1]], 1)


class FilterHead(ModelMixin, ConfigMixin):
    """Rates noisy latents, or clean ones, for a prompt.

    Args:
        in_channels: channels of the latents, as the U-Net's.
        sample_size: height and width of the latents that it was trained on; other sizes are taken too.
        latent_scale: the autoencoder's `scaling_factor`, by which the latents were multiplied.
        vocab_size: of the tokenizer.
        max_length: tokens of a prompt, padded.
        pad_token_id: tokens that are not read.
        block_out_channels: channels at a half, and at a quarter of `sample_size`.
        layers_per_block: residual blocks of each.
        text_width: of the two layers that read the prompt.
        feature_size: of what quality and finding are read from.
        code_size: bits of a fingerprint, a multiple of 8.
        norm_num_groups: of the group norms.
        dropout: in training.
        num_fingerprints: of training images, and of these mirrored and shifted, by which copies of them are known.
        calibration: by modality id the fields of `selection.Thresholds`, from which on an image is accepted.
        enough: ratings of quality and of the finding from which on more does not count when candidates are chosen.
            Always to take the best rated would give back the most typical images, and lose diversity.
        guidance_weight: of the logarithm of what guidance did to a candidate so far, added to its ratings when
            candidates are chosen (`funnel.rank`); not part of any score.
        stages: when the pipeline drops candidates: pairs of a noise level sigma/alpha and the share of candidates
            that is left from there on. With the default, 16 steps and guidance over 60 % of them, the best of 4
            costs 1.85 plain images in samples of the U-Net.
        rates_realism: whether there is a third output, `realism`.
        realism_weight: of the log ratio `realism`, added like what guidance did; not part of any score either.
    """

    # Thresholds were found in fp32, and a rating must not depend on the dtype of the pipeline.
    _keep_in_fp32_modules = [
        *("embed", "stem", "fine", "down", "coarse", "norm", "pool", "code", "text"),
        *("quality", "finding", "realism", "logit_scale"),
    ]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 8,
        sample_size: int = 32,
        latent_scale: float = 1.0,
        vocab_size: int = 2566,
        max_length: int = 48,
        pad_token_id: int = 0,
        block_out_channels: tuple[int, int] = (80, 144),
        layers_per_block: int = 2,
        text_width: int = 96,
        feature_size: int = 192,
        code_size: int = 224,
        norm_num_groups: int = 8,
        dropout: float = 0.1,
        num_fingerprints: int = 0,
        calibration: dict | None = None,
        enough: tuple[float, float] = (2.0, 2.9),
        guidance_weight: float = 0.1,
        stages: tuple[tuple[float, float], ...] = ((14.0, 0.5), (5.5, 0.0)),
        rates_realism: bool = False,
        realism_weight: float = 0.1,
    ):
        super().__init__()
        fine, coarse = block_out_channels
        width = 64
        self.embed = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.stem = nn.Conv2d(2 * in_channels, fine, 4, stride=2, padding=1)
        self.fine = nn.ModuleList([ResnetBlock(fine, width, norm_num_groups) for _ in range(layers_per_block)])
        self.down = nn.Conv2d(fine, coarse, 3, stride=2, padding=1)
        self.coarse = nn.ModuleList([ResnetBlock(coarse, width, norm_num_groups) for _ in range(layers_per_block)])
        # Means tell what is everywhere, maxima what is somewhere.
        pooled = 2 * (fine + coarse)
        self.norm = nn.LayerNorm(pooled)
        self.pool = nn.Sequential(nn.Linear(pooled, feature_size), nn.GELU(), nn.Dropout(dropout))
        self.code = nn.Linear(pooled, code_size)
        self.register_buffer("fingerprints", torch.zeros(num_fingerprints, code_size // 8, dtype=torch.uint8))
        self.text = nn.ModuleDict({"tokens": nn.Embedding(vocab_size, text_width)})
        self.text["places"] = nn.Embedding(max_length, text_width)
        layer = nn.TransformerEncoderLayer(
            text_width, 4, 4 * text_width, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.text["layers"] = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.text["norm"] = nn.LayerNorm(text_width)
        score = nn.Sequential(nn.Linear(feature_size, feature_size), nn.GELU(), nn.Linear(feature_size, 1))
        self.quality = nn.ModuleDict({"score": score, "ordinal": OrdinalOutput(feature_size, width)})
        image, text = nn.Linear(feature_size, text_width), nn.Linear(text_width, text_width)
        self.finding = nn.ModuleDict({"image": image, "text": text, "ordinal": OrdinalOutput(feature_size, width)})
        self.logit_scale = nn.Parameter(torch.tensor(4.0).log())
        if rates_realism:
            # Like the code of the pooled features, which further training with ratings leaves as they are.
            hidden = nn.Linear(pooled + width, feature_size)
            self.realism = nn.Sequential(hidden, nn.GELU(), nn.Dropout(dropout), nn.Linear(feature_size, 1))

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights; diffusers' own would tell the fingerprints'."""
        return self.logit_scale.dtype

    def to(self, *args, **kwargs):
        """Moves the head; its dtype stays fp32 whatever is asked for, as when a pipeline is cast as a whole."""
        device, _, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        return super().to(device=device, non_blocking=non_blocking) if device is not None else self

    def set_fingerprints(self, code: nn.Linear, fingerprints: torch.Tensor) -> None:
        """Which images are known: the code, from features to B bits, and their fingerprints uint8 (M, B / 8)."""
        self.code = copy.deepcopy(code).to(self.device)  # the caller's stays where it is
        self.fingerprints = fingerprints.to(self.device, torch.uint8)
        self.register_to_config(code_size=code.out_features, num_fingerprints=len(fingerprints))

    def encode_image(
        self, noisy: torch.Tensor, clean: torch.Tensor, angle: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pooled features (N, P) of the latents, from which all is read, and embeddings (N, E) of the noise level."""
        # Spread over about the range of the timesteps that this embedding was made for.
        embedding = self.embed(get_timestep_embedding(angle.float() * 600, self.embed[0].in_features))  # [N, E]
        x = self.stem(torch.cat([noisy.float(), clean.float()], 1))  # [N, C1, h/2, w/2]
        for block in self.fine:
            x = block(x, embedding)
        y = self.down(F.silu(x))  # [N, C2, h/4, w/4]
        for block in self.coarse:
            y = block(y, embedding)
        pooled = [reduce(maps) for maps in (x, y) for reduce in (lambda m: m.mean((2, 3)), lambda m: m.amax((2, 3)))]
        return self.norm(torch.cat(pooled, 1)), embedding

    def encode_text(self, input_ids: torch.Tensor) -> torch.Tensor:
        """What the prompts ask for, (N, T) of length 1, from token ids (N, L): the modality's token, then words."""
        unread = input_ids == self.config.pad_token_id
        unread[:, 0] = False
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.text["tokens"](input_ids) + self.text["places"](places)  # [N, L, T]
        x = self.text["norm"](self.text["layers"](x, src_key_padding_mask=unread))
        read = (~unread)[:, :, None].float()
        return F.normalize(self.finding["text"]((x * read).sum(1) / read.sum(1)), dim=1)

    def match(self, features: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """How well images (N, F) go with texts (..., N or 1, T): scaled cosines (..., N), before any cuts."""
        image = F.normalize(self.finding["image"](features), dim=1)  # [N, T]
        return self.logit_scale.exp() * (image * text).sum(-1)

    def forward(
        self,
        noisy: torch.Tensor,
        clean: torch.Tensor,
        angle: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        text: torch.Tensor | None = None,
        quality_bias: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> FilterHeadOutput | tuple:
        """Rates each image for its prompt.

        Args:
            noisy: latents at the noise level, alpha * clean + sigma * noise with alpha^2 + sigma^2 = 1: (N, C, h, w).
            clean: the estimate of the clean latents from the U-Net's prediction with the prompt alone, without
                guidance: (N, C, h, w). The latents themselves where there is no noise.
            angle: arctan(sigma / alpha) in [0, pi / 2], (N,); 0 is a finished image.
            input_ids: token ids of modality and prompt, (N, L).
            text: what `encode_text` gave, (N, T), instead of `input_ids`.
            quality_bias: what a rater adds to the score of quality before the cuts, (N,); for training.
            return_dict: `False` for a plain tuple.
        """
        # Its own arithmetic is fp32 inside of an autocast region, too.
        with torch.autocast(noisy.device.type, enabled=False):
            pooled, embedding = self.encode_image(noisy, clean, angle)
            features, code = self.pool(pooled), self.code(pooled)
            if text is not None:
                text = text.float()
            elif input_ids is not None:
                text = self.encode_text(input_ids)
            else:
                raise ValueError("Pass `input_ids` or `text`.")
            score = self.quality["score"](features)[:, 0]
            score = score if quality_bias is None else score + quality_bias
            quality = self.quality["ordinal"](score, features, embedding)
            finding = self.finding["ordinal"](self.match(features, text), features, embedding)
            ratings = torch.tensor([1.0, 2.0, 3.0], device=noisy.device)
            rates = self.config.rates_realism
            realism = self.realism(torch.cat([pooled, embedding], 1))[:, 0] if rates else None
            output = FilterHeadOutput(quality @ ratings, finding @ ratings, quality, finding, features, code, realism)
        return output if return_dict else output.to_tuple()
