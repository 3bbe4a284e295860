"""Goes on training a filter head with ratings of generated images, as a round of self-improvement brings them.

Who rates a generated image for its prompt gives one number for both, picture and finding, so it is taken for the worse
of the head's two grades:

    P(rating >= k) = P(quality >= k) P(finding >= k)

Half of the images that a step sees are finished, half are noised, with the U-Net's estimate of them: the head is asked
on the way, too.

One number does not say which of both is at fault. The grade of the finding was learned from labels, and an anchor
holds it, for the prompt that an image was drawn for and for another: what quality can explain, it explains, and only
ratings that speak against a finding again and again move it. Left free, it takes over what raters think of the
picture, and a U-Net rewarded by it learns that instead of the finding. What the head sees of an image does not change
either, since fingerprints of training images are read from that.

A part of the images is kept out; if the head is not better at their ratings, the old one stays.
"""

import copy
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import TensorDataset

from ... import EMBEDDED_CHECKPOINT, MinimPipeline, prompt_text, resolve_modality
from ...data.image_loading import load_images
from ...disk import save_model
from ...evaluation.agreement import weighted_kappa
from ...files import write_report
from ...locking import locked
from ...minim_filter import FilterHead, FilterHeadOutput
from ...tokens import tokenize
from ..config import Count, HubOptions, PrecisionOptions, ReadingOptions, Share, Weight, option
from ..hub import check_hub, push_parts
from ..preference.rewards import overall
from ..randomness import step_generator
from .data import encode
from .estimates import NoisedEstimates
from .raters import Raters, learn_from_raters, read_ratings
from .report import auroc


# Parts of the head behind the pooled features, of which the fingerprints are made.
LEARNING = ("pool", "text", "quality", "finding", "logit_scale")


@dataclass(kw_only=True)
class TuningOptions(PrecisionOptions):
    """The filter head's further training with ratings."""

    tuning_steps: Count = 200
    tuning_learning_rate: Weight = 2e-4
    tuning_batch_size: Count = 256
    tuning_anchor: Weight = option(10.0, "Of the finding's grade staying as it was.")
    kept_out: Share = option(0.2, "Share of the rated images that it is tested on.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.kept_out < 1:
            raise ValueError(f"--kept_out has to be between 0 and 1, got {self.kept_out}.")


@dataclass(kw_only=True)
class TuneConfig(TuningOptions, ReadingOptions, HubOptions):
    """Options of a filter head's further training on its own."""

    pretrained_model_name_or_path: str = option(str(EMBEDDED_CHECKPOINT), "With a filter head.")
    ratings: str = option(help="CSV with path,Text,modality,rating[,rater].")


def hold_out(rows: list[dict], share: float, seed: int) -> torch.Tensor:
    """Which ratings are of images that are tested on, bool [N]; raises as `tune`."""
    paths = list(dict.fromkeys(row["path"] for row in rows))
    if len(paths) < 10:
        raise ValueError(f"There are ratings of {len(paths)} images; at least 10 are needed to learn and to test.")
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed)).tolist()
    tested = {paths[i] for i in order[: max(2, round(share * len(paths)))]}
    if len(tested) == len(paths):
        raise ValueError(f"--kept_out {share} of {len(paths)} images leaves none to learn from: lower it.")
    return torch.tensor([row["path"] in tested for row in rows])


def divergence(before: FilterHeadOutput, after: FilterHeadOutput) -> torch.Tensor:
    """KL divergence [N] of the grades of the finding."""
    p, q = (rated.finding_probs.clamp(min=1e-6) for rated in (before, after))
    return (p * (p.log() - q.log())).sum(1)


def log_loss(probabilities: torch.Tensor, grades: torch.Tensor) -> torch.Tensor:
    """[N], of probabilities [N, 3] of the grades 1 to 3, int64 [N]."""
    return -probabilities.gather(1, grades[:, None] - 1)[:, 0].clamp(min=1e-6).log()


def learn(head: FilterHead, pipe: MinimPipeline, rated: TensorDataset, raters: Raters, options: TuningOptions) -> None:
    """Trains the parts of `head` that are `LEARNING`, and the biases of raters; the pipeline's own head anchors it.

    Of each rating `rated` has latents, fp32 [C, h, w], token ids [L] of the prompt, grade, 1 to 3, and rater's number.
    """
    device, anchor_head = pipe.filter_head.device, pipe.filter_head
    learning = [p for name, p in head.named_parameters() if name.split(".")[0] in LEARNING]
    for parameter in learning:
        parameter.requires_grad_(True)
    head.train()
    estimates, count = NoisedEstimates(pipe, options.bf16), options.tuning_batch_size

    def loss(step: int) -> torch.Tensor:
        g = step_generator(options.seed, step, 11, device)
        latents, ids, grades, rater = rated[torch.randint(len(rated), (count,), device=device, generator=g)]
        held = estimates.of_half(latents, ids, count // 2, g)
        output = head(*held, ids, quality_bias=raters(rater))
        other = rated[torch.randint(len(rated), (count,), device=device, generator=g)][1]
        with torch.no_grad():
            before = [anchor_head(*held, asked) for asked in (ids, other)]
        after = output, head(*held, other)
        anchor = sum(divergence(*pair).mean() for pair in zip(before, after, strict=True))
        likelihood = log_loss(overall(output), grades).mean()
        return likelihood + options.tuning_anchor * anchor + raters.penalty(len(rated))

    learn_from_raters(learning, raters, loss, options.tuning_steps, options.tuning_learning_rate, 1.0)
    head.eval().requires_grad_(False)


def tune(
    pipe: MinimPipeline, rows: list[dict], latents: torch.Tensor, options: TuningOptions
) -> tuple[FilterHead, dict]:
    """The pipeline's filter head after further training; and what it was and is worth on images kept out.

    Args:
        rows: a rating each: `path` names the image, `Text`, `modality`, `rating` and `rater`.
        latents: of the image of each row, fp32 [N, C, h, w], scaled as the U-Net takes them.

    Raises:
        ValueError: there are fewer than ten images, or none is left to learn from.
    """
    torch.manual_seed(options.seed)  # for the head's dropout
    device = pipe.filter_head.device
    held_out = hold_out(rows, options.kept_out, options.seed)
    prompts = [prompt_text(row["Text"], resolve_modality(row["modality"]), pipe.tokenizer) for row in rows]
    ids = tokenize(pipe.tokenizer, prompts)[:, : pipe.filter_head.config.max_length].to(device)
    grades = torch.tensor([int(row["rating"]) for row in rows], device=device)
    names = [row["rater"] for row in rows]
    raters = Raters(names).to(device)
    rated = TensorDataset(latents.to(device), ids, grades, raters.index(names).to(device))
    old = pipe.filter_head.float().eval().requires_grad_(False)
    head = copy.deepcopy(old)
    learn(head, pipe, TensorDataset(*rated[(~held_out).to(device)]), raters, options)

    report: dict[str, Any] = {"n": len(rows), "images": len({row["path"] for row in rows})}
    report["kept_out"] = int(held_out.sum())
    report["raters"] = dict(zip(raters.names, [round(b, 4) for b in raters.bias.tolist()], strict=True))
    for name, some in (("before", old), ("after", head)):
        report[name] = prediction_figures(some, *rated[held_out.to(device)][:3])
    report["taken"] = report["after"]["log_loss"] < report["before"]["log_loss"]
    return (head if report["taken"] else old), report


@torch.no_grad()
def prediction_figures(head: FilterHead, latents: torch.Tensor, ids: torch.Tensor, grades: torch.Tensor) -> dict:
    """How well the head foretells ratings of finished images: log loss, kappa, and AUROC of 3 and of 1."""
    parts = zip(latents.split(256), ids.split(256), strict=True)
    probabilities = torch.cat([overall(head(x, x, x.new_zeros(len(x)), asked)) for x, asked in parts]).cpu()
    grades = grades.cpu()
    figures: dict[str, float | None] = {"log_loss": round(log_loss(probabilities, grades).mean().item(), 4)}
    figures["kappa"] = weighted_kappa((probabilities.argmax(1) + 1).tolist(), grades.tolist())
    for name, truth, value in (("good", grades == 3, probabilities[:, 2]), ("bad", grades == 1, probabilities[:, 0])):
        figures[f"auroc_{name}"] = round(auroc(value, truth), 4) if 0 < truth.sum() < len(truth) else None
    return figures


def train(config: TuneConfig) -> dict:
    """Tunes a pipeline's filter head, writes it to `filter_head/` in `--output_dir`, and returns the report.

    Raises:
        ValueError: the pipeline has no filter head; another run has the folder; or as `tune`.
    """
    check_hub(config)
    with locked(config.output):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        rows = read_ratings(config.ratings)
        pipe = MinimPipeline.from_pretrained(config.pretrained_model_name_or_path).to(device)
        if pipe.filter_head is None:
            raise ValueError(f"{config.pretrained_model_name_or_path} has no filter head: train_filter.py makes one.")
        size = pipe.unet.config.sample_size * pipe.vae_scale_factor
        images = load_images(rows, config.ratings, size, reading=config.reading_elsewhere())
        latents = encode(pipe, images, config.bf16).float()
        head, report = tune(pipe, rows, latents, config)
        save_model(head.half(), config.output / "filter_head")
        write_report(config.output / "report.json", report)
        push_parts(config, "tune_filter", config.output / "filter_head")
    print(json.dumps(report, indent=2))
    return report
