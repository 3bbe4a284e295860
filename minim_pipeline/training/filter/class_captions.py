"""Captions of every class: what is asked for, and how right that is for what an image shows."""

import torch
from transformers import CLIPTokenizer

from ...evaluation.judges import class_of, merged_class
from ..captions import phrase
from . import rubric


class Captions:
    """Captions of the rows by class.

    Args:
        rows: with `Text`, `modality` and `finding`; only those of a class are used.
        classes: (modality id, finding).
        variants: phrasings of each caption.
    """

    def __init__(
        self,
        rows: list[dict],
        classes: list[tuple[str, str]],
        phrasings: dict,
        tokenizer: CLIPTokenizer,
        variants: int,
        seed: int,
        device: torch.device,
    ):
        number = {key: i for i, key in enumerate(classes)}
        self.ids = phrase(rows, phrasings, tokenizer, variants, seed).to(device)  # [N, variants, L]
        self.label = torch.tensor([number[class_of(row)] for row in rows], device=device)
        of_class = [(self.label == k).nonzero()[:, 0] for k in range(len(classes))]
        self.count = torch.tensor([len(places) for places in of_class], device=device)
        self.table = torch.nn.utils.rnn.pad_sequence(of_class, batch_first=True)  # [K, most]
        modalities = [modality for modality, _ in classes]
        names = list(dict.fromkeys(modalities))
        self.modality = torch.tensor([names.index(m) for m in modalities], device=device)
        alike = [[look_alike(a, b) for b in classes] for a in classes]
        self.alike = torch.tensor(alike, dtype=torch.float32, device=device)

    def of_rows(self, rows: torch.Tensor, g: torch.Generator) -> torch.Tensor:
        """Token ids [B, L] of the rows' captions, in some phrasing."""
        return self.ids[rows, torch.randint(self.ids.shape[1], rows.shape, device=rows.device, generator=g)]

    def of_classes(self, classes: torch.Tensor, g: torch.Generator) -> torch.Tensor:
        """Token ids [B, L] of some caption of each class."""
        chance = torch.rand(classes.shape, device=classes.device, generator=g)
        return self.of_rows(self.table[classes, (chance * self.count[classes]).long()], g)

    def ask(self, present: torch.Tensor, g: torch.Generator) -> torch.Tensor:
        """A class to ask for, given the one that is shown: int64 [B], in the rubric's shares."""
        shares = torch.tensor(list(rubric.CAPTION_SHARES.values()), device=present.device)
        how = torch.multinomial(shares, len(present), replacement=True, generator=g)[:, None]  # [B, 1]
        every = torch.arange(len(self.modality), device=present.device)[None]  # [1, K]
        same = self.modality[present][:, None] == self.modality[None]
        own = every == present[:, None]
        allowed = torch.where(how == 0, own, torch.where(how == 1, same & ~own, ~same)).float()
        allowed = torch.where(allowed.sum(1, keepdim=True) > 0, allowed, own.float())
        return torch.multinomial(allowed, 1, generator=g)[:, 0]

    def grades(self, shows: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
        """Probabilities [B, 3] of the finding's grades 1 to 3, from what is shown [B, K] and asked for [B]."""
        right = shows.gather(1, asked[:, None])[:, 0]
        alike = (shows * self.alike[asked]).sum(1)
        return torch.stack([(1 - right - alike).clamp(min=0), alike, right], 1)


def look_alike(a: tuple[str, str], b: tuple[str, str]) -> bool:
    """Whether two classes are not the same, and yet what they show is."""
    return a != b and merged_class(*a) == merged_class(*b)
