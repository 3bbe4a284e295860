"""Prompts: of which modality each is."""

from collections.abc import Sequence
from typing import Any

from .captions import check_caption
from .modalities import AMBIGUOUS, Modality, resolve_modality, split_prefix


def resolve_prompts(
    prompt: str | list[str] | None,
    modality: str | Sequence[Any] | None,
    batch_size: int,
    trained: list[str] | None = None,
    own: tuple[Modality, ...] = (),
    bare: bool = False,
) -> tuple[list[str], list[Modality]]:
    """The prompts without MINIM's "OCT: " in front, none where there are embeddings, and the modality of each.

    Args:
        prompt: one or several, or None where there are embeddings.
        modality: of all, or of each; None where the prompts begin with it.
        batch_size: how many prompts there are.
        trained, own: as for `resolve_modality`.
        bare: prompts stay as they stand where `modality` is given.

    Raises:
        ValueError: a prompt is empty, or its modality is missing, unknown, ambiguous, not trained, or another one
            than its prefix says; or there are not as many modalities as prompts.
    """
    names: list[Any] = list(modality) if isinstance(modality, (list, tuple)) else [modality] * batch_size
    if len(names) != batch_size:
        raise ValueError(f"`modality` has {len(names)} entries for {batch_size} prompts: {modality!r}.")
    if prompt is None:
        if modality is None:
            raise ValueError("`prompt_embeds` need `modality`: it decides how the image is decoded.")
        return [], [resolve_modality(name, trained, own) for name in names]

    prompts, modalities = [], []
    for text, name in zip([prompt] if isinstance(prompt, str) else prompt, names):
        prefix, rest = split_prefix(text, trained, own)
        if name is None and prefix is None:
            allowed = ", ".join(map(repr, trained)) if trained else "see `minim_pipeline.MODALITIES`"
            raise ValueError(
                f"`modality` is missing for {text!r}: pass `modality=` ({allowed}), or begin the prompt with it,"
                ' as in "OCT: macular edema".'
            )
        resolved = resolve_modality(prefix if name is None else name, trained, own)
        if prefix is not None and prefix.lower() in AMBIGUOUS and name is not None:
            rest = text  # "CT: ..." beside modality="chest_ct" is part of the sentence
        elif prefix is not None and resolve_modality(prefix, own=own) != resolved:
            raise ValueError(f"The prompt {text!r} begins with {prefix!r}, but `modality` is {name!r}.")
        if not rest.strip():
            raise ValueError(f"`prompt` is empty: {text!r}.")
        check_caption(rest)
        if bare and name is not None:
            rest = text  # as it stands
        prompts.append(rest.strip())
        modalities.append(resolved)
    return prompts, modalities
