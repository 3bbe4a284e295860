"""What is drawn and rated: prompts of a CSV, or those of images that people have rated, from which the head learns."""

import json
from dataclasses import dataclass

import torch

from ... import FilterHead, MinimPipeline, prompt_text, resolve_modality
from ...data.image_loading import key_of, load_images
from ...data.sources import read_csv
from ...disk import whole_folder
from ...files import write_json
from ...finite import check_weights
from ...ratings import image_digest
from ..filter.data import encode
from ..filter.raters import read_ratings
from ..filter.tune import tune
from .config import PreferenceConfig


@dataclass
class Texts:
    """Of P prompts."""

    conditional: torch.Tensor  # hidden states [P, L, D]
    unconditional: torch.Tensor  # those of their modalities' tokens alone, [P, L, D]
    filter_ids: torch.Tensor  # what the filter head is to find, [P, T]


@torch.no_grad()
def encode_prompts(pipe: MinimPipeline, prompts: list[dict]) -> Texts:
    device, modalities = pipe.device, [resolve_modality(row["modality"]) for row in prompts]
    words = [row["Text"] for row in prompts]
    whole = [prompt_text(text, name, pipe.tokenizer) for text, name in zip(words, modalities, strict=True)]
    distinct = list(dict.fromkeys(modalities))
    tokens = pipe.encode_texts([prompt_text("", name, pipe.tokenizer) for name in distinct], device)
    return Texts(
        torch.cat([pipe.encode_texts(whole[i : i + 256], device) for i in range(0, len(whole), 256)]),
        tokens[[distinct.index(name) for name in modalities]],
        pipe.prepare_funnel(words, modalities, list(range(len(modalities))), 1, device).text,
    )


def read_prompts(path: str, pipe: MinimPipeline) -> list[dict]:
    """Rows with `Text`, `modality` (an id) and `finding` if there is one; every bad row is told."""
    trained = pipe.config.modalities

    def check(row: dict) -> None:
        resolve_modality(row["modality"], trained)

    rows = read_csv(path, require=("Text", "modality"), check_images=False, check=check)
    return [row | {"modality": resolve_modality(row["modality"]).id} for row in rows]


def learn_ratings(ratings: str, config: PreferenceConfig, pipe: MinimPipeline) -> list[dict]:
    """Gives the pipeline a head that has learned from a CSV of people's ratings, and returns their prompts.

    The head is written to `--output_dir`, and read from there when the run goes on.

    Raises:
        ValueError: the head that lies there has learned from other ratings, or their images have changed.
    """
    rows, reading = read_ratings(ratings), config.reading_elsewhere()
    learned_from = {"ratings": image_digest(ratings), "images": key_of(rows, ratings, reading)}
    for row in rows:
        row["modality"] = resolve_modality(row["modality"], pipe.config.modalities).id
    folder = config.output / "filter_head"
    if not folder.is_dir():
        size = pipe.unet.config.sample_size * pipe.vae_scale_factor
        images = load_images(rows, ratings, size, reading=reading)
        latents = encode(pipe, images, config.bf16).float()
        head, report = tune(pipe, rows, latents, config)
        print(json.dumps(report, indent=2))
        check_weights(head)
        with whole_folder(folder) as unfinished:
            head.save_pretrained(unfinished)
            write_json(unfinished / "ratings.json", learned_from)
    elif json.loads((folder / "ratings.json").read_text()) != learned_from:
        raise ValueError(
            f"{folder} has learned from other ratings than {ratings}, or other images: choose another --output_dir."
        )
    pipe.filter_head = FilterHead.from_pretrained(folder).eval().to(pipe.device)
    keys = dict.fromkeys((row["modality"], row["Text"], row.get("finding") or "") for row in rows)
    return [{"modality": modality, "Text": text, "finding": finding} for modality, text, finding in keys]
