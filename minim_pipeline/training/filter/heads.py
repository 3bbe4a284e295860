"""Filter heads to start with: new, made of another, or what is left of one when its pipeline is trained on."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from ... import MinimPipeline
from ...minim_filter import FilterHead
from ...minim_filter.selection import Thresholds
from ...modalities import MODALITIES


def new_head(pipe: MinimPipeline, block_out_channels: tuple[int, int], rates_realism: bool = False) -> FilterHead:
    """A head with random weights for the latents and the tokenizer of `pipe`."""
    return FilterHead(
        in_channels=pipe.unet.config.in_channels,
        sample_size=pipe.unet.config.sample_size,
        latent_scale=pipe.vae.config.scaling_factor,
        vocab_size=len(pipe.tokenizer),
        max_length=pipe.tokenizer.model_max_length,
        pad_token_id=pipe.tokenizer.pad_token_id,
        block_out_channels=block_out_channels,
        rates_realism=rates_realism,
    )


def extend_head(base: FilterHead, pipe: MinimPipeline) -> FilterHead:
    """A head like `base` that also reads the tokens of modalities which the pipeline has learned since.

    The row of a new modality in the embedding starts as the mean of those of its words, as in the text encoder; so
    does that of a token which lay there unused, of a modality for which a calibrated head has no thresholds.

    Thresholds stay until `calibrate_filter.py` finds new ones. Fingerprints go, and with them the thresholds for
    copies: they are read from features that are about to change. The code, which that script fits, begins anew. The
    thresholds of realism go as well: no scale from 1 to 3 holds them.

    Raises:
        ValueError: `base` was trained for other latents, or for a larger vocabulary.
    """
    tokenizer, old = pipe.tokenizer, base.config.vocab_size
    of_pipe = {"in_channels": pipe.unet.config.in_channels, "latent_scale": pipe.vae.config.scaling_factor}
    for name, value in of_pipe.items():
        if base.config[name] != value:
            raise ValueError(f"The head was trained for {name} {base.config[name]}, the pipeline has {value}.")
    if len(tokenizer) < old:
        raise ValueError(f"The head was trained for {old} tokens, the pipeline has only {len(tokenizer)}.")
    thresholds = Thresholds.read(base.config.calibration)
    calibration = {name: replace(found, copy=-1, realism=None).entry() for name, found in thresholds.items()} or None
    changed = {"vocab_size": len(tokenizer), "num_fingerprints": 0, "calibration": calibration}
    head = FilterHead.from_config({**base.config, **changed})
    fresh = {name: value for name, value in head.state_dict().items() if name.startswith("code.")}
    state = {**base.state_dict(), **fresh, "fingerprints": head.fingerprints}
    rows = torch.cat([state["text.tokens.weight"], head.text["tokens"].weight.detach()[old:]])
    for name in pipe.config.modalities or []:
        token = tokenizer.convert_tokens_to_ids(MODALITIES[name].token)
        if token >= old or (calibration and name not in calibration):
            words = tokenizer(MODALITIES[name].words, add_special_tokens=False).input_ids
            rows[token] = rows[words].mean(0)
    head.load_state_dict({**state, "text.tokens.weight": rows})
    return head


def inherited_filter(base: MinimPipeline, new: Sequence[str], resolution: int) -> tuple[FilterHead | None, str]:
    """The head of `base` if it fits what is trained, and in words what becomes of it; empty where there is none.

    It reads latents and token ids with a text tower of its own, so that U-Net and text encoder may change.

    Args:
        new: modalities whose tokens are added.
        resolution: of the images, in pixels.
    """
    head = base.filter_head
    if head is None:
        return None, ""
    learned = head.config.sample_size * base.vae_scale_factor
    if new:
        why = f"it does not know {', '.join(new)}: add_modality.py teaches it along with the U-Net."
    elif learned != resolution:
        why = f"it has learned from {learned} px, not {resolution}: train_filter.py makes another."
    else:
        message = "The filter head of the base is kept, and its thresholds."
        if head.config.num_fingerprints:
            message += " It finds copies of the images that the base has learned from, and not of these:"
            message += " calibrate_filter.py makes new fingerprints."
        return head, message
    return None, f"The filter head of the base is left out: {why}"
