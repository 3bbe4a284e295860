"""What the filter is worth: images with it and without it on the same seeds, read by judges that it never met.

For every finding that the judges know, --images_per_finding images with --candidates candidates each are drawn to the
end, once; from the ratings along the way follows what each way of choosing gives back: with the filter and without,
without parts of it, and by the strength of guidance alone (`choices`).

Reported are wrong findings as read by the judges of part B, diversity (MS-SSIM among images of a prompt, recall of
val images), cost, what the filter rejects of pictures that it should reject, and how often it rejects good ones.

    python research/evaluate_filter.py --model runs/model --data data.csv --output_dir docs/filter
"""

import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import ImageOps
from torch import Tensor

from minim_pipeline import CAPTIONS, EMBEDDED_CHECKPOINT, EMBEDDED_ENCODER, MinimPipeline, resolve_modality
from minim_pipeline.contact_sheet import contact_sheet
from minim_pipeline.data.image_loading import load_images
from minim_pipeline.data.splits import read_split
from minim_pipeline.evaluation.agreement import weighted_kappa
from minim_pipeline.evaluation.comparison import JUDGES, at_least, diversity, right_findings
from minim_pipeline.evaluation.encoder import ImageTextEncoder
from minim_pipeline.evaluation.judges import class_of, compare_wrong, load_judges
from minim_pipeline.evaluation.metrics import places
from minim_pipeline.evaluation.sampling import by_modality, plan
from minim_pipeline.files import write_report
from minim_pipeline.minim_filter import FilterHead, FilterHeadOutput
from minim_pipeline.minim_filter.funnel import accepted_first, plan_stages
from minim_pipeline.training.config import Count, Precision, ReadingOptions, Whole, option, parse
from minim_pipeline.training.filter.candidates import Candidates, draw_candidates, follow
from minim_pipeline.training.filter.raters import learned_from, read_ratings
from minim_pipeline.training.filter.report import other_findings, quality_report, rate


@dataclass(kw_only=True)
class EvaluationConfig(ReadingOptions):
    """Options of the filter's evaluation."""

    model: str = option(str(EMBEDDED_CHECKPOINT), "A pipeline with a filter head.")
    judges: str = option(JUDGES, "Of train_classifier.py.")
    encoder: str = option(str(EMBEDDED_ENCODER), "Whose features recall is measured in.")
    data: str = option(help="CSV with path,Text,modality,finding[,split].")
    captions: str = str(CAPTIONS)
    ratings: str | None = option(None, "CSV of people's grades, as train_filter.py takes them.")
    ratings_part: str = option("A", "Part whose grades the head has learned from.")
    output_dir: str = option(help="For report.json, sheet.png and candidates.npz.")
    images_per_finding: Count = 64
    candidates: Count = 4
    pairs: Count = option(400, "Pairs of images of a prompt, for MS-SSIM.")
    batch_size: Count = 64
    mixed_precision: Precision = "no"
    seed: Whole = 0


def judge_candidates(pipe: MinimPipeline, drawn: Candidates, modalities: list[str]) -> tuple[Tensor, list[str | None]]:
    """Whether the pipeline accepts each finished candidate, bool [N], and if not, why not."""
    device = pipe.filter_head.device
    quality, finding = drawn.quality[:, -1].to(device), drawn.finding[:, -1].to(device)
    realism = None if drawn.realism is None else drawn.realism[:, -1].to(device)
    finished = FilterHeadOutput(quality, finding, None, None, None, drawn.code.to(device), realism)
    _, accepted, reasons = pipe.judge(finished, [resolve_modality(name) for name in modalities])
    return accepted.cpu(), reasons


def choices(drawn: Candidates, accepted: Tensor, head: FilterHead, candidates: int) -> dict[str, dict]:
    """By the name of a way to choose: `index` [M] of the candidate that comes back, and `samples` of the U-Net.

    - off: the first candidate;
    - filter: the funnel of the head's config, and at the end the best of what is left, accepted ones first;
    - best rated: the same, without the limit `enough` from which on more does not count;
    - filter, best rated at the end: both, but no candidate is dropped on the way;
    - CFG-Rejection (arXiv 2505.23343), high and low: candidates are left by the accumulated difference between the
      predictions with and without the prompt, at the same steps and the same cost, and no head is needed.
    """
    guided = (drawn.guidance > 0).any(0)
    score, every = (values.view(-1, candidates, values.shape[1]).clone() for values in (drawn.rank(head), drawn.score))
    for values in (score, every):
        values[:, :, -1] = accepted_first(values[:, :, -1], accepted.view(-1, candidates))  # at the end
    sums = drawn.guidance_sum.view_as(score)
    plans = plan_stages(head.config.stages, candidates)
    ways = {"filter": (score, plans), "filter_at_the_end": (score, [])}
    ways |= {"best_rated": (every, plans), "best_rated_at_the_end": (every, [])}
    ways |= {"cfg_rejection_high": (sums, plans), "cfg_rejection_low": (-sums, plans)}
    plain = int(guided.sum()) + len(guided)
    made = {"off": {"index": torch.zeros(len(score), dtype=torch.long), "samples": plain}}
    for name, (values, stages) in ways.items():
        made[name] = dict(zip(("index", "samples"), follow(values, drawn.levels, guided, stages)))
    return made


def rejections(pipe: MinimPipeline, rows: list[dict], images: Tensor, seed: int) -> dict[str, dict]:
    """Share of pictures that the filter rejects: of those that it should, and of real val images as they are.

    Args:
        images: of the rows, uint8 [N, 3, H, W].
    """
    g = torch.Generator().manual_seed(seed)
    n, texts = len(rows), [row["Text"] for row in rows]
    modalities = [class_of(row)[0] for row in rows]
    level = torch.rand(n, 1, 1, 1, generator=g).expand(n, 3, *images.shape[2:])
    # Another modality's image, chosen at random, for the caption of this one.
    others = {m: [j for j in range(n) if modalities[j] != m] for m in dict.fromkeys(modalities)}
    other = [others[m][int(torch.randint(len(others[m]), (1,), generator=g))] for m in modalities]
    wrong = other_findings(rows, seed)
    wrong_texts = [texts[j] if j >= 0 else text for j, text in zip(wrong, texts, strict=True)]
    real = images.float() / 255
    cases = {
        "noise": (torch.rand(real.shape, generator=g), texts),
        "flat": (level, texts),
        "another_modality": (real[other], texts),
        "another_findings_caption": (real, wrong_texts),
        "real_own_caption": (real, texts),
    }
    return {name: _rejected(pipe, x, captions, modalities) for name, (x, captions) in cases.items()}


def _rejected(pipe: MinimPipeline, images: Tensor, texts: list[str], modalities: list[str]) -> dict[str, Any]:
    rejected: list[bool] = []
    reasons: list[str] = []
    for part in torch.arange(len(texts)).split(32):
        index = part.tolist()
        rated = pipe.score(images[part], [texts[i] for i in index], [modalities[i] for i in index])
        rejected += [not accepted for accepted in rated.accepted]
        reasons += [reason for reason in rated.reasons if reason]
    each = {name: round(float(np.mean(np.array(rejected)[i])), 4) for name, i in places(modalities).items()}
    counts = {reason: reasons.count(reason) for reason in sorted(set(reasons))}
    return {"rejected": round(sum(rejected) / len(texts), 4), "n": len(texts), "reasons": counts, "modalities": each}


def agreement_with_people(pipe: MinimPipeline, rows: list[dict], images: Tensor) -> dict[str, Any]:
    """The head's quality against people's grades of images uint8 [N, 3, H, W]: areas under ROC curves, and kappa."""
    with torch.no_grad():
        latents = torch.cat([pipe.encode_images(x.to(pipe.device) / 127.5 - 1) for x in images.split(32)])
    quality = rate(pipe.filter_head, latents)
    by_head, grades = quality.round().long().tolist(), [int(row["rating"]) for row in rows]
    return {"auroc": quality_report(rows, quality), "kappa": weighted_kappa(by_head, grades), "n": len(rows)}


def save_filter_sheet(images: Tensor, chosen: Tensor, wrong: Tensor, modalities: list[str], path: Path) -> None:
    """Above, without the filter; below, with it: slots of each modality, evenly from those that differ.

    A bar below is green where the judges find what was asked for, else red.

    Args:
        images: uint8 [M * candidates, 3, H, W], those of a slot one after the other; the first is that without.
        chosen: int64 [M], the candidate of each slot that the filter gives back.
        wrong: bool [M * candidates], whether judges find something else.
        modalities: of each slot.
    """
    columns, side, rows = 12, 128, []
    candidates = len(images) // len(chosen)
    for index in places(modalities).values():
        slots = [i for i in index if chosen[i] != 0]
        slots = [slots[int(k)] for k in np.linspace(0, len(slots) - 1, min(columns, len(slots)))]
        for taken in (torch.zeros_like(chosen), chosen):
            row = []
            for j in (i * candidates + int(taken[i]) for i in slots):
                colour = (200, 60, 50) if wrong[j] else (40, 150, 80)
                row.append(ImageOps.expand(contact_sheet(images[j : j + 1], 1, side), (0, 0, 0, 6), colour))
            if row:
                rows.append(ImageOps.expand(contact_sheet(row, columns, blank="white"), (0, 0, 0, 6), "white"))
    if rows:
        contact_sheet(rows, 1).save(path)


class Evaluation:
    """Candidates of a model, what judges read in them, and the figures that follow."""

    def __init__(self, config: EvaluationConfig):
        self.config, self.device = config, Accelerator().device
        self.pipe = MinimPipeline.from_pretrained(config.model).to(self.device)
        if self.pipe.filter_head is None or not self.pipe.filter_head.config.calibration:
            raise ValueError(f"{config.model} has no calibrated filter head: see calibrate_filter.py.")
        self.pipe.set_progress_bar_config(disable=True)
        self.judges = load_judges(config.judges, self.device)
        self.encoder = ImageTextEncoder.from_pretrained(config.encoder, self.device)
        self.val_rows = [row for row in read_split(config.data, "val") if class_of(row) in self.judges.classes]
        rated = read_ratings(config.ratings) if config.ratings else []
        self.rated_rows = [row for row in rated if not learned_from(row, config.ratings_part)]

    def draw(self) -> None:
        config, pipe, judges = self.config, self.pipe, self.judges
        captions = json.loads(Path(config.captions).read_text())
        learned, count = pipe.config.findings or {}, config.images_per_finding
        self.planned = plan(judges.classes, learned, captions, "train", count, config.seed)
        generators = [torch.Generator().manual_seed(p["seed"]) for p in self.planned]
        seeds = pipe.draw_seeds(list(range(len(self.planned))), config.candidates, generators)
        each = [p for p in self.planned for _ in range(config.candidates)]
        modalities, prompts = [p["modality"] for p in each], [p["prompt"] for p in each]
        bf16 = config.mixed_precision == "bf16"
        self.drawn = draw_candidates(pipe, prompts, modalities, seeds, config.batch_size, bf16)
        self.accepted, self.reasons = judge_candidates(pipe, self.drawn, modalities)
        self.read = judges.judge(self.drawn.images)
        self.wrong, self.merged = (
            ~right_findings(self.read, judges.classes, each, merge, judges.families) for merge in (False, True)
        )
        self.features = self.encoder.encode_images(self.drawn.images)[0].cpu()
        side = self.drawn.images.shape[-1]
        self.val_images = load_images(self.val_rows, config.data, side, reading=config.reading_elsewhere())
        val_features = self.encoder.encode_images(self.val_images)[0].cpu()
        self.val = by_modality(val_features, [class_of(row)[0] for row in self.val_rows])
        self.made = choices(self.drawn, self.accepted, pipe.filter_head, config.candidates)

    def way(self, choice: dict[str, Any]) -> dict[str, Any]:
        """The figures of one way to choose."""
        first = torch.arange(len(self.planned)) * self.config.candidates
        chosen, drawn = first + choice["index"], self.drawn
        off, on = self.wrong[first], self.wrong[chosen]
        figures = {"cost": round(choice["samples"] / self.made["off"]["samples"], 3), "samples": choice["samples"]}
        figures |= compare_wrong(off, on)
        figures["merged_look_alikes"] = compare_wrong(self.merged[first], self.merged[chosen])
        figures["accepted"] = round(self.accepted[chosen].double().mean().item(), 4)
        figures["mean_score"] = round(drawn.score[chosen, -1].mean().item(), 4)
        images = at_least(drawn.images[chosen], 176).to(self.device)  # five scales of MS-SSIM
        figures |= diversity(images, self.features[chosen], self.planned, self.val, self.config.pairs)
        for modality in figures["modalities"]:
            index = torch.tensor([p["modality"] == modality for p in self.planned])
            figures["modalities"][modality] |= compare_wrong(off[index], on[index])
        return figures

    def report(self) -> dict[str, Any]:
        config, pipe, accepted, wrong = self.config, self.pipe, self.accepted, self.wrong
        ways = {name: self.way(choice) for name, choice in self.made.items()}
        most = max(ways[name]["removed"] or 0.0 for name in ("filter_at_the_end", "best_rated_at_the_end"))
        gain = ways["filter"]["removed"] / most if most > 0 else None
        device = torch.cuda.get_device_name(0) if self.device.type == "cuda" else platform.machine()

        def rejected(which: Tensor) -> dict[str, Any]:
            return {"n": int(which.sum()), "rejected": round((~accepted[which]).double().mean().item(), 4)}

        report = {
            "arguments": asdict(config),
            "made": {"device": device},
            "n": len(self.planned),
            "candidates": config.candidates,
            "stages": [list(stage) for stage in pipe.filter_head.config.stages],
            "ways": ways,
            "share_of_gain_at_the_end": gain and round(gain, 4),
            "cost_of_accepted_image": round(ways["filter"]["cost"] / max(1e-9, ways["filter"]["accepted"]), 3),
            "candidates_wrong": round(wrong.double().mean().item(), 4),
            "candidates_taken_for_copies": round(self.reasons.count("copy") / len(self.reasons), 4),
            "candidates_accepted": round(accepted.double().mean().item(), 4),
            "candidates_read_as_right": rejected(~wrong),
            "candidates_read_as_right_of_quality_2": rejected(~wrong & (self.drawn.quality[:, -1] >= 2)),
            "candidates_read_as_wrong": rejected(wrong),
            "rejected": rejections(pipe, self.val_rows, self.val_images, config.seed),
        }
        if self.rated_rows:
            side = self.drawn.images.shape[-1]
            images = load_images(self.rated_rows, config.ratings, side, reading=config.reading_elsewhere())
            report["people"] = agreement_with_people(pipe, self.rated_rows, images)
        return report

    def save(self, report: dict[str, Any]) -> None:
        """Writes report, sheet, and what other ways of choosing could be found from."""
        output, drawn, chosen = Path(self.config.output_dir), self.drawn, self.made["filter"]["index"]
        output.mkdir(parents=True, exist_ok=True)
        modalities = [p["modality"] for p in self.planned]
        save_filter_sheet(drawn.images, chosen, self.wrong, modalities, output / "sheet.png")
        write_report(output / "report.json", report)
        stored = {"quality": drawn.quality.half(), "finding": drawn.finding.half(), "guidance": drawn.guidance}
        stored |= {"levels": drawn.levels, "accepted": self.accepted, "wrong": self.wrong, "chosen": chosen}
        stored["said"] = self.read.half()
        np.savez_compressed(output / "candidates.npz", **{name: x.numpy() for name, x in stored.items()})


def main(argv: list[str] | None = None) -> dict[str, Any]:
    evaluation = Evaluation(parse(EvaluationConfig, argv, __doc__))
    evaluation.draw()
    report = evaluation.report()
    evaluation.save(report)
    print(json.dumps({key: value for key, value in report.items() if key != "arguments"}, indent=2))
    return report


if __name__ == "__main__":
    main()
