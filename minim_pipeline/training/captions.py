"""Phrasings of every finding, and captions that vary from one reading to the next.

`captions.json` holds, per modality id and finding, phrasings to train on (`"train"`) and phrasings that nothing is
ever trained on (`"new"`), with which one measures whether a model understands what it was not taught, and finds
thresholds. `captions_test.json` (`"test"`) is for final figures only: nothing is trained on it, and nothing chosen by
it. Its phrasings are not in the style of the others, but, in turn, a GP's letter, a nurse's note, a student's remark,
a non-native speaker's sentence, a billing-like term, and a prompt of somebody in machine learning.
"""

import json
import random
import re
from functools import lru_cache
from pathlib import Path

import torch
from transformers import CLIPTokenizer

from .. import CAPTIONS
from ..captions import without_prefix
from ..modalities import resolve_modality
from ..tokens import tokenize
from .rows import tell_cut


Phrasings = dict[str, dict[str, dict[str, list[str]]]]  # as `load_captions` gives them

# What a caption is varied by; the rest is beside, in `wording.json`. Of its `grades`, which say more than the finding
# (stage, extent, kind, age, MR sequence), a row may lose one, but must never get one that it does not have, or a
# child's pneumonia might become an adult's. Those that say the same are one in `same_grade`.
_WORDING = json.loads(Path(__file__).with_name("wording.json").read_text(encoding="utf-8"))
_GRADE = re.compile(rf"\b({'|'.join(_WORDING['grades'])})\b", re.IGNORECASE)

# Words without which a caption says the same. Never a negation, a finding, a side or a grade, and never the A of a
# class, as in "type A dissection" or, in lower case, "hepatitis a": they are taken only where an article can stand, at
# the beginning or after a word that one follows.
_FILLER = re.compile(
    rf"(^|[.;:]\s+|\b(?:{'|'.join(_WORDING['before_article'])})\s+)"
    r"((?:(?:(?:a|an|the)(?!\s+(?:and|or|to)\b)|evidence\s+of|signs\s+of)\s+)+)(?=[^\W\d_]{2}|\d)",
    re.IGNORECASE,
)
# "A fib", "A flutter", "A lines": the A is of the name.
_NO_ARTICLE = re.compile(r"(?:fib\w*|flutter|lines?|waves?|scans)\b", re.IGNORECASE)
_AGE = re.compile(r"(\d+)-year-old (male|female)")
_SIZE = re.compile(r"mass about (\d+) mm")


def load_captions(path: str | Path | None = None) -> Phrasings:
    """Reads `{modality id: {finding: {"train": [...], "new": [...]}}}` from `path` (default: `captions.json`).

    If there is a file `<name>_test.json` beside `<name>.json`, what it holds as `{modality id: {finding: [...]}}` is
    under `"test"`.

    Raises:
        ValueError: that file has phrasings of a finding which `path` does not know.
    """
    path = Path(path or CAPTIONS)
    captions = json.loads(path.read_text(encoding="utf-8"))
    test = path.with_name(f"{path.stem}_test.json")
    if test.is_file():
        held_out = json.loads(test.read_text(encoding="utf-8"))
        pairs = [(modality, finding) for modality, findings in held_out.items() for finding in findings]
        unknown = [pair for pair in pairs if pair[1] not in captions.get(pair[0], {})]
        if unknown:
            raise ValueError(f"{test} has phrasings of findings that {path} does not know: {unknown}.")
        for modality, finding in pairs:
            captions[modality][finding]["test"] = held_out[modality][finding]
    return captions


def never_trained_on(phrasings: dict[str, list[str]]) -> list[str]:
    """Those of a finding's phrasings that are kept for measuring."""
    return phrasings["new"] + phrasings.get("test", [])


@lru_cache(maxsize=2**14)  # The same phrasings are asked for with every caption of a data set.
def normalize(text: str) -> str:
    """Lower case, letters and digits only: two captions that differ otherwise count as the same."""
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()


def split_suffix(text: str, phrasings: list[str]) -> tuple[str | None, list[str]]:
    """Splits `"Normal fundus, OS."` into a known phrasing and what follows it, `("Normal fundus", ["OS"])`.

    The longest phrasing that `text` starts with counts; `(None, [])` if there is none.
    """
    text = text.strip().removesuffix(".")
    bases = [p.removesuffix(".") for p in phrasings]
    bases = [b for b in bases if f"{text.lower()}, ".startswith(f"{b.lower()}, ")]
    if not bases:
        return None, []
    base = max(bases, key=len)
    return text[: len(base)], [part for part in text[len(base) :].split(", ") if part]


@lru_cache(maxsize=2**14)
def grades(text: str) -> frozenset[str]:
    """What `text` names beyond the finding: stage, extent, kind, e.g. `{"mild", "nonproliferative"}`."""
    found = {re.sub(r"[- ]", "", g.lower()) for g in _GRADE.findall(text)}
    return frozenset(_WORDING["same_grade"].get(g, g) for g in found)


def vary_caption(text: str, modality_id: str, finding: str | None, rng: random.Random, captions: Phrasings) -> str:
    """One of many ways to say what the caption `text` of an image says.

    Takes the text itself or another phrasing of its finding (never one that names a stage, an extent, an age or an MR
    sequence which neither `text` nor the finding names), keeps what `text` adds (side, view, age and sex, size; now
    and then dropped, never changed), and varies spelling, case, filler words and the final period. A text of an
    unknown finding gets only these light changes.

    It is never one of the phrasings kept under `"new"` or `"test"`. `captions` are those of `load_captions`, and `rng`
    is the only source of randomness.
    """
    known = captions.get(modality_id, {}).get(finding or "", {"train": [], "new": []})
    text = re.sub(r"\s+", " ", text.replace("___", " ")).strip()
    text = re.sub(r",(?=[^\W\d])", ", ", text)
    base, suffix = split_suffix(text, known["train"])
    if base is None:
        # The row's finding may stand behind others, as in "Pneumonia, edema": it comes first.
        parts = text.removesuffix(".").split(", ")
        base = next((part for part in parts if split_suffix(part, known["train"])[0]), None)
        suffix = [part for part in parts if part is not base]
    varied = text
    if base is not None:
        named = grades(text)
        known_additions = (
            part in _WORDING["suffixes"] or _AGE.fullmatch(part) or _SIZE.fullmatch(part) for part in suffix
        )
        if rng.random() > (0.5 if named or not all(known_additions) else 0.3):
            base = rng.choice([p for p in known["train"] if grades(p) <= named | grades(finding)])
        varied = _join(base.removesuffix("."), suffix, rng)
    varied = _restyle(varied, rng)
    return text if normalize(varied) in map(normalize, never_trained_on(known)) else varied


def _join(base: str, suffix: list[str], rng: random.Random) -> str:
    if rng.random() < 0.15:
        return base + "."
    parts = [base]
    for part in suffix:
        if age := _AGE.fullmatch(part):
            years, sex = age.groups()
            person = {"male": "man", "female": "woman"}[sex]
            part = rng.choice(
                (part, part, f"{years}-year-old {person}", f"{years} y/o {sex}", f"{sex}, {years} years")
            )
        elif size := _SIZE.fullmatch(part):
            mm = size[1]
            part = rng.choice((part, f"about {mm} mm in size", f"{mm} mm mass", f"lesion of {int(mm) / 10:g} cm"))
        elif part in ("right eye", "left eye") and rng.random() < 0.15:
            parts.insert(0, part)
            continue
        parts.append(rng.choice(_WORDING["suffixes"].get(part, (part,))))
    return ", ".join(parts) + "."


def _restyle(text: str, rng: random.Random) -> str:
    if rng.random() < 0.3:
        text = _FILLER.sub(_without_filler, text)
    if rng.random() < 0.1:
        for american, british in _WORDING["british"].items():
            text = re.sub(rf"\b{american}", british, text)
    if rng.random() < 0.5:
        text = text.removesuffix(".")
    return text.lower() if rng.random() < 0.3 else text


def _without_filler(match: re.Match) -> str:
    before, words = match.groups()
    if words.strip() == "A" and _NO_ARTICLE.match(match.string, match.end()):
        return match[0]
    # "stage of A", "AN": a capital is an article's only at the beginning of a sentence.
    first = words[0].lower() if not before.strip(" .;:") else words[0]
    return before if (first + words[1:]).islower() else match[0]


def phrase(rows: list[dict], captions: dict, tokenizer: CLIPTokenizer, variants: int, seed: int) -> torch.Tensor:
    """Token ids [N, variants, L] of the rows' captions, as `phrase_once`."""
    ids, where = phrase_once(rows, captions, tokenizer, variants, seed)
    return ids[where]


def phrase_once(
    rows: list[dict], captions: dict, tokenizer: CLIPTokenizer, variants: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows' captions, each in several phrasings behind its modality's token: every text once, and whose it is.

    A single variant is the caption as it stands. Captions that are longer than the encoder reads are told.

    Returns:
        Token ids [T, L] of the different texts, and the places in them of each row's phrasings, int64 [N, variants].
    """
    rng = random.Random(seed)
    kinds = [resolve_modality(row["modality"]) for row in rows]
    # The pipeline takes MINIM's "OCT: " from a prompt, so it must not be learned either.
    plain = [without_prefix(row["Text"], modality) for row, modality in zip(rows, kinds, strict=True)]
    tell_cut([f"{modality.token} {text}" for text, modality in zip(plain, kinds, strict=True)], tokenizer)
    places: dict[str, int] = {}
    where = torch.empty(len(rows), variants, dtype=torch.int64)
    for i, (row, modality, own) in enumerate(zip(rows, kinds, plain, strict=True)):
        for j in range(variants):
            text = vary_caption(own, modality.id, row.get("finding"), rng, captions) if variants > 1 else own
            where[i, j] = places.setdefault(f"{modality.token} {text}", len(places))
    texts = list(places)
    parts = (tokenize(tokenizer, texts[start : start + 4096]) for start in range(0, len(texts), 4096))
    return torch.cat(list(parts)), where
