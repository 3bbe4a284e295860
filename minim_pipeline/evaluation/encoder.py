"""The project's own image-text encoder: features, retrieval, and nearness to copies.

A transformers `VisionTextDualEncoderModel` (arXiv 2111.07991's layout) of some 3 M parameters, trained by
`train/train_encoder.py` on real images of a part of the data that no judge learns from.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPTokenizer, VisionTextDualEncoderModel

from ..mapped import Rows
from ..modalities import resolve_modality
from ..tokens import cut_texts, tokenize
from .images import to_input


class ImageTextEncoder:
    """Images and sentences in one space, and features of images of their own.

    Args:
        model: its vision tower gives pooled features [B, D], its projections lead into the shared space [B, P].
        tokenizer: knows the modality tokens.
        image_size: side in pixels of what the vision tower sees.
    """

    def __init__(self, model: VisionTextDualEncoderModel, tokenizer: CLIPTokenizer, image_size: int):
        self.model, self.tokenizer, self.image_size = model.eval(), tokenizer, image_size

    @classmethod
    def from_pretrained(cls, path: str | Path, device: torch.device | str = "cpu") -> "ImageTextEncoder":
        """Loads what `save_pretrained` wrote; in fp32 whatever the files hold.

        Raises:
            OSError: `path` holds no encoder.
        """
        model = VisionTextDualEncoderModel.from_pretrained(path, dtype=torch.float32)
        model.vision_model.to(memory_format=torch.channels_last)  # on a CPU a third faster
        return cls(model.to(device), CLIPTokenizer.from_pretrained(path), model.config.vision_config.image_size)

    def save_pretrained(self, path: str | Path) -> None:
        self.model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @torch.no_grad()
    def encode_images(self, images: Rows, batch_size: int | None = None) -> tuple[Tensor, Tensor]:
        """Features [N, D] for distances and copies, embeddings [N, P] to lay beside those of texts: fp32, of length 1.

        Args:
            images: [N, 3, H, W], uint8 or float in [0, 1], square, of any size; in memory or on disk.
            batch_size: default 16 on a CPU, which is slower with more, else 128.
        """
        batch_size = batch_size or (16 if self.device.type == "cpu" else 128)
        features, embeddings = [], []
        for part in images.split(batch_size):
            pooled = self.model.vision_model(to_input(part.to(self.device), self.image_size)).pooler_output
            features.append(F.normalize(pooled, dim=1).cpu())
            embeddings.append(F.normalize(self.model.visual_projection(pooled), dim=1).cpu())
        return torch.cat(features), torch.cat(embeddings)

    def cut(self, rows: list[dict]) -> list[tuple[str, str]]:
        """The captions of `rows` that are longer than the text tower reads, as it is given them, and what is lost."""
        prompts = self._prompts([row["Text"] for row in rows], [row["modality"] for row in rows])
        return cut_texts(self.tokenizer, prompts)

    @staticmethod
    def _prompts(texts: list[str], modalities: list[str]) -> list[str]:
        return [f"{resolve_modality(m).token} {text}" for text, m in zip(texts, modalities, strict=True)]

    @torch.no_grad()
    def encode_texts(self, texts: list[str], modalities: list[str], batch_size: int = 256) -> Tensor:
        """Embeddings [N, P] of length 1, fp32, of sentences and their modalities (ids or aliases)."""
        prompts = self._prompts(texts, modalities)
        embeddings = []
        for start in range(0, len(prompts), batch_size):
            ids = tokenize(self.tokenizer, prompts[start : start + batch_size]).to(self.device)
            pooled = self.model.text_model(ids).pooler_output
            embeddings.append(F.normalize(self.model.text_projection(pooled), dim=1).cpu())
        return torch.cat(embeddings)
