"""Examples of what each modality shows, and whether a sentence rather speaks of another modality's."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from minim_pipeline import CAPTIONS
from minim_pipeline.modalities import Modality


EXAMPLES = json.loads((Path(__file__).parent / "pages" / "examples.json").read_text(encoding="utf-8"))
MOST_EXAMPLES = 6


def examples_of(modality: str, findings: Mapping[str, Sequence[str]]) -> list[str]:
    """Prompts to begin with: the page's own, or the findings that the model has learned of a modality."""
    return EXAMPLES.get(modality) or list(findings.get(modality, []))[:MOST_EXAMPLES]


def words_of(text: str) -> set[str]:
    """The words of three letters and more, without a plural's s."""
    return {word.removesuffix("s") for word in re.findall(r"[^\W\d_]{3,}", text.lower())}


class Vocabulary:
    """The words that are used of each modality, as `captions.json`, the model's findings and the examples have them.

    Args:
        modalities: those that can be drawn, by id.
        findings: those that the model has learned, by modality id.
    """

    def __init__(self, modalities: Mapping[str, Modality], findings: Mapping[str, Sequence[str]]):
        phrasings = json.loads(CAPTIONS.read_text(encoding="utf-8"))
        self.names = {name: modality.name for name, modality in modalities.items()}
        self.known: dict[str, set[str]] = {}  # all words of a modality
        self.usual: dict[str, set[str]] = {}  # those that occur more than once, or name it or a finding
        for name, modality in modalities.items():
            own = phrasings.get(name, {})
            texts = [text for kinds in own.values() for phrased in kinds.values() for text in phrased]
            spellings = [name.replace("_", " "), modality.name, modality.words, *modality.aliases]
            named = words_of(" ".join([*spellings, *findings.get(name, []), *own]))
            counts = Counter(word for text in texts + examples_of(name, findings) for word in words_of(text))
            self.known[name] = named | set(counts)
            self.usual[name] = named | {word for word, count in counts.items() if count > 1}
        self.shared = Counter(word for words in self.known.values() for word in words)

    def others(self, prompt: str, modality: str) -> list[str]:
        """Ids of the modalities, at most two, that a prompt speaks of where it says nothing of `modality` itself."""
        # What most modalities have in common, as "normal" or "left", tells none of them.
        telling = {word for word in words_of(prompt) if self.shared[word] <= max(1, len(self.known) // 2)}
        if telling & self.known[modality]:
            return []
        hits = Counter({name: len(telling & words) for name, words in self.usual.items() if telling & words})
        return [name for name, count in hits.most_common(2) if count == max(hits.values())]

    def remark(self, prompt: str, modality: str) -> str:
        """What is said of such a prompt; empty for any other."""
        others = " or ".join(self.names[name] for name in self.others(prompt, modality))
        return f"This sounds like {others}, but {self.names[modality]} is chosen." if others else ""
