"""The tokens that stand for modalities: how a text encoder gets them, and how a prompt uses them."""

import torch
from tokenizers import AddedToken
from transformers import CLIPTextModel, CLIPTokenizer

from .modalities import MODALITIES, Modality, resolve_modality


def tokenize(tokenizer: CLIPTokenizer, texts: list[str], length: int | None = None) -> torch.Tensor:
    """Token ids [N, L], cut and filled up to `length`, by default the tokenizer's L."""
    length = length or tokenizer.model_max_length
    return tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids


def cut_texts(tokenizer: CLIPTokenizer, texts: list[str], length: int | None = None) -> list[tuple[str, str]]:
    """Those of `texts` that `tokenize` cuts, each with what it loses."""
    distinct, lost = list(dict.fromkeys(texts)), {}
    longest = length or tokenizer.model_max_length
    for start in range(0, len(distinct), 4096):
        part = distinct[start : start + 4096]
        for text, ids in zip(part, tokenizer(part, verbose=False).input_ids, strict=True):
            if len(ids) > longest:
                # The last id of the uncut sequence is the end-of-text token.
                lost[text] = tokenizer.decode(ids[longest - 1 : -1])
    return [(text, lost[text]) for text in texts if text in lost]


def add_modality_tokens(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, ids: list[str]) -> dict[str, int]:
    """Adds the modalities' tokens to `tokenizer` and `text_encoder`, in place. Tokens that are there already stay.

    Each new row of the embedding starts as the mean embedding of the modality's words, e.g. `<brain_mri>` as that of
    "brain mri". The tokens are special ones, or `unload_textual_inversion()` would delete them. The encoder's
    `eos_token_id` becomes the tokenizer's: the 2 in old CLIP configs makes CLIP pool at the highest id of the
    sequence, which would be the new token instead of the end of the sentence.

    Call it on a finished vocabulary: diffusers expects the special tokens to be the last of it but for those of
    textual inversions.

    Args:
        text_encoder: its input embedding grows to `len(tokenizer)` rows.
        ids: ids, names or aliases of modalities; ValueError for one that is unknown or ambiguous.

    Returns:
        The token id of each modality, by the modality's id.
    """
    modalities = [resolve_modality(name) for name in ids]
    new = [m for m in modalities if m.token not in tokenizer.added_tokens_encoder]
    tokenizer.add_tokens([AddedToken(m.token, special=True, normalized=False) for m in new], special_tokens=True)
    if len(tokenizer) > text_encoder.get_input_embeddings().num_embeddings:
        text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)

    weight = text_encoder.get_input_embeddings().weight  # (vocabulary, hidden)
    with torch.no_grad():
        for m in new:
            words = tokenizer(m.words, add_special_tokens=False).input_ids
            weight[tokenizer.convert_tokens_to_ids(m.token)] = weight[words].float().mean(0).to(weight.dtype)

    text_encoder.config.eos_token_id = tokenizer.eos_token_id
    # The module that pools has its own copy of the id.
    for module in text_encoder.modules():
        if hasattr(module, "eos_token_id"):
            module.eos_token_id = tokenizer.eos_token_id
    return {m.id: tokenizer.convert_tokens_to_ids(m.token) for m in modalities}


def modality_tokens(tokenizer: CLIPTokenizer) -> list[str]:
    """The modalities' tokens that a tokenizer knows, e.g. `["<oct>", "<cxr>"]`."""
    return [m.token for m in MODALITIES.values() if m.token in tokenizer.added_tokens_encoder]


def prompt_text(prompt: str, modality: Modality, tokenizer: CLIPTokenizer) -> str:
    """What the text encoder is given: `"<oct> macular edema"`.

    A tokenizer without the token, such as Stable Diffusion's own, gets the modality's words in its place:
    `"chest x ray, pleural effusion"`.
    """
    if modality.token in tokenizer.added_tokens_encoder:
        return f"{modality.token} {prompt}".rstrip()
    return f"{modality.words}, {prompt}" if prompt else modality.words


def negative_text(negative_prompt: str, modality: Modality, tokenizer: CLIPTokenizer) -> str:
    """What the text encoder is given for the negative side of guidance: the token, then `negative_prompt` if any.

    With the token on both sides guidance strengthens what the sentence says, not the modality. A tokenizer without
    the token gets `negative_prompt` alone, as Stable Diffusion was trained.
    """
    if modality.token in tokenizer.added_tokens_encoder:
        return f"{modality.token} {negative_prompt}".rstrip()
    return negative_prompt
