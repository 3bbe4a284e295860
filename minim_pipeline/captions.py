"""What a caption or a prompt says beyond its finding: nothing at all, its modality, or a side."""

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from .modalities import AMBIGUOUS, Modality, resolve_modality, split_prefix


# What spreadsheets, pandas and databases write where there is no caption; compared without case and spaces around.
_MISSING = frozenset(
    "nan -nan none null nil na n/a n.a. n.a #n/a #na <na> nat undefined missing unknown tbd todo empty"
    " 1.#ind -1.#ind 1.#qnan -1.#qnan #value! #ref! #name? n.a".split()
) | {"not available", "not applicable", "no caption", "no text", "no description"}


def check_caption(text: str) -> None:
    """Raises ValueError if `text` stands for a missing caption: "nan", "None.", "(N/A)", "null", "-" and the like.

    It would be drawn and learned as if it were a finding. An empty text is left to the caller.
    """
    plain = text.strip()
    words = re.split(r"[,;/|]\s+", plain.lower().strip("()[]{}\"'.!?,; "))
    missing = plain.lower() in _MISSING or all(word in _MISSING for word in words)
    if missing or (plain and not any(map(str.isalnum, plain))):
        advice = "say what the image shows, or leave it out"
        raise ValueError(f"{text!r} is no caption, but what stands where one is missing: {advice}.")


def without_prefix(text: str, modality: Modality) -> str:
    """`text` without MINIM's "OCT: " in front, if that names `modality`: as the pipeline reads it."""
    prefix, rest = split_prefix(text)
    own = prefix and rest and prefix.lower() not in AMBIGUOUS and resolve_modality(prefix) == modality
    return rest if own else text


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
        modality: of all, or of each; None where the prompts begin with it.
        batch_size: how many prompts, or embeddings in their place, there are.
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
            ways = f'pass `modality=` ({allowed}), or begin the prompt with it, as in "OCT: macular edema"'
            raise ValueError(f"`modality` is missing for {text!r}: {ways}.")
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


def names_a_side(caption: str) -> bool:
    """Whether a caption speaks of left or right, so that mirroring its image would make it wrong.

    In words, abbreviations and positions on a clock face, in English, Latin and a dozen other languages. In doubt it
    says yes: an image that is not mirrored costs little, one that is and must not be teaches the wrong side.
    """
    caption = unicodedata.normalize("NFKC", caption)
    return any(pattern.search(caption) for pattern in (_WORDS, _CAPITALS, _LETTERS, _CLOCK, _SIGNS))


def may_mirror(modality: Modality, *texts: str) -> bool:
    """Whether an image of `modality` may be mirrored without making any of `texts`, all that is said of it, wrong."""
    return modality.flip and not any(map(names_a_side, texts))


_WORDS = re.compile(
    r"\b(?:"
    # English: left-sided, rightward; abbreviations.
    r"left\w*|right\w*|lt|rt(?!-?pcr)|lft|rgt|"
    # Latin, and what is made of it: oculus sinister, O.D., o. s., dextrocardia, levoscoliosis, situs inversus.
    r"o\s?[.,]?\s?[ds]|sinist\w*|dext\w*|dx|sx|[lr]hs|sin\.|levo\w*|laevo\w*|situs|"
    # German, Dutch: links, linksseitig, linke, linker, rechts, rechtes Auge, li., re.
    r"link\w*|recht\w*|li\.|re\.|"
    # French: œil gauche, à droite.
    r"gauche\w*|droit\w*|"
    # Spanish, Portuguese, Italian, Romanian.
    r"izq\w*|derech\w*|dch[ao]|esquerd\w*|direit\w*|sinistr\w*|destr[aeio]\w*|st[aâ]ng\w*|drept\w*|"
    # Danish, Norwegian, Swedish, Finnish.
    r"venstre\w*|h[øö]yre\w*|h[øö]jre\w*|vänster\w*|höger\w*|vasen\w*|vasem\w*|oike[ai]\w*|"
    # Polish, Czech, Russian, Ukrainian.
    r"lew[aeyią]\w*|praw[aeyią]\w*|lev[áéýou]\w*|prav[áéýou]\w*|лев\w*|лів\w*|прав\w*|слева|справа|"
    # Greek, Turkish, Indonesian, Vietnamese.
    r"αριστερ\w*|δεξι\w*|sol|sağ|kiri|kanan|trái|phải"
    r")(?!\w)",
    re.IGNORECASE,
)
# Left or right eye, breast, artery, lobe, quadrant, view; chambers of the heart. In capitals only: "la" and "re" are
# words.
_CAPITALS = re.compile(
    r"\b(?:[LR]E|[LR]A|[LR]V|O[GIE]|[LR](?:UL|ML|LL)|[LR][UL][IO]?Q|[LR](?:[MAP]?CA|ICA|VA)|LAD|[LR]MLO|[LR]CC(?=\s+(?:view|mammo|image))|[LR]H[SD]?)\b"
)
# A letter of its own, "L MCA", "(R)", "L-sided", "R_frontal", but not "L3" or "r/o"; a small one only before a word,
# or set apart: "(l)", ", l".
_LETTERS = re.compile(
    r"(?<![^\W_])[LR](?![^\W_])|\([lr]\)|,\s*[lr](?=[\s.,;]*$)|(?<![\w'’/.])[lr]\.?(?:\s+(?=[^\W\d]{2})|-(?=side|lateral|hemi))"
)
# 10 o'clock, 10:30, 3h, 10 Uhr, à 10 heures, a las 10.
_CLOCK = re.compile(
    r"o\W{0,2}clock|\b\d{1,2}:\d{2}\b|\b(?:1[0-2]|[1-9])\s?(?:h|uhr|heures?|horas?|ore|uur)\b|\b(?:las|horas?)\s\d",
    re.IGNORECASE,
)
# Languages without spaces, or with endings in front.
_SIGNS = re.compile(r"[左右]|왼쪽|오른쪽|좌측|우측|يمين|يسار|أيمن|أيسر|שמאל|ימין|बाएँ|बायां|दाएँ|दायां")
