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

    python train/tune_filter.py --pretrained_model_name_or_path runs/model --ratings ratings.csv --output_dir runs/head
"""

import argparse
import copy
import json
import math
from pathlib import Path

import torch
from diffusers import DDPMScheduler

from minim_pipeline import EMBEDDED_CHECKPOINT, MinimPipeline, prompt_text, resolve_modality
from minim_pipeline.data.image_loading import load_images
from minim_pipeline.data.image_reader import add_reading_arguments, reading_of
from minim_pipeline.disk import save_model
from minim_pipeline.evaluation.agreement import weighted_kappa
from minim_pipeline.files import write_json
from minim_pipeline.finite import FiniteLoss
from minim_pipeline.minim_filter import FilterHead, FilterHeadOutput
from minim_pipeline.minim_filter.estimate import estimate_clean, noise_angles
from minim_pipeline.tokens import tokenize
from minim_pipeline.training.arguments import check_numbers
from minim_pipeline.training.common import step_generator
from minim_pipeline.training.filter.data import encode
from minim_pipeline.training.filter.raters import Raters, read_ratings
from minim_pipeline.training.filter.report import auroc
from minim_pipeline.training.hub import add_hub_arguments, check_hub_arguments, push_parts
from minim_pipeline.training.preference.rewards import overall


# Parts of the head behind the pooled features, of which the fingerprints are made.
LEARNING = ("pool", "text", "quality", "finding", "logit_scale")


def add_tuning_arguments(parser: argparse.ArgumentParser) -> None:
    tuning = parser.add_argument_group("the filter head's further training")
    tuning.add_argument("--tuning_steps", type=int, default=200)
    tuning.add_argument("--tuning_learning_rate", type=float, default=2e-4)
    tuning.add_argument("--tuning_batch_size", type=int, default=256)
    tuning.add_argument("--tuning_anchor", type=float, default=10.0, help="Of the finding's grade staying as it was.")
    tuning.add_argument("--kept_out", type=float, default=0.2, help="Share of the rated images that it is tested on.")


def check_tuning_arguments(args: argparse.Namespace) -> None:
    if not 0 < args.kept_out < 1:
        raise ValueError(f"--kept_out has to be between 0 and 1, got {args.kept_out}.")


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pretrained_model_name_or_path", default=str(EMBEDDED_CHECKPOINT), help="With a filter head."
    )
    parser.add_argument("--ratings", required=True, help="CSV with path,Text,modality,rating[,rater].")
    parser.add_argument("--output_dir", required=True)
    add_reading_arguments(parser)
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--seed", type=int, default=0)
    add_tuning_arguments(parser)
    add_hub_arguments(parser)
    args = parser.parse_args(argv)
    check_numbers(parser, args)
    check_tuning_arguments(args)
    check_hub_arguments(args)
    return args


def divergence(before: FilterHeadOutput, after: FilterHeadOutput) -> torch.Tensor:
    """KL divergence [N] of the grades of the finding."""
    p, q = (rated.finding_probs.clamp(min=1e-6) for rated in (before, after))
    return (p * (p.log() - q.log())).sum(1)


def tune(
    pipe: MinimPipeline, rows: list[dict], latents: torch.Tensor, args: argparse.Namespace
) -> tuple[FilterHead, dict]:
    """The pipeline's filter head after further training; and what it was and is worth on images kept out.

    Args:
        rows: a rating each: `path` names the image, `Text`, `modality`, `rating` and `rater`.
        latents: of the image of each row, fp32 [N, C, h, w], scaled as the U-Net takes them.

    Raises:
        ValueError: there are fewer than ten images, or none is left to learn from.
    """
    torch.manual_seed(args.seed)  # for the head's dropout
    device = pipe.filter_head.device
    paths = list(dict.fromkeys(row["path"] for row in rows))
    if len(paths) < 10:
        raise ValueError(f"There are ratings of {len(paths)} images; at least 10 are needed to learn and to test.")
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(args.seed)).tolist()
    out = {paths[i] for i in order[: max(2, round(args.kept_out * len(paths)))]}
    if len(out) == len(paths):
        raise ValueError(f"--kept_out {args.kept_out} of {len(paths)} images leaves none to learn from: lower it.")
    kept_out = torch.tensor([row["path"] in out for row in rows])
    prompts = [prompt_text(row["Text"], resolve_modality(row["modality"]), pipe.tokenizer) for row in rows]
    ids = tokenize(pipe.tokenizer, prompts)[:, : pipe.filter_head.config.max_length].to(device)
    grades = torch.tensor([int(row["rating"]) for row in rows], device=device)
    raters = Raters([row["rater"] for row in rows]).to(device)
    rater = raters.index([row["rater"] for row in rows]).to(device)
    latents = latents.to(device)
    old = pipe.filter_head.float().eval().requires_grad_(False)
    head = copy.deepcopy(old)
    learning = [p for name, p in head.named_parameters() if name.split(".")[0] in LEARNING]
    for parameter in learning:
        parameter.requires_grad_(True)
    head.train()
    alphas_cumprod = DDPMScheduler.from_config(pipe.scheduler.config).alphas_cumprod.to(device)
    # A bias has to move as far as the head's score does, in few steps.
    groups = [{"params": learning}, {"params": raters.parameters(), "weight_decay": 0.0, "scale": 50.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.tuning_learning_rate, weight_decay=0.05)
    learned = (~kept_out).nonzero()[:, 0].to(device)

    def look(x, prompt_ids, g):
        """Half of the latents as they are, half noised, with the U-Net's estimates."""
        half = len(x) // 2
        timesteps = torch.randint(len(alphas_cumprod), (len(x) - half,), device=device, generator=g)
        angle = noise_angles(alphas_cumprod, timesteps)
        noise = torch.randn(x[half:].shape, device=device, generator=g)
        noisy = angle.cos()[:, None, None, None] * x[half:] + angle.sin()[:, None, None, None] * noise
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
            text = pipe.text_encoder(prompt_ids[half:]).last_hidden_state
            told = pipe.unet(noisy, timesteps, text, return_dict=False)[0]
        clean = estimate_clean(noisy, told, angle, pipe.scheduler.config.prediction_type)
        return torch.cat([x[:half], noisy]), torch.cat([x[:half], clean]), torch.cat([angle.new_zeros(half), angle])

    watched = FiniteLoss()
    for step in range(args.tuning_steps):
        for group in optimizer.param_groups:
            rate = args.tuning_learning_rate * group.get("scale", 1.0)
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / args.tuning_steps))
        g = step_generator(args.seed, step, 11, device)
        mine = learned[torch.randint(len(learned), (args.tuning_batch_size,), device=device, generator=g)]
        seen = look(latents[mine], ids[mine], g)
        rated = head(*seen, ids[mine], quality_bias=raters(rater[mine]))
        loss = -overall(rated).gather(1, grades[mine][:, None] - 1)[:, 0].clamp(min=1e-6).log().mean()
        other = ids[learned[torch.randint(len(learned), mine.shape, device=device, generator=g)]]
        with torch.no_grad():
            before = [old(*seen, asked) for asked in (ids[mine], other)]
        anchor = sum(divergence(*pair).mean() for pair in zip(before, (rated, head(*seen, other)), strict=True))
        loss = loss + args.tuning_anchor * anchor + raters.penalty(len(learned))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        watched.add(loss, step + 1)
    watched.check()
    head.eval().requires_grad_(False)
    report = {"n": len(rows), "images": len(paths), "kept out": int(kept_out.sum())}
    report["raters"] = dict(zip(raters.names, [round(b, 4) for b in raters.bias.tolist()], strict=True))
    index = kept_out.nonzero()[:, 0].to(device)
    for name, some in (("before", old), ("after", head)):
        report[name] = worth(some, latents[index], ids[index], grades[index])
    report["taken"] = report["after"]["log_loss"] < report["before"]["log_loss"]
    return (head if report["taken"] else old), report


@torch.no_grad()
def worth(head: FilterHead, latents: torch.Tensor, ids: torch.Tensor, grades: torch.Tensor) -> dict:
    """How well the head foretells ratings [N] of finished images: log loss, kappa, and AUROC of 3 and of 1."""
    parts = range(0, len(grades), 256)
    said = torch.cat([
        overall(head(x, x, x.new_zeros(len(x)), i))
        for x, i in ((latents[k : k + 256], ids[k : k + 256]) for k in parts)
    ]).cpu()  # fmt: skip
    grades = grades.cpu()
    loss = -said.gather(1, grades[:, None] - 1)[:, 0].clamp(min=1e-6).log().mean().item()
    figures = {"log_loss": round(loss, 4)}
    figures["kappa"] = weighted_kappa((said.argmax(1) + 1).tolist(), grades.tolist())
    for name, truth, value in (("good", grades == 3, said[:, 2]), ("bad", grades == 1, said[:, 0])):
        figures[f"auroc, {name}"] = round(auroc(value, truth), 4) if 0 < truth.sum() < len(truth) else None
    return figures


def main(argv=None) -> dict:
    args = parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = read_ratings(args.ratings)
    pipe = MinimPipeline.from_pretrained(args.pretrained_model_name_or_path).to(device)
    if pipe.filter_head is None:
        raise ValueError(f"{args.pretrained_model_name_or_path} has no filter head: train_filter.py makes one.")
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    images = load_images(rows, args.ratings, size, reading=reading_of(args))
    latents = encode(pipe.vae, images, args.mixed_precision == "bf16").float()
    head, report = tune(pipe, rows, latents, args)
    output = Path(args.output_dir)
    save_model(head.half(), output / "filter_head")
    write_json(output / "report.json", report)
    push_parts(args, "tune_filter", output / "filter_head")
    print(json.dumps(report, indent=2))
    return report


if __name__ == "__main__":
    main()
