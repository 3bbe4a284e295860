"""Real images beside what else a U-Net is trained on, so that it does not forget what they look like."""

import torch

from ... import MODALITIES, MinimPipeline, resolve_modality
from ..captions import load_captions, phrase
from ..latents import Latents
from ..rows import check_processes, read_splits
from ..run import Run
from .config import PreferenceConfig


class Replay:
    """Latents of the train images of `--replay`, each in some versions, with captions in some phrasings.

    Args:
        pipe: encodes images and captions.

    Raises:
        ValueError: the CSV has no train rows of the pipeline's modalities.
    """

    def __init__(self, config: PreferenceConfig, run: Run, pipe: MinimPipeline):
        known = pipe.config.modalities or list(MODALITIES)
        data = config.replay_data(pipe.unet.config.sample_size * pipe.vae_scale_factor)
        rows, _ = read_splits(data)
        rows = [row for row in rows if resolve_modality(row["modality"]).id in known]
        if not rows:
            raise ValueError(f"{config.replay} has no train images of {', '.join(known)}.")
        check_processes(rows, f"--replay {config.replay}")
        self.text_encoder = pipe.text_encoder
        self.variants = config.latent_variants
        captions = load_captions(config.captions)
        self.ids = phrase(rows, captions, pipe.tokenizer, config.caption_variants, config.seed).to(run.device)
        self.latents = Latents.encode(run, pipe.vae, data, rows, "replay", config.latent_variants)

    @torch.no_grad()
    def draw(self, count: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents [count, C, h, w], scaled as the U-Net takes them, and hidden states [count, L, D]."""

        def randint(high: int) -> torch.Tensor:
            return torch.randint(high, (count,), device=g.device, generator=g)

        index = randint(len(self.ids))
        latents = self.latents.draw(index, randint(self.variants), g)
        text = self.ids[index, randint(self.ids.shape[1])]
        return latents, self.text_encoder(text).last_hidden_state
