"""How well a text encoder understands phrasings that it never learned from."""

import torch
import torch.nn.functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from ...modalities import MODALITIES


@torch.no_grad()
def encode(student: CLIPTextModel, tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Hidden states averaged over all positions, padded to the full length as the pipeline pads: [N, C]."""
    inputs = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    hidden = [student(ids).last_hidden_state.cpu() for ids in inputs.input_ids.to(student.device).split(64)]
    return torch.cat(hidden).mean(1)


def nearest_prototype(x: torch.Tensor, y: torch.Tensor, x_new: torch.Tensor) -> torch.Tensor:
    """For each of `x_new` [M, C], the label whose mean of `x` [N, C] is nearest by cosine: [M]."""
    prototypes = torch.stack([x[y == i].mean(0) for i in range(int(y.max()) + 1)])
    return F.cosine_similarity(x_new[:, None], prototypes[None], dim=-1).argmax(1)


def linear_probe(x: torch.Tensor, y: torch.Tensor, x_new: torch.Tensor) -> torch.Tensor:
    """The labels of `x_new` [M, C] by a logistic regression fitted to `x` [N, C] and `y` [N]: [M]."""
    probe = torch.nn.Linear(x.shape[1], int(y.max()) + 1)
    torch.nn.init.zeros_(probe.weight)
    torch.nn.init.zeros_(probe.bias)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=100)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(probe(x), y) + 1e-3 * probe.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return probe(x_new).argmax(1)


def measure(
    student: CLIPTextModel, tokenizer: CLIPTokenizer, captions: dict, phrasings: str = "new"
) -> dict[str, dict]:
    """Per modality, how many of its `phrasings` ("new" or "test", never trained on) are understood.

    Modalities without any are left out. Hidden states are standardized by those of the training phrasings.
    `prototype`: the share nearest to the mean of their own finding's training phrasings; `probe`: the share that a
    logistic regression on the training phrasings gets right; `n`: how many there are; `missed`: those that
    `prototype` takes for another finding, and which.
    """
    student.eval()
    report = {}
    for modality, findings in captions.items():
        names = list(findings)
        parts = {}
        for part in ("train", phrasings):
            pairs = [(p, i) for i, f in enumerate(names) for p in findings[f].get(part, [])]
            if not pairs:
                break
            texts = [f"{MODALITIES[modality].token} {p}" for p, _ in pairs]
            parts[part] = encode(student, tokenizer, texts), torch.tensor([i for _, i in pairs])
        if phrasings not in parts:
            continue
        (x, y), (x_new, y_new) = parts["train"], parts[phrasings]
        mean, std = x.mean(0), x.std(0) + 1e-4
        x, x_new = (x - mean) / std, (x_new - mean) / std
        nearest = nearest_prototype(x, y, x_new)
        report[modality] = {
            "prototype": (nearest == y_new).float().mean().item(),
            "probe": (linear_probe(x, y, x_new) == y_new).float().mean().item(),
            "n": len(y_new),
            "missed": {p: names[i] for (p, own), i in zip(pairs, nearest.tolist()) if own != i},
        }
    return report
