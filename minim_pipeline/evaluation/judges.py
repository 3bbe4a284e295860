"""Judges: classifiers that say which modality and finding an image shows, to read what a generator drew.

They are trained by `train/train_classifier.py` on real images of a part of the data that no filter learns from.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from ..disk import save_model
from ..files import write_json
from ..mapped import Rows
from ..modalities import resolve_modality
from .classifier import preprocessing
from .images import to_input
from .metrics import bootstrap_interval, drawn_within, interval_of, places


Class = tuple[str, str]  # modality id and finding
Families = dict[Class, str]  # findings that look alike and are one to a claim, by the name that they share


class Judges:
    """Several classifiers over the same classes, each a pair of modality and finding; their word is the mean.

    Args:
        models: name -> a transformers image classifier over `classes`.
        classes: (modality id, finding) of each output, in order.
        image_size: side in pixels of what models see whose config does not say it.
        families: of classes, and of other findings that are no class of their own.
    """

    def __init__(
        self, models: dict[str, nn.Module], classes: list[Class], image_size: int, families: Families | None = None
    ):
        self.models = {name: model.eval() for name, model in models.items()}
        self.classes = [(modality, finding) for modality, finding in classes]
        self.image_size, self.families = image_size, families or {}

    def to(self, device: torch.device | str) -> "Judges":
        for model in self.models.values():
            model.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return next(next(iter(self.models.values())).parameters()).device

    def save_pretrained(self, path: str | Path) -> None:
        """Writes `judges.json` and a folder for each model (config and safetensors); raises as `save_model`.

        In `judges.json` a family is a triple: modality id, finding, and the family's name.
        """
        for name, model in self.models.items():
            save_model(model, Path(path) / name)
        config = {"models": list(self.models), "classes": self.classes, "image_size": self.image_size}
        if self.families:
            config["families"] = [[*key, family] for key, family in self.families.items()]
        write_json(Path(path) / "judges.json", config)

    @torch.no_grad()
    def judge_each(self, images: Rows, batch_size: int | None = None) -> dict[str, Tensor]:
        """The probabilities of every model: name -> float32 [N, classes] on the CPU.

        Args:
            images: [N, 3, H, W], uint8 or float in [0, 1], square, of any size; in memory or on disk.
            batch_size: default 16 on a CPU, which is slower with more, else 128.
        """
        batch_size = batch_size or (16 if self.device.type == "cpu" else 128)
        probabilities: dict[str, list[Tensor]] = {name: [] for name in self.models}
        for part in images.split(batch_size):
            part = part.to(self.device)
            for name, model in self.models.items():
                x = to_input(part, *preprocessing(model, self.image_size))
                probabilities[name].append(model(x).logits.float().softmax(1).cpu())
        return {name: torch.cat(parts) for name, parts in probabilities.items()}

    def judge(self, images: Rows, batch_size: int | None = None) -> Tensor:
        """Mean probabilities of the models: float32 [N, classes]; `images` as in `judge_each`."""
        return torch.stack(list(self.judge_each(images, batch_size).values())).mean(0)


def load_judges(path: str | Path, device: torch.device | str = "cpu") -> Judges:
    """The judges that `save_pretrained` wrote to `path`."""
    config = json.loads((Path(path) / "judges.json").read_text())
    load = AutoModelForImageClassification.from_pretrained
    models = {name: load(Path(path) / name, dtype=torch.float32) for name in config["models"]}
    families = {(modality, finding): family for modality, finding, family in config.get("families", [])}
    return Judges(models, config["classes"], config["image_size"], families).to(device)


def class_of(row: dict[str, str], column: str = "finding") -> Class:
    """Modality id and finding of a row."""
    return resolve_modality(row["modality"]).id, row[column]


def families_of(rows: list[dict], column: str = "finding") -> Families:
    """The family of every finding, by the rows' column `family`; one of a single finding has that finding's name."""
    named = {class_of(row, column): row["family"] for row in rows if row.get("family")}
    sizes = Counter((modality, family) for (modality, _), family in named.items())
    return {key: family if sizes[key[0], family] > 1 else key[1] for key, family in named.items()}


def claimed_classes(
    train_rows: list[dict], val_rows: list[dict], min_train: int, min_val: int, column: str = "finding"
) -> list[Class]:
    """(modality id, finding) of all findings with enough images on both sides, in alphabetical order."""
    train = Counter(class_of(row, column) for row in train_rows)
    val = Counter(class_of(row, column) for row in val_rows)
    return [key for key in sorted(train) if train[key] >= min_train and val[key] >= min_val]


FEWEST = 5  # images of a finding of one source, for it to be told from others there
# Families where the data name none: of different sources, and what is called apart in them is mostly the source.
LOOK_ALIKE = {("fundus", "no diabetic retinopathy"): "normal", ("oct", "no diabetic macular edema"): "normal"}


def merged_class(modality: str, finding: str, families: Families | None = None) -> Class:
    """The class that stands for all that look like it: its family."""
    key = modality, finding
    return modality, (families or {}).get(key) or LOOK_ALIKE.get(key, finding)


def finds_asked(
    probabilities: Tensor,
    classes: list[Class],
    modalities: str | list[str],
    findings: list[str],
    merge: bool = False,
    families: Families | None = None,
) -> np.ndarray:
    """Whether the asked-for finding of each image is found, within its modality.

    Args:
        probabilities: [N, classes].
        modalities: the id that all N have, or that of each.
        findings: the asked-for finding of each.
        merge: findings of one family count as one; their probabilities are added.
        families: those that the judges know; default: `LOOK_ALIKE`.

    Returns:
        bool [N].
    """

    if isinstance(modalities, str):
        modalities = [modalities] * len(findings)
    asked = list(zip(modalities, findings))
    if merge:
        classes, asked = ([merged_class(*key, families) for key in keys] for keys in (classes, asked))
    names = list(dict.fromkeys(classes))
    scores = np.zeros((len(probabilities), len(names)))
    for i, key in enumerate(classes):
        scores[:, names.index(key)] += probabilities[:, i].numpy()
    within = np.array([[name == modality for name, _ in names] for modality in modalities], dtype=bool)
    found = np.where(within.reshape(scores.shape), scores, -1.0).argmax(1)  # [N]
    return np.array([names[i] == key for i, key in zip(found, asked)], dtype=bool)


def balanced_accuracy(right: np.ndarray, findings: list[str]) -> float:
    """Mean over the findings of the share that is right."""
    return float(np.mean([right[index].mean() for index in places(findings).values()]))


def accuracy_interval(right: np.ndarray, findings: list[str], draws: int = 1000, seed: int = 0) -> tuple:
    """95 % interval of `balanced_accuracy`, images drawn anew within each finding."""
    drawn = drawn_within(findings, draws, np.random.default_rng(seed))
    return tuple(interval_of(np.mean([right[index].mean(1) for index in drawn], 0)))


def accuracy_report(
    probabilities: Tensor,
    classes: list[Class],
    modalities: list[str],
    findings: list[str],
    sources: list[str] | None = None,
    families: Families | None = None,
) -> dict:
    """How often the judges find what is asked for, given their probabilities [N, classes]; `families` are theirs.

    Returns:
        `balanced_accuracy`: mean over modalities of the balanced accuracy of the finding within its modality;
        `balanced_accuracy_merged`: the same of the family, with findings that look alike as one;
        `modality_accuracy`: share of images whose most probable modality is theirs; `n`; and `modalities`: for each
        the same figures, a 95 % interval, and the accuracy and n of each finding and of each family. With `sources`,
        also the balanced accuracy within each source that has at least two findings of five images each.
    """
    of_modality = places(modality for modality, _ in classes)
    names = list(of_modality)
    by_modality = torch.stack([probabilities[:, columns].sum(1) for columns in of_modality.values()], 1)
    modality_right = np.array([names[i] for i in by_modality.argmax(1)]) == np.array(modalities)
    report, images = {}, places(modalities)
    for name in [name for name in names if name in images]:
        index = images[name]
        asked = [findings[i] for i in index]
        right = finds_asked(probabilities[index], classes, name, asked)
        merged = finds_asked(probabilities[index], classes, name, asked, merge=True, families=families)
        of_family = [merged_class(name, finding, families)[1] for finding in asked]
        report[name] = {
            "balanced_accuracy": round(balanced_accuracy(right, asked), 4),
            "interval": accuracy_interval(right, asked),
            "balanced_accuracy_merged": round(balanced_accuracy(merged, of_family), 4),
            "chance": round(1 / len(of_modality[name]), 4),
            "modality_accuracy": round(float(modality_right[index].mean()), 4),
            "n": len(index),
            "findings": _shares(right, asked),
            "families": _shares(merged, of_family),
        }
        if sources is not None:
            own = [sources[i] for i in index]
            report[name]["within_source"] = _within_source(probabilities[index], classes, name, asked, own)
    keys = ("balanced_accuracy", "balanced_accuracy_merged")
    return {key: round(float(np.mean([r[key] for r in report.values()])), 4) for key in keys} | {
        "modality_accuracy": round(float(modality_right.mean()), 4),
        "n": len(modalities),
        "modalities": report,
    }


def _shares(right: np.ndarray, names: list[str]) -> dict:
    """What is right of each name."""
    found = places(names).items()
    return {name: {"accuracy": round(float(right[own].mean()), 4), "n": len(own)} for name, own in found}


def _within_source(
    probabilities: Tensor, classes: list[Class], modality: str, asked: list[str], sources: list[str]
) -> dict:
    """Balanced accuracy among the findings that a source has, so that telling sources apart does not help."""
    report = {}
    for source, index in sorted(places(sources).items()):
        counts = Counter(asked[i] for i in index)
        known = [finding for finding, count in counts.items() if count >= FEWEST]
        if len(known) < 2:
            continue
        of_known = [i for i in index if asked[i] in known]
        columns = [classes.index((modality, finding)) for finding in known]
        found = probabilities[of_known][:, columns].argmax(1)
        labels = [asked[i] for i in of_known]
        right = np.array([known[i] for i in found]) == np.array(labels)
        report[source] = {
            "balanced_accuracy": round(balanced_accuracy(right, labels), 4),
            "chance": round(1 / len(known), 4),
            "n": len(of_known),
        }
    return report


def removed(off: Tensor, on: Tensor) -> float:
    """Share of the wrong images without a filter that are right with it, less those that it made wrong."""
    return 1 - (on.double().mean() / off.double().mean().clamp(min=1e-9)).item()


def compare_wrong(off: Tensor, on: Tensor) -> dict[str, Any]:
    """Wrong findings, bool [M] each, of the same slots; `None` for what too few of them tell nothing of."""
    figures: dict[str, Any] = {"wrong": round(on.double().mean().item(), 4), "removed": None, "interval": None}
    if off.any():
        figures["removed"] = round(removed(off, on), 4)
    # Of fewer a half may hold none, and a share of none is no number.
    if off.sum() >= 20:
        interval = bootstrap_interval(removed, off, on, paired=True, draws=1000)
        figures["interval"] = [round(value, 4) for value in interval]
    return figures


def format_report(title: str, report: dict) -> str:
    """A table of `accuracy_report`, a line a modality."""
    lines = [f"{title}: n {report['n']}, modality {report['modality_accuracy']:.3f}"]
    for name, r in report["modalities"].items():
        low, high = r["interval"]
        findings, families = (
            ", ".join(f"{k} {v['accuracy']:.2f} ({v['n']})" for k, v in r[which].items())
            for which in ("findings", "families")
        )
        lines.append(
            f"  {name:10s} {r['balanced_accuracy']:.3f} [{low:.2f}, {high:.2f}] chance {r['chance']:.2f} "
            f"merged {r['balanced_accuracy_merged']:.3f} modality {r['modality_accuracy']:.3f} | {findings}"
        )
        if r["families"].keys() != r["findings"].keys():
            lines.append(f"    by family: {families}")
        for source, s in r.get("within_source", {}).items():
            lines.append(f"    within {source}: {s['balanced_accuracy']:.3f} (chance {s['chance']:.2f}, n {s['n']})")
    lines.append(f"  {'mean':10s} {report['balanced_accuracy']:.3f} merged {report['balanced_accuracy_merged']:.3f}")
    return "\n".join(lines)
