"""Medical sentences from templates: far more words and ways to say no than the captions hold.

Only the text encoder is trained on them, so that an unseen wording lands near one that the image model knows.
"""

import json
import random
import re
from functools import lru_cache
from pathlib import Path


@lru_cache
def load_corpus() -> dict:
    """Reads `corpus.json`.

    `synonyms`: what is written -> what the teacher reads, as abbreviations, lay words and British spelling mean their
    long, plain form. `regions`: of each body part its share of the sentences, modality ids, sites, findings and
    diseases, those of the captions and many more. `affirmed`, `negated` and `normal`: templates. `qualifiers`, and
    what stands before and behind a sentence, `intros` and `tails`. `paired`: the organ of a modality that has a side.
    """
    return json.loads(Path(__file__).with_name("corpus.json").read_text(encoding="utf-8"))


@lru_cache
def _lower_synonyms() -> tuple[dict[str, str], re.Pattern]:
    words = {word.lower(): plain for word, plain in load_corpus()["synonyms"].items()}
    longest_first = "|".join(sorted(map(re.escape, words), key=len, reverse=True))
    return words, re.compile(rf"(?<![\w-])({longest_first})(?![\w-])")


def expand(text: str) -> str:
    """`text` in lower case with abbreviations and lay words spelt out, which is what the teacher understands."""
    words, pattern = _lower_synonyms()
    return pattern.sub(lambda match: words[match[0]], text.lower())


def abbreviate(text: str, rng: random.Random) -> str:
    """The way back: one of the long forms in `text`, if it holds any, becomes a short or lay one."""
    synonyms = load_corpus()["synonyms"].items()
    found = [(word, plain) for word, plain in synonyms if re.search(rf"\b{re.escape(plain)}\b", text)]
    if not found:
        return text
    word, plain = rng.choice(found)
    return text.replace(plain, word, 1)


def generate(size: int, rng: random.Random) -> list[tuple[str, str, bool]]:
    """`size` sentences as (text, modality id, whether it denies or calls normal), most of them distinct."""
    corpus, sentences = load_corpus(), []
    regions = list(corpus["regions"].values())
    weights = [region["weight"] for region in regions]
    for _ in range(size):
        region = rng.choices(regions, weights)[0]
        kind = rng.choices(("affirmed", "negated", "normal"), (5, 3, 1))[0]
        f, g = rng.sample(region["findings"], 2)
        s, t = rng.sample(region["sites"], 2)
        words = {"f": f, "g": g, "s": s, "t": t}
        template = rng.choice(corpus[kind])
        text = template.format(**words, d=rng.choice(region["diseases"]), q=rng.choice(corpus["qualifiers"]))
        sentences.append((text, rng.choice(region["modalities"]), kind != "affirmed"))
    return sentences


def decorate(text: str, rng: random.Random) -> str:
    """`text` with words around it that change nothing of what is to be seen."""
    corpus = load_corpus()
    if rng.random() < 0.25:
        text = f"{rng.choice(corpus['intros'])} {text}"
    if rng.random() < 0.2:
        text = f"{text.removesuffix('.')} {rng.choice(corpus['tails'])}"
    return text
