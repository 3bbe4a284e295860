"""What is rated in a round, and by whom: prompts, candidates, and each rating of a candidate once."""

from pathlib import Path

import torch

from ... import MinimPipeline, resolve_modality
from ...data.image_loading import load_images
from ...data.sources import read_csv, resolve_path
from ...evaluation.stand_in import RATER, StandIn
from ...files import write_csv, write_json
from ...generate.options import GenerateOptions
from ...generate.plan import plan_file
from ...generate.write import generate
from ...loading import register_modalities
from ...ratings import image_digest
from ..captions import load_captions
from ..filter.raters import read_ratings
from .config import SelfImproveConfig


PROMPT = ("Text", "modality", "finding")


def write_prompts(config: SelfImproveConfig) -> None:
    """`prompts.csv`: the given ones, or all training phrasings of the findings that the pipeline has learned."""
    index = register_modalities(config.pretrained_model_name_or_path)
    if config.prompts:

        def check(row: dict) -> None:
            resolve_modality(row["modality"], index.get("modalities"))

        rows = read_csv(config.prompts, require=PROMPT, check_images=False, check=check)
        rows = [{name: row[name] for name in PROMPT} for row in rows]
    else:
        captions = load_captions(config.captions)
        rows = [
            {"Text": text, "modality": modality, "finding": finding}
            for modality, findings in (index.get("findings") or {}).items()
            for finding in findings
            for text in captions.get(modality, {}).get(finding, {}).get("train", [])
        ]
    if not rows:
        raise ValueError("There are no prompts to draw for: give a CSV with --prompts.")
    write_csv(config.output / "prompts.csv", rows)


def draw_candidates(config: SelfImproveConfig) -> None:
    """`candidates/`: PNGs and data.csv, as `minim generate` writes them and the rating page takes them."""
    items = plan_file(config.output / "prompts.csv", config.candidates, config.first_seed)
    dtype = str(config.dtype).removeprefix("torch.")
    model = config.pretrained_model_name_or_path
    drawing = GenerateOptions(model=model, dtype=dtype, batch_size=config.batch_size, no_filter=True)
    generate(items, config.output / "candidates", drawing)


def take_ratings(config: SelfImproveConfig) -> None:
    """`ratings.csv`: each rating of a candidate once, by people or by the stand-in.

    Raises:
        ValueError: none of the ratings is of a candidate, or the stand-in knows none of their findings.
    """
    rows = match_ratings(config, config.ratings) if config.ratings else rate_by_stand_in(config, str(config.stand_in))
    columns = ("path", *PROMPT, "rating", "rater", "seed")
    write_json(config.output / "taken.json", {"ratings": image_digest(config.ratings) if config.ratings else None})
    rows = [{name: row[name] for name in columns} | {"path": f"candidates/{row['path']}"} for row in rows]
    write_csv(config.output / "ratings.csv", rows)


def match_ratings(config: SelfImproveConfig, ratings: str) -> list[dict]:
    """The candidates that people rated, once for each rating.

    A picture is known by its content, of which the rating page notes a digest: every round has a 0000.png. Where there
    is no digest, it is known by its place.
    """
    folder = config.output / "candidates"
    candidates = read_csv(folder / "data.csv", check_images=False)
    places = {(folder / row["path"]).resolve(): row for row in candidates}
    digests = {image_digest(place): row for place, row in places.items()}
    found, rows = {}, read_ratings(ratings, check_images=False)
    for row in sorted(rows, key=lambda row: row.get("time") or ""):
        place = Path(resolve_path(row, ratings)).resolve()
        candidate = digests.get(row["digest"]) if row.get("digest") else places.get(place)
        if candidate is not None:
            # Of one and the same rating the later word counts.
            key = (row["rater"], candidate["path"], row.get("turn") or "0")
            found[key] = candidate | {"rating": row["rating"], "rater": row["rater"]}
    left = len(rows) - len(found)
    if not found:
        raise ValueError(f"{ratings}: none of {left} ratings is of an image in {folder}.")
    print(f"{len(found)} ratings taken; {left} of other images, or given twice, are left alone")
    return list(found.values())


def rate_by_stand_in(config: SelfImproveConfig, stand_in: str) -> list[dict]:
    """The candidates of findings that the stand-in has learned, with its ratings."""
    rater = StandIn.from_pretrained(stand_in, "cuda" if torch.cuda.is_available() else "cpu")
    source = config.output / "candidates" / "data.csv"
    rows = read_csv(source, check_images=False)
    rows = [row | {"modality": resolve_modality(row["modality"]).id} for row in rows]
    rows = [row for row in rows if (row["modality"], row["finding"]) in rater.findings.classes]
    if not rows:
        raise ValueError(f"The stand-in in {stand_in} has learned none of the findings in prompts.csv.")
    model = config.pretrained_model_name_or_path
    pipe = MinimPipeline.from_pretrained(model, text_encoder=None, filter_head=None)
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    images = load_images(rows, source, size, trim=False, reading=config.reading_elsewhere())
    ratings = rater.rate(images, [row["modality"] for row in rows], [row["finding"] for row in rows])
    return [row | {"rating": rating, "rater": RATER} for row, rating in zip(rows, ratings, strict=True)]
