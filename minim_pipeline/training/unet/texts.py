"""What the U-Net gets of the captions: hidden states, encoded once where the text encoder does not learn."""

import math

import torch
from accelerate import Accelerator
from transformers import CLIPTextModel, CLIPTokenizer

from ... import resolve_modality
from ...tokens import tokenize
from ..captions import phrase_once
from ..memory import fits


class Texts:
    """The different texts of a data set, and which of them a row may have.

    Attributes:
        table: token ids of each text [T, L]; after `encode` its hidden states [T, L, D].
        captions: places in the table [N, variants].
        tokens: of the modality's token alone, where the sentence is dropped [N].
        nothing: of the empty text, a number.
    """

    def __init__(self, ids: torch.Tensor, captions: torch.Tensor, tokens: torch.Tensor, device: torch.device):
        """Of token ids [T, L], the last of which are of the empty text, and places in them, as the attributes."""
        table, where = ids.unique(dim=0, return_inverse=True)
        self.table = table.to(device)
        self.captions, self.tokens, self.nothing = (where[place].to(device) for place in (captions, tokens, -1))

    @classmethod
    def phrase(
        cls, rows: list[dict], captions: dict, tokenizer: CLIPTokenizer, variants: int, seed: int, device: torch.device
    ) -> "Texts":
        """The rows' captions, as of `phrase_once`."""
        ids, places = phrase_once(rows, captions, tokenizer, variants, seed)
        tokens = [resolve_modality(row["modality"]).token for row in rows]
        alone = {token: len(ids) + i for i, token in enumerate(dict.fromkeys(tokens))}
        ids = torch.cat([ids, tokenize(tokenizer, [*alone, ""])])
        return cls(ids, places, torch.tensor([alone[token] for token in tokens]), device)

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
