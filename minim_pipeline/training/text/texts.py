"""The texts that the text encoder learns from, as users type them, and the tokenizer that is made of them.

Beside the captions they are medical sentences from templates, with far more words and ways to say no. Only the text
encoder is trained on these, so that an unseen wording lands near one that the image model knows.
"""

import json
import random
import re
import string
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from ...data.sources import read_dataset
from ...data.table import AS_USUAL, Columns
from ...modalities import MODALITIES, resolve_modality
from ..captions import never_trained_on, normalize, vary_caption


BOS, EOS = "<|startoftext|>", "<|endoftext|>"
IGNORE = -100
SIDES = {"left": 1, "os": 1, "lul": 1, "lll": 1, "right": 2, "od": 2, "rul": 2, "rml": 2, "rll": 2}
NEGATIONS = set(
    "no not non without absent absence negative none nothing neither nor against free normal excluded excludes out "
    "never lack lacks lacking".split()
)


@lru_cache
def load_corpus() -> dict:
    """Reads `corpus.json`.

    `synonyms`: what is written -> what the teacher reads, as abbreviations, lay words and British spelling mean their
    long, plain form. `regions`: of each body part its share of the sentences, modality ids, sites, findings and
    diseases, those of the captions and many more. `affirmed`, `negated` and `normal`: templates. `qualifiers`, and
    what stands before and behind a sentence, `intros` and `tails`. `paired`: the organ of a modality that has a side.
    """
    return json.loads(Path(__file__).parents[1].joinpath("corpus.json").read_text(encoding="utf-8"))


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


def read_rows(
    path: str | Path, split: str, modality: str | None = None, columns: Columns = AS_USUAL
) -> list[tuple[str, str, str]]:
    """Distinct (text, modality id, finding) of a table; arguments as of `read_dataset`."""
    options: dict[str, Any] = {"check_images": False, "modality": modality, "columns": columns}
    rows = read_dataset(path, require=("Text", "modality"), **options)
    rows = [row for row in rows if row.get("split", split) == split]
    return sorted({(r["Text"], resolve_modality(r["modality"]).id, r.get("finding", "")) for r in rows})


def train_tokenizer(texts: list[str], vocab_size: int, max_length: int) -> CLIPTokenizer:
    """A CLIP tokenizer (byte-level BPE, lower case) of `texts`; it can spell any word.

    The modality tokens come last, as special tokens.
    """
    reference = CLIPTokenizer()  # for CLIP's own normalizer and pre-tokenizer
    bpe = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    bpe.normalizer = reference.backend_tokenizer.normalizer
    bpe.pre_tokenizer = reference.backend_tokenizer.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Every character also as a word's last one: the trainer adds only those that it saw there, the rest would be unk.
    units = alphabet + [c + "</w>" for c in alphabet]
    options: dict[str, Any] = {"min_frequency": 2, "end_of_word_suffix": "</w>", "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(alphabet) - 2, initial_alphabet=alphabet, **options)
    bpe.train_from_iterator(texts, trainer)
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = dict.fromkeys([*units, *("".join(m) for m in merges), BOS, EOS])
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)
    special = [AddedToken(m.token, special=True, normalized=False) for m in MODALITIES.values()]
    tokenizer.add_tokens(special, special_tokens=True)
    return tokenizer


def corrupt(text: str, rng: random.Random) -> str:
    """`text` as somebody in a hurry types it: a word may be missing or misspelt, but never one that denies."""
    words = text.split()
    free = [i for i, word in enumerate(words) if not NEGATIONS & set(normalize(word).split())]
    if len(words) > 3 and free and rng.random() < 0.15:
        words[rng.choice(free)] = ""
    long = [i for i in free if len(words[i]) > 5]
    if long and rng.random() < 0.15:
        i = rng.choice(long)
        word = words[i]
        j = rng.randrange(1, len(word) - 2)
        missing = word[:j] + word[j + 1 :]
        swapped = word[:j] + word[j + 1] + word[j] + word[j + 2 :]
        wrong = word[:j] + rng.choice(string.ascii_lowercase) + word[j + 1 :]
        words[i] = rng.choice((missing, swapped, wrong))
    return " ".join(filter(None, words))


def side_of(text: str) -> int:
    """0 neither or both, 1 left, 2 right."""
    sides = {SIDES[word] for word in normalize(text).split() if word in SIDES}
    return sides.pop() if len(sides) == 1 else 0


class Texts:
    """Draws what the student reads, with its labels.

    A sample is a dict: `text` with its modality token, `target` the index of the teacher's embedding (or IGNORE),
    `modality`, `finding` (index among all, or IGNORE), `negated` (or IGNORE), `side`.
    """

    def __init__(self, captions: dict, rows: list[tuple[str, str, str]], corpus_size: int, rng: random.Random):
        self.captions, self.rows, self.rng = captions, rows, rng
        self.modalities = list(MODALITIES)
        self.findings = [(m, f) for m, findings in captions.items() for f in findings]
        new = {normalize(p) for m, f in self.findings for p in never_trained_on(captions[m][f])}
        self.new = new
        self.phrasings = [(p, m, f) for m, f in self.findings for p in captions[m][f]["train"]]
        by_finding: dict[tuple[str, str], list[str]] = {}
        for text, modality, finding in rows:
            by_finding.setdefault((modality, finding), []).append(text)
        self.rows_of = list(by_finding.items())
        self.corpus = [s for s in generate(corpus_size, rng) if normalize(s[0]) not in new]
        # What the teacher embeds, clean and spelt out: abbreviations and lay words on their own, phrasings, corpus.
        self.terms = [term for term in load_corpus()["synonyms"] if normalize(term) not in new]
        sources = [*self.terms, *(p for p, _, _ in self.phrasings), *(text for text, _, _ in self.corpus)]
        self.targets = list(dict.fromkeys(map(expand, sources)))
        self.target_index = {text: i for i, text in enumerate(self.targets)}
        # No phrasing that measures what the model understands is learned from.
        leaked = [t for t in [*sources, *(text for text, _, _ in rows)] if normalize(t) in new]
        if leaked:
            raise ValueError(f"Phrasings kept for measuring are among the texts to train on: {leaked}.")

    def all(self) -> list[str]:
        """Every clean text: what the tokenizer is trained on."""
        captions = [p for p, _, _ in self.phrasings] + [text for text, _, _ in self.rows]
        words = [m.words for m in MODALITIES.values()] + [a for m in MODALITIES.values() for a in m.aliases]
        # Captions count more than templates: their words should be whole tokens.
        return captions * 10 + words * 10 + self.terms * 3 + [text for text, _, _ in self.corpus] + self.targets

    def draw(self) -> dict:
        rng = self.rng
        modality: str | None
        target = negated = finding_index = IGNORE
        kind = rng.random()
        if kind < 0.4:
            text, modality, negated = rng.choice(self.corpus)
            target = self.target_index[expand(text)]
            text = abbreviate(text, rng) if rng.random() < 0.3 else text
        elif kind < 0.45:
            text = rng.choice(self.terms)
            modality = rng.choice(self.modalities)
            target = self.target_index[expand(text)]
        elif kind < 0.8 or not self.rows:
            modality, finding = rng.choice(self.findings)
            text = rng.choice(self.captions[modality][finding]["train"])
            target = self.target_index[expand(text)]
            finding_index = self.findings.index((modality, finding))
            text = decorate(text, rng)
            if rng.random() < 0.2:
                organ = load_corpus()["paired"].get(modality, "side")
                text = f"{text.removesuffix('.')}, {rng.choice(('left', 'right'))} {organ}"
        else:
            # By finding first: a few name age and side in hundreds of captions, others have only three.
            (modality, finding), texts = rng.choice(self.rows_of)
            text = vary_caption(rng.choice(texts), modality, finding, rng, self.captions)
            if (modality, finding) in self.findings:
                finding_index = self.findings.index((modality, finding))
        clean, text = text, corrupt(text, rng)
        if normalize(text) in self.new:
            text = clean
        if normalize(text) in self.new:
            return self.draw()
        sample = {"target": target, "finding": finding_index, "negated": negated, "side": side_of(text)}
        if finding_index == IGNORE and rng.random() < 0.3:
            # A sentence means the same whatever its modality, and without any.
            modality = rng.choice([*self.modalities, None])
        if modality is None:
            return sample | {"text": text, "modality": IGNORE}
        return sample | {"text": f"{MODALITIES[modality].token} {text}", "modality": self.modalities.index(modality)}

    def batches(self, batch_size: int, batches: int = 8) -> list[list[dict]]:
        """`batches` batches of texts of like length: shorter padding."""
        samples = sorted((self.draw() for _ in range(batch_size * batches)), key=lambda s: len(s["text"]))
        chunks = [samples[i : i + batch_size] for i in range(0, len(samples), batch_size)]
        self.rng.shuffle(chunks)
        return chunks
