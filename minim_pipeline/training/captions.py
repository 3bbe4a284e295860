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

from minim_pipeline import CAPTIONS
from minim_pipeline.captions import without_prefix
from minim_pipeline.modalities import resolve_modality
from minim_pipeline.tokens import tokenize
from minim_pipeline.training.rows import tell_cut


# What says more than the finding (stage, extent, kind, age, MR sequence): a row may lose it, but must never get one
# that it does not have, or a child's pneumonia might become an adult's.
_GRADE = re.compile(
    r"\b(mild|moderate|intermediate|severe|early|late|advanced|background|non[- ]?proliferative|npdr|"
    r"proliferative|pdr|neovasculari[sz]ation|unilateral|bilateral|bibasilar|"
    r"low(?:er)?[- ]grade|lgg|dlgg|high[- ]grade|hgg|glioblastoma|gbm|hard drusen|soft drusen|asteroid|microadenoma|"
    r"macroadenoma|intubated|"
    r"branch|brvo|central retinal vein|crvo|luminal [ab]|"
    r"child|infant|p(?:a)?ediatric|adult|senile|age-related|flair|t1c?|t2)\b",
    re.IGNORECASE,
)
_SAME_GRADE = {
    "npdr": "nonproliferative",
    "pdr": "proliferative",
    "neovascularisation": "neovascularization",
    "lgg": "lowergrade",
    "dlgg": "lowergrade",
    "lowgrade": "lowergrade",
    "hgg": "highgrade",
    "gbm": "glioblastoma",
    "brvo": "branch",
    "crvo": "centralretinalvein",
    "paediatric": "pediatric",
    "child": "pediatric",
}

# Words without which a caption says the same. Never a negation, a finding, a side or a grade, and never the A of a
# class, as in "type A dissection" or, in lower case, "hepatitis a": they are taken only where an article can stand, at
# the beginning or after a word that one follows.
_FILLER = re.compile(
    r"(^|[.;:]\s+|\b(?:with|without|of|in|on|at|by|for|from|to|as|no|is|are|has|have|had|there|shows?|showing|shown|"
    r"reveals?|revealing|demonstrates?|demonstrating|displays?|displaying|suggests?|suggesting|indicates?|indicating|"
    r"highlights?|highlighting|through|near|into|over|under|within|behind|around|beside|between|along|across)\s+)"
    r"((?:(?:(?:a|an|the)(?!\s+(?:and|or|to)\b)|evidence\s+of|signs\s+of)\s+)+)(?=[^\W\d_]{2}|\d)",
    re.IGNORECASE,
)

# "A fib", "A flutter", "A lines": the A is of the name.
_NO_ARTICLE = re.compile(r"(?:fib\w*|flutter|lines?|waves?|scans)\b", re.IGNORECASE)

_SUFFIXES = {
    "right eye": ("right eye", "right eye", "OD"),
    "left eye": ("left eye", "left eye", "OS"),
    "PA view": ("PA view", "PA", "posteroanterior view"),
    "AP view": ("AP view", "AP", "anteroposterior view"),
    "supine AP view": ("supine AP view", "AP supine"),
    "erect AP view": ("erect AP view", "AP erect"),
    "pediatric AP view": ("pediatric AP view", "pediatric", "AP view of a child"),
    "axial slice": ("axial slice", "axial"),
    "FLAIR": ("FLAIR", "FLAIR sequence", "T2 FLAIR"),
}
_AGE = re.compile(r"(\d+)-year-old (male|female)")
_SIZE = re.compile(r"mass about (\d+) mm")

_BRITISH = (
    ("edema", "oedema"),
    ("tumor", "tumour"),
    ("hemorrhage", "haemorrhage"),
    ("color ", "colour "),
    ("pediatric", "paediatric"),
    ("gray ", "grey "),
    ("etiology", "aetiology"),
    ("estrogen", "oestrogen"),
    ("fiber", "fibre"),
)


def load_captions(path: str | Path | None = None) -> dict[str, dict[str, dict[str, list[str]]]]:
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
    return frozenset(_SAME_GRADE.get(g, g) for g in found)


def vary_caption(
    text: str,
    modality_id: str,
    finding: str | None,
    rng: random.Random,
    captions: dict[str, dict[str, dict[str, list[str]]]],
) -> str:
    """One of many ways to say what the caption `text` of an image says.

    Takes the text itself or another phrasing of its finding (never one that names a stage, an extent, an age or an MR
    sequence which neither `text` nor the finding names), keeps what `text` adds (side, view, age and sex, size; now
    and then dropped, never changed), and varies spelling, case, filler words and the final period. A text of an
    unknown finding gets only these light changes.

    Args:
        text: the row's caption.
        modality_id: a key of `minim_pipeline.modalities.MODALITIES`.
        finding: the row's finding, or `None`.
        rng: the only source of randomness.
        captions: what [`load_captions`] returned.

    Returns:
        The caption; never one of the phrasings kept under `"new"` or `"test"`.
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
        kept_anyway = lambda part: part in _SUFFIXES or _AGE.fullmatch(part) or _SIZE.fullmatch(part)  # noqa: E731
        detailed = named or not all(map(kept_anyway, suffix))
        if rng.random() > (0.5 if detailed else 0.3):
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
        parts.append(rng.choice(_SUFFIXES.get(part, (part,))))
    return ", ".join(parts) + "."


def _restyle(text: str, rng: random.Random) -> str:
    if rng.random() < 0.3:
        text = _FILLER.sub(_without_filler, text)
    if rng.random() < 0.1:
        for american, british in _BRITISH:
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
    """Token ids [N, variants, L] of the rows' captions, each in several phrasings behind its modality's token.

    A single variant is the caption as it stands. Captions that are longer than the encoder reads are told.
    """
    rng = random.Random(seed)
    kinds = [resolve_modality(row["modality"]) for row in rows]
    # The pipeline takes MINIM's "OCT: " from a prompt, so it must not be learned either.
    plain = [without_prefix(row["Text"], modality) for row, modality in zip(rows, kinds, strict=True)]
    tell_cut([f"{modality.token} {text}" for text, modality in zip(plain, kinds, strict=True)], tokenizer)
    texts = []
    for row, modality, own in zip(rows, kinds, plain, strict=True):
        for _ in range(variants):
            text = vary_caption(own, modality.id, row.get("finding"), rng, captions) if variants > 1 else own
            texts.append(f"{modality.token} {text}")
    return tokenize(tokenizer, texts).reshape(len(rows), variants, -1)
