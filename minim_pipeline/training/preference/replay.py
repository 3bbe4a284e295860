"""Real images beside what else a U-Net is trained on, so that it does not forget what they look like."""

import argparse

import torch
from accelerate import Accelerator

from minim_pipeline import MODALITIES, MinimPipeline, resolve_modality
from minim_pipeline.data.splits import read_split
from minim_pipeline.training.captions import load_captions, phrase
from minim_pipeline.training.common import check_processes
from minim_pipeline.training.latents import Latents
from minim_pipeline.training.rows import image_paths, tell_repeats


class Replay:
    """Latents of the train images of a CSV, each in some versions, with captions in some phrasings.

    Args:
        args: `replay` (the CSV), `captions`, `caption_variants`, `latent_variants`, `output_dir`, `seed`,
            `mixed_precision` and `no_mirror`.
        pipe: encodes images and captions.

    Raises:
        ValueError: the CSV has no train rows of the pipeline's modalities.
    """

    def __init__(self, args, accelerator: Accelerator, pipe: MinimPipeline):
        known = pipe.config.modalities or list(MODALITIES)
        rows = read_split(args.replay, "train", hold_out=False)
        tell_repeats(args.replay, image_paths(rows, args.replay), [])
        rows = [row for row in rows if resolve_modality(row["modality"]).id in known]
        if not rows:
            raise ValueError(f"{args.replay} has no train images of {', '.join(known)}.")
        check_processes(rows, f"--replay {args.replay}")
        self.text_encoder = pipe.text_encoder
        self.variants = args.latent_variants
        captions = load_captions(args.captions)
        self.ids = phrase(rows, captions, pipe.tokenizer, args.caption_variants, args.seed).to(accelerator.device)
        size = pipe.unet.config.sample_size * pipe.vae_scale_factor
        mine = argparse.Namespace(**{**vars(args), "train_data": args.replay, "resolution": size})
        self.latents = Latents.encode(mine, accelerator, pipe.vae, rows, "replay", args.latent_variants)

    @torch.no_grad()
    def draw(self, count: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents [count, C, h, w], scaled as the U-Net takes them, and hidden states [count, L, D]."""

        def randint(high):
            return torch.randint(high, (count,), device=g.device, generator=g)

        index = randint(len(self.ids))
        latents = self.latents.draw(index, randint(self.variants), g)
        text = self.ids[index, randint(self.ids.shape[1])]
        return latents, self.text_encoder(text).last_hidden_state
