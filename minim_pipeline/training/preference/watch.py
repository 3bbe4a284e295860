"""Watches a generator while it is trained: a score that the training does not see, and pictures."""

from pathlib import Path

import torch

from ... import MinimPipeline
from ...contact_sheet import contact_sheet
from ...evaluation.encoder import ImageTextEncoder
from ...evaluation.sampling import draw_images


class Watch:
    """The image-text encoder's word on images of the same seeds each time.

    Args:
        encoder: folder of an `ImageTextEncoder`.
        prompts: rows with `Text`, `modality` and, if known, `finding`; without one, a prompt is its own finding.
        images: of each finding, its prompts in turn.
    """

    def __init__(self, encoder: str, prompts: list[dict], images: int, device: torch.device):
        self.encoder = ImageTextEncoder.from_pretrained(encoder, device)
        labels = [(row["modality"], row.get("finding") or row["Text"]) for row in prompts]
        self.labels = list(dict.fromkeys(labels))
        texts = self.encoder.encode_texts([row["Text"] for row in prompts], [row["modality"] for row in prompts])
        known = [[i for i, label in enumerate(labels) if label == name] for name in self.labels]
        # A finding lies where its phrasings lie on average.
        self.prototypes = torch.stack([texts[own].mean(0) for own in known])  # [K, P]
        self.rows = [prompts[own[i % len(own)]] for own in known for i in range(images)]
        self.label = torch.arange(len(self.labels)).repeat_interleave(images)
        kinds = [modality for modality, _ in self.labels]
        self.same = torch.tensor([[a == b for b in kinds] for a in kinds])  # [K, K]

    @torch.no_grad()
    def look(self, pipe: MinimPipeline, folder: Path, batch_size: int) -> dict[str, float]:
        """Draws the images, leaves a sheet of each modality in `folder`, and says how good they are.

        Returns:
            `score`: the probability of the finding that was asked for among those of its modality, the mean over the
            images; `right`: how often it is the largest; `spread`: mean distance of features among a finding's images.
        """
        images = draw_images(
            pipe,
            [row["Text"] for row in self.rows],
            [row["modality"] for row in self.rows],
            list(range(len(self.rows))),
            min(batch_size, 64 if pipe.device.type == "cpu" else 256),
            name="watching",
        )
        self.save(images, folder)
        with torch.autocast(pipe.device.type, enabled=False):  # a ruler, at its own precision
            return self.measure(images)

    def measure(self, images: torch.Tensor) -> dict[str, float]:
        """`look`'s figures of images uint8 [N, 3, H, W], one for each row."""
        features, embeddings = self.encoder.encode_images(images)
        # 20 is near the temperature that the encoder was trained with; it only has to be the same each time.
        logits = (20 * embeddings @ self.prototypes.T).masked_fill(~self.same[self.label], -torch.inf)
        probabilities = logits.softmax(1)
        asked = probabilities.gather(1, self.label[:, None])[:, 0]
        spreads = [
            torch.pdist(features[self.label == k]).mean() if (self.label == k).sum() > 1 else torch.zeros(())
            for k in range(len(self.labels))
        ]
        return {
            "score": round(asked.mean().item(), 5),
            "right": round((probabilities.argmax(1) == self.label).double().mean().item(), 5),
            "spread": round(torch.stack(spreads).mean().item(), 5),
        }

    def save(self, images: torch.Tensor, folder: Path, columns: int = 8) -> None:
        """A row of `columns` images for each finding, a file for each modality."""
        folder.mkdir(parents=True, exist_ok=True)
        for modality in dict.fromkeys(name for name, _ in self.labels):
            findings = [k for k, (name, _) in enumerate(self.labels) if name == modality]
            chosen = torch.cat([images[self.label == k][:columns] for k in findings])
            contact_sheet(chosen, len(chosen) // len(findings)).save(folder / f"{modality}.png")
