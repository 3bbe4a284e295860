"""What becomes of a pipeline's filter head when its U-Net is trained on: inherited where it stays valid."""

from collections.abc import Sequence

from ... import FilterHead, MinimPipeline


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
