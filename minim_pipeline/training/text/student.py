"""The text encoder that learns, the teacher that it learns from, and what it is asked: heads and losses."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ...modalities import MODALITIES
from .texts import IGNORE


@torch.no_grad()
def embed(teacher_dir: str | Path, texts: list[str], batch_size: int = 64) -> torch.Tensor:
    """The teacher's sentence embeddings, mean-pooled and of unit length: [N, D] fp32."""
    tokenizer = AutoTokenizer.from_pretrained(teacher_dir)
    teacher = AutoModel.from_pretrained(teacher_dir, dtype=torch.float32).eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    out = torch.empty(len(texts), teacher.config.hidden_size)
    for i in range(0, len(order), batch_size):
        index = order[i : i + batch_size]
        limits = {"padding": True, "truncation": True, "max_length": 64}
        inputs = tokenizer([texts[j] for j in index], **limits, return_tensors="pt")
        hidden = teacher(**inputs).last_hidden_state  # [B, L, D]
        mask = inputs["attention_mask"].unsqueeze(-1)  # [B, L, 1]
        out[index] = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    return out


def text_config(tokenizer: CLIPTokenizer, hidden_size: int, layers: int, heads: int, **others: Any) -> CLIPTextConfig:
    """Of a CLIP text encoder that reads what `tokenizer` writes."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=tokenizer.model_max_length,
        # The real id, so that CLIP pools at the end of the text: with the old default of 2 it pools at the largest id.
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **others,
    )


def build_student(
    tokenizer: CLIPTokenizer, teacher_dir: str | Path, hidden_size: int, num_layers: int, num_heads: int
) -> CLIPTextModel:
    """A CLIP text encoder whose token embeddings start from what the teacher makes of each token, by PCA."""
    config = text_config(tokenizer, hidden_size, num_layers, num_heads, projection_dim=hidden_size, hidden_act="gelu")
    student = CLIPTextModel(config)
    words = {m.token: m.words for m in MODALITIES.values()}
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    vectors = embed(teacher_dir, [words.get(t, t.removesuffix("</w>")) for t in tokens])
    vectors = vectors - vectors.mean(0)
    _, _, basis = torch.linalg.svd(vectors, full_matrices=False)
    start = vectors @ basis[:hidden_size].T  # [vocabulary, hidden or fewer]
    embedding = student.get_input_embeddings().weight
    with torch.no_grad():
        embedding.normal_(std=0.02)
        embedding[:, : start.shape[1]] += 0.3 * start / start.std()
    return student


class Heads(torch.nn.Module):
    """What is asked of the student's hidden states while it learns; thrown away afterwards."""

    def __init__(self, hidden: int, teacher: int, findings: list[tuple[str, str]], modalities: list[str]):
        super().__init__()
        self.embedding = torch.nn.Linear(hidden, teacher)
        self.finding = torch.nn.Linear(hidden, len(findings))
        self.modality = torch.nn.Linear(hidden, len(modalities))
        self.negated = torch.nn.Linear(hidden, 2)
        self.side = torch.nn.Linear(hidden, 3)
        same = torch.tensor([[m == n for n, _ in findings] for m in modalities])  # [modalities, findings]
        self.of_modality: torch.Tensor
        self.register_buffer("of_modality", same)


def views(hidden: torch.Tensor, ids: torch.Tensor, eos: int) -> torch.Tensor:
    """The three ways in which a U-Net may read a text: at its end, its words, the padding after it: [3, B, C].

    Without an attention mask, as diffusers calls CLIP, the padding repeats EOS and sums the text up again.
    """
    end = (ids == eos).int().argmax(1)  # [B]
    position = torch.arange(ids.shape[1], device=ids.device)
    words = ((position > 0) & (position < end[:, None])).float().unsqueeze(-1)  # [B, L, 1]
    padding = (position >= end[:, None]).float().unsqueeze(-1)
    at_end = hidden[torch.arange(len(ids), device=ids.device), end]
    return torch.stack([at_end, *((hidden * mask).sum(1) / mask.sum(1) for mask in (words, padding))])


def losses(z: torch.Tensor, batch: dict, embeddings: torch.Tensor, heads: Heads) -> dict[str, torch.Tensor]:
    """The parts of the loss, each a mean over the three views `z` [3, B, C] and the samples that have the label."""
    known = batch["target"] != IGNORE
    target = embeddings[batch["target"][known]]
    cosine = F.cosine_similarity(heads.embedding(z[:, known]), target, dim=-1)  # [3, known]

    def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        labels = labels.expand(len(z), -1)
        count = (labels != IGNORE).sum().clamp(min=1)
        return F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORE, reduction="sum") / count

    named = batch["modality"].clamp(min=0)
    finding = heads.finding(z).masked_fill(~heads.of_modality[named], -1e4)
    return {
        "distance": (1 - cosine).mean(),
        "finding": cross_entropy(finding, batch["finding"]),
        "modality": cross_entropy(heads.modality(z), batch["modality"]),
        "negated": cross_entropy(heads.negated(z), batch["negated"]),
        "side": cross_entropy(heads.side(z), batch["side"]),
    }


class Distillation(torch.nn.Module):
    """Student and heads in one forward, which is what is distributed: token ids [B, L] and labels in, losses out."""

    def __init__(self, student: CLIPTextModel, heads: Heads, embeddings: torch.Tensor, eos: int):
        super().__init__()
        self.student, self.heads, self.eos = student, heads, eos
        self.embeddings: torch.Tensor
        self.register_buffer("embeddings", embeddings, persistent=False)  # the teacher's

    def forward(self, ids: torch.Tensor, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        hidden = self.student(ids).last_hidden_state  # [B, L, C]
        return losses(views(hidden, ids, self.eos), batch, self.embeddings, self.heads)
