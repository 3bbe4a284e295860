"""The table of modalities: what each is called, which token it has, and what may be done to its images."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Modality:
    """One kind of image.

    Attributes:
        id: the key used in code, configs and seeds, e.g. `"chest_ct"`.
        name: how MINIM's CSV files write it, e.g. `"ChestCT"`.
        token: the special token of the tokenizer that stands for it, e.g. `"<chest_ct>"`.
        words: the words from which a new token's embedding is started.
        aliases: other spellings that are understood; case, spaces, hyphens and underscores never matter.
        grey: images have three equal channels.
        flip: a mirrored image is as plausible as the original (if its caption names no side).
    """

    id: str
    name: str
    words: str
    aliases: tuple[str, ...] = ()
    grey: bool = True
    flip: bool = False

    @property
    def token(self) -> str:
        return f"<{self.id}>"


_FUNDUS = ("fundus photograph", "fundus photography", "color fundus", "colour fundus", "cfp", "retinal photograph")
MODALITIES: dict[str, Modality] = {
    m.id: m
    for m in (
        Modality(
            "oct", "OCT", "optical coherence tomography of the retina", ("optical coherence tomography",), flip=True
        ),
        Modality("fundus", "Fundus", "color fundus photograph of the retina", _FUNDUS, grey=False, flip=True),
        # The heart lies on one side of the chest: a mirrored chest is another diagnosis (situs inversus).
        Modality("cxr", "CXR", "chest x ray", ("chest x-ray", "chest xray", "chest radiograph", "x-ray", "xray")),
        Modality("chest_ct", "ChestCT", "axial chest ct", ("chest computed tomography", "thoracic ct", "lung ct")),
        Modality("brain_mri", "BrainMRI", "brain mri", ("brain mr", "head mri", "cranial mri"), flip=True),
        Modality("breast_mri", "BreastMRI", "breast mri", ("breast mr", "dce-mri breast")),
        Modality(
            "breast_us", "BreastUS", "breast ultrasound", ("breast ultrasound", "breast ultrasonography"), flip=True
        ),
    )
}

# What every installation knows; a model that has learned others brings their definitions along.
BUILT_IN = frozenset(MODALITIES)

# Words that fit more than one modality, and which.
AMBIGUOUS: dict[str, tuple[str, ...]] = {
    "mri": ("brain_mri", "breast_mri"),
    "mr": ("brain_mri", "breast_mri"),
    "ct": ("chest_ct", "oct"),
    "breast": ("breast_mri", "breast_us"),
    "chest": ("cxr", "chest_ct"),
}


def _key(name: str) -> str:
    return re.sub(r"[\s_\-]+", "", name).lower()


def _spellings(*modalities: Modality) -> dict[str, Modality]:
    """By the key of each of their spellings."""
    return {_key(spelling): m for m in modalities for spelling in (m.id, m.name, *m.aliases)}


_BY_KEY = _spellings(*MODALITIES.values())


def register_modality(modality: Modality) -> Modality:
    """Adds a modality to the table, for as long as the process lasts, and returns it.

    A pipeline with this modality among its `modalities` saves the definition, and `MinimPipeline.from_pretrained`
    registers it again. To register the very same again changes nothing.

    Raises:
        ValueError: the id is no lower-case word of letters, digits and underscores; name, words or an alias is empty;
            the id belongs to another definition; or a spelling belongs to another modality, or fits several.
    """
    if MODALITIES.get(modality.id) != modality:
        _check_new(modality)
        MODALITIES[modality.id] = modality
        _BY_KEY.update(_spellings(modality))
    return MODALITIES[modality.id]


def _check_new(modality: Modality) -> None:
    """Raises as `register_modality` for a modality that the table has not, or has with another definition."""
    known = MODALITIES.get(modality.id)
    if known is not None:
        now, before = asdict(modality), asdict(known)
        changed = [f"{field} is {before[field]!r}, now {now[field]!r}" for field in now if now[field] != before[field]]
        definition = f"with another definition: {'; '.join(changed)}"
        raise ValueError(f"modality {modality.id!r} is in the table already, {definition}.")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", modality.id):
        form = "begin with a letter a-z and go on with a-z, 0-9 and _"
        raise ValueError(f"The id of a modality has to {form}, got {modality.id!r}.")
    spellings = (modality.id, modality.name, *modality.aliases)
    if not modality.words.strip() or not all(map(_key, spellings)):
        raise ValueError(f"modality {modality.id!r}: its name, its words and its aliases must not be empty.")
    for spelling in spellings:
        key, why = _key(spelling), None
        if key in AMBIGUOUS:
            why = f"may be {' or '.join(map(repr, AMBIGUOUS[key]))}"
        elif key in _BY_KEY:
            why = f"is modality {_BY_KEY[key].id!r}"
        if why:
            raise ValueError(f"modality {modality.id!r} cannot be called {spelling!r}: that {why}.")


def read_definitions(definitions: dict[str, dict]) -> tuple[Modality, ...]:
    """The modalities that `custom_definitions` gave, also after JSON made lists of its tuples; registers nothing.

    Where the table has the modality already, its own names and words stay, or a model could not be loaded any more
    once the table has grown, nor beside another model; only what images are, grey and to be mirrored, has to agree.
    Raises as `register_modality`.
    """
    modalities = []
    for name, definition in definitions.items():
        modality = Modality(**{**definition, "id": name, "aliases": tuple(definition.get("aliases", ()))})
        known = MODALITIES.get(name)
        if known is None or (known.grey, known.flip) != (modality.grey, modality.flip):
            _check_new(modality)
        modalities.append(known or modality)
    return tuple(modalities)


def register_definitions(definitions: dict[str, dict]) -> None:
    """Registers what `read_definitions` reads; raises as it does, and as `register_modality`."""
    for modality in read_definitions(definitions):
        register_modality(modality)


def custom_definitions(ids: list[str]) -> dict[str, dict]:
    """By id what defines those of the modalities `ids` that only this process knows: `name`, `words`, ..."""
    custom = [asdict(MODALITIES[name]) for name in ids if name in MODALITIES and name not in BUILT_IN]
    return {definition.pop("id"): definition for definition in custom}


def resolve_modality(
    name: str | None, trained: Sequence[str] | None = None, own: tuple[Modality, ...] = ()
) -> Modality:
    """The modality that `name` stands for; ValueError if it is unknown, fits several, or is not among `trained`.

    Args:
        name: an id, a name of MINIM's, or an alias, in any case and with any spaces, hyphens or underscores.
        trained: ids that the model at hand has learned; `None` allows all of the table.
        own: modalities that the model at hand defines, in the table or not.
    """
    if not isinstance(name, str):
        raise ValueError(f"`modality` has to be a string, got {name!r} of type {type(name).__name__}.")
    key, known = _key(name), _BY_KEY | _spellings(*own)
    if key in AMBIGUOUS:
        raise ValueError(f"modality {name!r} is ambiguous: it may be {' or '.join(map(repr, AMBIGUOUS[key]))}.")
    ids = list(dict.fromkeys([*MODALITIES, *(modality.id for modality in own)]))
    if key not in known:
        nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f" Did you mean {known[nearest[0]].id!r}?" if nearest else ""
        raise ValueError(f"Unknown modality {name!r}; known: {', '.join(map(repr, ids))}.{hint}")
    modality, allowed = known[key], ids if trained is None else trained
    if modality.id not in allowed:
        raise ValueError(
            f"modality {modality.id!r} is known, but this model has not been trained on it; "
            f"trained: {', '.join(map(repr, allowed))}."
        )
    return modality


def split_prefix(
    text: str, trained: list[str] | tuple[str, ...] | None = None, own: tuple[Modality, ...] = ()
) -> tuple[str | None, str]:
    """Splits MINIM's `"OCT: macular edema"` into `("OCT", "macular edema")`; without such a prefix, `(None, text)`.

    The prefix counts only if it is a known or an ambiguous name, so that a colon inside a sentence stays there. With
    `trained`, the ids that a model has learned, what only other models have defined is not known; `own` as for
    `resolve_modality`.
    """
    head, colon, rest = text.partition(":")
    modality = (_BY_KEY | _spellings(*own)).get(_key(head))
    # What another model of this process has defined is a word like others here.
    known = modality is not None and (trained is None or modality.id in BUILT_IN or modality.id in trained)
    if colon and (known or _key(head) in AMBIGUOUS):
        return head.strip(), rest.strip()
    return None, text
