"""What a step learns from: latents and texts of rows that are drawn, and lie, on the device."""

from collections import Counter

import torch

from ..captions import load_captions
from ..latents import Latents
from ..pipeline import Trainee
from ..rows import Rows, modality_of
from ..run import Run
from .config import TextToImageConfig
from .texts import Texts


class Batches:
    """Draws batches; the same ones for the same state of a generator.

    Args:
        latents, texts: of the rows to learn, and behind them of those of `--replay`.
        shares: how often each row to learn is drawn, and each to replay, as `shares_of` gives them: [N] each.
    """

    def __init__(
        self, config: TextToImageConfig, latents: Latents, texts: Texts, shares: torch.Tensor, replayed: torch.Tensor
    ):
        self.config, self.latents, self.texts, self.shares, self.replayed = config, latents, texts, shares, replayed

    @classmethod
    def encode(cls, config: TextToImageConfig, run: Run, rows: Rows, trainee: Trainee) -> "Batches":
        """Encodes the train rows, once for the whole run; the autoencoder has to be on the device."""
        every, tokenizer, vae = rows.train + rows.old_train, trainee.pipe.tokenizer, trainee.pipe.vae
        phrasing = load_captions(config.captions), tokenizer, config.caption_variants, config.seed
        texts = Texts.phrase(every, *phrasing, run.device)
        if not (config.train_text_encoder or trainee.new_tokens):
            texts.encode(trainee.pipe.text_encoder, run.accelerator, torch.bfloat16 if config.bf16 else torch.float32)
        latents = Latents.encode(run, vae, config, rows.train, "train", config.latent_variants)
        if old := config.replay_data:
            latents = latents.join(Latents.encode(run, vae, old, rows.old_train, "replay", config.latent_variants))
        latents = latents.hold(run.device)
        shares = (shares_of(part, config.balance).to(run.device) for part in (rows.train, rows.old_train))
        return cls(config, latents, texts, *shares)

    def draw(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents [B, C, h, w] and texts, token ids [B, L] or states [B, L, D]; the replayed ones are the last."""
        config, batch = self.config, self.config.train_batch_size
        new = batch - config.replayed

        def randint(high: int) -> torch.Tensor:
            return torch.randint(high, (batch,), device=generator.device, generator=generator)

        index = torch.multinomial(self.shares, new, replacement=True, generator=generator)
        if config.replayed:
            old = torch.multinomial(self.replayed, config.replayed, replacement=True, generator=generator)
            index = torch.cat([index, len(self.shares) + old])
        latents = self.latents.draw(index, randint(config.latent_variants), generator)
        variant = randint(config.caption_variants)
        chance = torch.rand(batch, device=generator.device, generator=generator)
        return latents, self.texts.draw(index, variant, chance, config.drop_text, config.drop_all)


def shares_of(rows: list[dict], balance: float) -> torch.Tensor:
    """How often each row is drawn, up to a factor: its finding's number to the power of `-balance`, [N]."""
    findings = [(modality_of(row), row.get("finding")) for row in rows]
    counts = Counter(findings)
    return torch.tensor([counts[finding] ** -balance for finding in findings])
