"""Sets what a trained filter head decides by: thresholds, when to drop candidates, and fingerprints against copies.

Thresholds are found on images that the pipeline draws for captions of part C, which neither the head nor the judges
learned from: for each modality those at which an asked-for share is accepted (--acceptance), or at which an asked-for
share of the accepted ones shows what it should, as read by classifiers (--precision, --teacher). The finding has a
floor of its own, and so has realism: what a share of the real val images reaches (--real_acceptance). When candidates
are dropped follows from how well scores at every noise level foretell the final one, within the cost allowed
(--most_cost). Fingerprints are made of all images of the train split, and of these mirrored and shifted.
"""

import itertools
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import torch
from accelerate import Accelerator
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ... import EMBEDDED_CHECKPOINT, FilterHead, MinimPipeline, resolve_modality
from ...data.mapped_images import IMAGES, map_images
from ...data.sources import read_dataset
from ...data.splits import assign_splits
from ...disk import save_model
from ...evaluation.judges import claimed_classes, class_of, finds_asked, load_judges
from ...files import write_report
from ...locking import locked
from ...mapped import MappedTensor
from ...minim_filter.selection import Thresholds
from ..config import Count, CsvOptions, HubOptions, PrecisionOptions, Range, Share, Whole, option
from ..hub import check_hub, push_parts
from ..rows import FINDINGS, know_modalities, of_part, tell_repeats
from .candidates import choose_stages, draw_candidates, foretelling, threshold
from .copies import POSES, fingerprints, fit_code, plant, pooled_features, poses, share, veto_report
from .data import versions
from .raters import learned_from
from .realism import realism_thresholds


@dataclass(kw_only=True)
class CalibrationConfig(CsvOptions, HubOptions, PrecisionOptions):
    """Options of a filter head's calibration."""

    filter_head: str = option(help="A trained head, as train_filter.py writes it.")
    pretrained_model_name_or_path: str = option(str(EMBEDDED_CHECKPOINT), "The pipeline.")
    part: str = option("C", "Whose captions are drawn; 'all' takes every row.")
    ratings: str | None = option(None, "The CSV that the head learned from: tells who has enough ratings.")
    ratings_part: str = option("A", "The part of them that it learned from, or 'all'.")
    min_train: Count = option(20, "Findings with fewer train images are not drawn.")
    min_val: Whole = option(8, "Likewise with val images.")
    prompts_per_modality: Count = 100
    candidates: Count = option(4, "Drawn for each prompt.")
    acceptance: Share = option(0.7, "Share of generated images to accept, or more.")
    precision: Share | None = option(None, "Instead: share of accepted ones that is to be right.")
    teacher: str | None = option(None, "Classifiers that read what the images show, for --precision.")
    real_acceptance: Share = option(0.95, "Share of real val images that look real enough, where the head rates it.")
    finding_floor: Annotated[float, Range(1, 3)] = option(2.0, "Least rating of the finding, 1 to 3.")
    most_cost: Annotated[float, Range(1, 99)] = option(
        1.95, "Of a returned image, in plain images by samples of the U-Net; in seconds it is some 3 % more."
    )
    copy_false_alarms: Share = option(0.05, "Share of val images that may pass for copies: data sets repeat patients.")
    code_bits: Count = option(224, "Of a fingerprint, a multiple of 8.")
    code_versions: Whole = option(3, "Of each image, for the code to learn from, beside its poses.")
    batch_size: Count = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.candidates < 2:
            raise ValueError(f"--candidates has to be at least 2, to choose from, got {self.candidates}.")
        if self.precision is not None and self.teacher is None:
            raise ValueError("--precision needs --teacher: classifiers that read what the images show.")
        if self.code_bits % 8:
            raise ValueError(f"--code_bits has to be a positive multiple of 8, got {self.code_bits}.")


def plan_prompts(rows: list[dict], count: int, candidates: int, seed: int) -> list[dict]:
    """`count` rows of each modality, findings in turn, each as often as it has candidates; with a `seed` each."""
    planned = []
    for modality in dict.fromkeys(class_of(row)[0] for row in rows):
        own = [row for row in rows if class_of(row)[0] == modality]
        findings = dict.fromkeys(row["finding"] for row in own)
        queues = [itertools.cycle([row for row in own if row["finding"] == f]) for f in findings]
        planned += [next(queues[i % len(queues)]) for i in range(count)]
    first = (seed + 1) * 10**9
    return [row | {"seed": first + i * candidates + j} for i, row in enumerate(planned) for j in range(candidates)]


class Calibration:
    """Rows, networks and drawn candidates of a calibration; its steps, and what it writes."""

    def __init__(self, config: CalibrationConfig):
        self.config, device = config, Accelerator().device
        self.read_rows()
        self.head = FilterHead.from_pretrained(config.filter_head).eval()
        model = config.pretrained_model_name_or_path
        self.pipe = MinimPipeline.from_pretrained(model, filter_head=self.head).to(device)
        self.pipe.set_progress_bar_config(disable=True)
        self.teacher = load_judges(config.teacher, device) if config.teacher else None
        self.people: Counter[str] = Counter()
        if config.ratings:
            ratings = read_dataset(config.ratings, check_images=False)
            learned = [row for row in ratings if learned_from(row, config.ratings_part)]
            self.people.update(resolve_modality(row["modality"]).id for row in learned)

    def read_rows(self) -> None:
        """Rows of the train and val splits, and those whose captions are drawn.

        Findings of too few images, which the generator cannot draw, would use up what may be rejected.
        """
        config, source = self.config, self.config.train_data
        know_modalities(config)
        every = assign_splits(read_dataset(source, require=FINDINGS, **config.csv_options), source)
        self.train_rows = [row for row in every if row["split"] == "train"]
        self.val_rows = [row for row in every if row["split"] == "val"]
        tell_repeats(source, self.train_rows, self.val_rows)
        rows = of_part(self.train_rows, config.part)
        if not rows:
            raise ValueError(f"{source} has no train rows of part {config.part!r}.")
        least = config.min_train, config.min_val if self.val_rows else 0
        claimed = claimed_classes(self.train_rows, self.val_rows, *least)
        self.rows = [row for row in rows if class_of(row) in claimed]
        if not self.rows:
            raise ValueError(
                f"No finding of part {config.part!r} has {config.min_train} train and {config.min_val} val images in"
                f" {source}: lower --min_train or --min_val."
            )

    def draw(self) -> None:
        """Draws the candidates, and has the classifiers read them."""
        config = self.config
        planned = plan_prompts(self.rows, config.prompts_per_modality, config.candidates, config.seed)
        self.modalities = [class_of(row)[0] for row in planned]
        texts, findings, seeds = ([row[name] for row in planned] for name in ("Text", "finding", "seed"))
        self.drawn = draw_candidates(self.pipe, texts, self.modalities, seeds, config.batch_size, config.bf16)
        self.finding = self.drawn.finding[:, -1]
        self.right = self.known = None
        if self.teacher is not None:
            probabilities, classes = self.teacher.judge(self.drawn.images), self.teacher.classes
            self.right = torch.from_numpy(finds_asked(probabilities, classes, self.modalities, findings))
            self.known = torch.tensor([class_of(row) in classes for row in planned])

    @cached_property
    def val_images(self) -> MappedTensor:
        """uint8 [N, 3, H, W]"""
        return self.map_images("val", self.val_rows)

    def map_images(self, name: str, rows: list[dict]) -> MappedTensor:
        """uint8 [N, 3, H, W], of the size that the U-Net has learned."""
        resolution = self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor
        path = self.config.output / IMAGES / name
        return map_images(path, rows, self.config.train_data, resolution, reading=self.config.reading)

    def choose_realism(self) -> tuple[dict[str, float], dict[str, dict]]:
        """The least log ratio of each modality, if the head rates it, and what passes of real and drawn images.

        Drawn images that do not are then taken for such that show nothing of their finding: no score saves them.
        """
        config, head, drawn = self.config, self.head, self.drawn
        if drawn.realism is None or not self.val_rows:
            return {}, {}
        options = config.real_acceptance, config.bf16
        thresholds, figures = realism_thresholds(head, self.pipe, self.val_rows, self.val_images, *options)
        least = torch.tensor([thresholds.get(name, -torch.inf) for name in self.modalities])
        passed = drawn.realism[:, -1] >= least
        for name in figures.keys() & set(self.modalities):
            figures[name]["generated"] = share(passed[torch.tensor([m == name for m in self.modalities])])
        self.finding = self.finding.masked_fill(~passed, 0)
        return thresholds, figures

    def choose_thresholds(self) -> tuple[dict[str, float], dict[str, dict]]:
        """The least score of each modality, and what it accepts of the drawn images."""
        config, right, known = self.config, self.right, self.known
        score, finding = self.drawn.score[:, -1], self.finding
        thresholds, figures = {}, {}
        for name in dict.fromkeys(self.modalities):
            own = torch.tensor([m == name for m in self.modalities])
            if config.precision is not None and known is not None:
                own &= known
            limits = config.finding_floor, config.acceptance
            right_of_own = right[own] if right is not None else None
            least = threshold(score[own], finding[own], *limits, right_of_own, config.precision)
            if config.precision is None:
                # What is as good as it counts is not rejected because others are still better.
                least = min(least, self.head.config.enough[1])
            passed = (score >= least) & (finding >= config.finding_floor)
            thresholds[name] = least
            figures[name] = {"n": int(own.sum()), "accepted": share(passed[own])}
            if right is not None and known is not None and (own := own & known).any():
                figures[name] |= {"right": share(right[own]), "right_of_accepted": share(right[own & passed])}
        return thresholds, figures

    def learn_copies(self) -> tuple[dict[str, int], dict]:
        """Gives the head the fingerprints of the train images; limits of copies by modality, and what they miss."""
        config, head, pipe, rows = self.config, self.head, self.pipe, self.train_rows
        images = self.map_images("train", rows)
        posed = (poses(part).flatten(0, 1) for part in images.split(64))
        features = pooled_features(head, pipe, posed, config.bf16).unflatten(0, (-1, POSES))
        known = features.flatten(0, 1)
        if config.code_versions:
            several = versions(rows, images, config.code_versions + 1, config.seed, head.device, config.no_mirror)
            others = pooled_features(head, pipe, several, config.bf16).unflatten(0, (len(rows), -1))
            features = torch.cat([features, others[:, 1:]], 1)  # the first is the image as it is
        # Part A is what the head has learned from; of the others copies are planted.
        unseen = [i for i, row in enumerate(rows) if row.get("part") != "A"]
        learned = [i for i, row in enumerate(rows) if row.get("part") == "A"] or unseen
        code = fit_code(features[learned], config.code_bits)
        known = fingerprints(code, known)
        head.set_fingerprints(code, known)
        if not (self.val_rows and unseen):
            return {}, {}
        some = unseen[:: max(1, len(unseen) // 500)]
        val = pooled_features(head, pipe, self.val_images, config.bf16)
        of_val, of_some = [class_of(row)[0] for row in self.val_rows], [class_of(rows[i])[0] for i in some]
        copies = {name: pooled_features(head, pipe, x, config.bf16) for name, x in plant(images[some]).items()}
        return veto_report(code, known, val, of_val, copies, of_some, config.copy_false_alarms)

    def run(self) -> dict:
        """Draws, chooses, and writes head, pictures and report, which it returns."""
        config, output = self.config, self.config.output
        self.draw()
        least_real, realism = self.choose_realism()
        thresholds, figures = self.choose_thresholds()
        stages, plans = choose_stages(self.drawn, config.candidates, config.most_cost, self.head)
        table = foretelling(self.drawn, self.right, self.known)
        limits, copies = self.learn_copies()
        calibration = {}
        for name, least in thresholds.items():
            floors = config.finding_floor, limits.get(name, -1), self.people[name], least_real.get(name)
            calibration[name] = Thresholds(round(least, 4), *floors).entry()
        self.head.register_to_config(calibration=calibration, stages=stages)
        last = self.drawn.score[:, -1], self.finding
        acceptance_curves(*last, self.modalities, calibration, output / "acceptance.png")
        noise_curves(table, stages, output / "noise.png")
        save_model(self.head.half(), output / "filter_head")
        report = {"calibration": calibration, "generated": figures, "copies": copies, "stages": stages}
        report |= {"realism": realism} if realism else {}
        print(json.dumps(report | {"noise": table}, indent=2))
        report = {"arguments": asdict(config)} | report | {"plans": plans, "noise": table}
        shutil.rmtree(output / IMAGES, ignore_errors=True)  # there are none where nothing is read of them
        write_report(output / "report.json", report)
        return report


def acceptance_curves(
    score: torch.Tensor, finding: torch.Tensor, modalities: list[str], calibration: dict[str, dict], path: Path
) -> None:
    """Share of N finished images accepted against the score asked for, a line for each modality."""
    figure, axes = new_figure()
    asked = torch.linspace(1, 3, 201)
    for i, (name, thresholds) in enumerate(calibration.items()):
        own = torch.tensor([m == name for m in modalities])
        able = score[own].masked_fill(finding[own] < thresholds["finding"], 0)

        def percent(least: float | torch.Tensor, able: torch.Tensor = able) -> float:
            return (able >= least).double().mean().item() * 100

        axes.plot(asked, [percent(s) for s in asked], color=f"C{i}", label=resolve_modality(name).name)
        axes.plot([thresholds["score"]], [percent(thresholds["score"])], "o", color=f"C{i}")
    axes.set(xlabel="score asked for (1 to 3)", ylabel="generated images accepted (%)", xlim=(1, 3), ylim=(0, 100))
    axes.legend(title="modality; dots: thresholds")
    figure.savefig(path, dpi=120)


def noise_curves(table: list[dict], stages: Sequence[tuple[float, float]], path: Path) -> None:
    """How well scores foretell (`foretelling`), against the noise level; where candidates are dropped."""
    figure, axes = new_figure()
    for name, label in (("final_score", "final score above its median"), ("right_finding", "finding read as right")):
        if name in table[0]:
            points = [(row["level"], row[name]) for row in table if 0 < row["level"] < 1e3]
            axes.plot(*zip(*points, strict=True), "o-", markersize=3, label=label)
    for i, (level, _) in enumerate(stages):
        axes.axvline(level, color="0.5", linestyle=":", label=None if i else "candidates are dropped")
    axes.set(xscale="log", xlabel="noise level (sigma / alpha)", ylabel="AUROC of the score at that level")
    axes.invert_xaxis()
    axes.legend()
    figure.savefig(path, dpi=120)


def new_figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.2)
    return figure, axes


def calibrate(config: CalibrationConfig) -> dict:
    """Calibrates a head; writes `filter_head/`, the report that it returns, `acceptance.png` and `noise.png`.

    Raises:
        ValueError: there is nothing to draw; no threshold or plan is as asked for; or another run has the folder.
    """
    check_hub(config)
    with locked(config.output):
        report = Calibration(config).run()
        push_parts(config, "calibrate_filter", config.output / "filter_head")
    return report
