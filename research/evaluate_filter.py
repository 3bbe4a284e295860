"""What the filter is worth: images with it and without it on the same seeds, read by judges that it never met.

For every finding that the judges know, --images_per_finding images with --candidates candidates each are drawn to the
end, once; from the ratings along the way follows what each way of choosing gives back: with the filter and without,
without parts of it, and by the strength of guidance alone (`choices` in minim_pipeline/evaluation/filtering.py).

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

from minim_pipeline import EMBEDDED_CHECKPOINT, EMBEDDED_ENCODER, MinimPipeline
from minim_pipeline.data.image_loading import load_images
from minim_pipeline.data.splits import read_split
from minim_pipeline.evaluation.comparison import JUDGES, at_least, diversity, right_findings
from minim_pipeline.evaluation.encoder import ImageTextEncoder
from minim_pipeline.evaluation.filtering import (
    agreement_with_people,
    choices,
    compare_wrong,
    judge_candidates,
    rejections,
    save_filter_sheet,
)
from minim_pipeline.evaluation.judges import class_of, load_judges
from minim_pipeline.evaluation.planned import by_modality, plan
from minim_pipeline.files import write_report
from minim_pipeline.training.captions import CAPTIONS
from minim_pipeline.training.config import Count, Precision, ReadingOptions, Whole, option, parse
from minim_pipeline.training.filter.candidates import draw_candidates
from minim_pipeline.training.filter.raters import learned_from, read_ratings


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
        self.wrong, self.merged = (~right_findings(self.read, judges.classes, each, merge) for merge in (False, True))
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

        def rejected(which: torch.Tensor) -> dict[str, Any]:
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
        np.savez_compressed(
            output / "candidates.npz",
            quality=drawn.quality.half().numpy(),
            finding=drawn.finding.half().numpy(),
            guidance=drawn.guidance.numpy(),
            levels=drawn.levels.numpy(),
            accepted=self.accepted.numpy(),
            wrong=self.wrong.numpy(),
            chosen=chosen.numpy(),
            said=self.read.half().numpy(),
        )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    evaluation = Evaluation(parse(EvaluationConfig, argv, __doc__))
    evaluation.draw()
    report = evaluation.report()
    evaluation.save(report)
    print(json.dumps({key: value for key, value in report.items() if key != "arguments"}, indent=2))
    return report


if __name__ == "__main__":
    main()
