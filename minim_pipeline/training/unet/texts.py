"""What the U-Net gets of the captions: hidden states, encoded once where the text encoder does not learn."""

import math

import torch
from accelerate import Accelerator
from transformers import CLIPTextModel

from ..memory import fits


class Texts:
    """The different texts of a data set, and which of them a row may have.

    Attributes:
        table: token ids of each text [T, L]; after `encode` its hidden states [T, L, D].
        captions: places in the table [N, variants].
        tokens: of the modality's token alone, where the sentence is dropped [N].
        nothing: of the empty text, a number.
    """

    def __init__(self, captions: torch.Tensor, tokens: torch.Tensor, nothing: torch.Tensor, device: torch.device):
        """Of token ids: captions [N, variants, L], tokens [N, L], nothing [1, L]."""
        rows, variants = captions.shape[:2]
        table, where = torch.cat([captions.flatten(0, 1), tokens, nothing]).unique(dim=0, return_inverse=True)
        self.table, where = table.to(device), where.to(device)
        self.captions = where[: rows * variants].view(rows, variants)
        self.tokens, self.nothing = where[rows * variants : -1], where[-1]

    @torch.no_grad()
    def encode(self, text_encoder: CLIPTextModel, accelerator: Accelerator, dtype: torch.dtype) -> None:
        """Puts the hidden states in the place of the token ids if memory has room for them (`fits`)."""
        shape, device = (*self.table.shape, text_encoder.config.hidden_size), self.table.device
        if not fits(math.prod(shape) * dtype.itemsize, device):
            return
        states = torch.empty(shape, dtype=dtype, device=device)
        text_encoder.eval().to(device)
        with accelerator.autocast():
            for ids, part in zip(self.table.split(256), states.split(256), strict=True):
                part.copy_(text_encoder(ids).last_hidden_state)
        self.table = states

    def draw(
        self, index: torch.Tensor, variant: torch.Tensor, chance: torch.Tensor, drop_text: float, drop_all: float
    ) -> torch.Tensor:
        """Texts of rows, as the table has them: [B, L] or [B, L, D].

        Args:
            index, variant: which rows, and which of their captions [B].
            chance: from 0 to 1 [B]: the lowest `drop_all` of it have no text, the next `drop_text` the token alone.
        """
        where = torch.where(chance < drop_text + drop_all, self.tokens[index], self.captions[index, variant])
        return self.table.index_select(0, torch.where(chance < drop_all, self.nothing, where))
