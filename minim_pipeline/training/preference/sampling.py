"""What a step learns from: prompts, images that are drawn for them, and real images of `--replay`.

Prompts are those of a CSV, or of images that people have rated, from which the filter head learns first.
"""

import itertools
import json
from dataclasses import dataclass, field

import torch

from ... import MODALITIES, FilterHead, MinimPipeline, prompt_text, resolve_modality
from ...data.image_loading import key_of, load_images
from ...data.sources import read_dataset
from ...disk import whole_folder
from ...evaluation.sampling import batches, draw_batch
from ...files import write_json
from ...finite import check_weights
from ...ratings import image_digest
from ..captions import load_captions, phrase_once
from ..filter.data import encode
from ..filter.raters import read_ratings
from ..filter.tune import tune
from ..latents import Latents
from ..rows import check_processes, read_splits
from ..run import Run
from .config import PreferenceConfig
from .rewards import are_copies, finding_reward, rate, spread


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

    rows = read_dataset(path, require=("Text", "modality"), check_images=False, check=check)
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


@dataclass
class Samples:
    """N finished images, those of a prompt one after the other."""

    latents: torch.Tensor  # fp32 [N, C, h, w]
    prompt: torch.Tensor  # int64 [N], of the list of prompts
    counts: torch.Tensor = field(init=False)  # bool [N], of which the reward counts: all, until `score` finds copies

    def __post_init__(self) -> None:
        self.counts = torch.ones_like(self.prompt, dtype=torch.bool)


@torch.no_grad()
def sample(pipe: MinimPipeline, prompts: list[dict], config: PreferenceConfig, generator: torch.Generator) -> Samples:
    """Draws `images_per_prompt` images for each of `prompts_per_step` prompts, at the pipeline's own settings.

    Prompts are chosen so that every finding comes up equally often.
    """
    queues: dict[tuple[str, str], list[int]] = {}
    for i in torch.randperm(len(prompts), device=generator.device, generator=generator).tolist():
        queues.setdefault((prompts[i]["modality"], prompts[i].get("finding") or prompts[i]["Text"]), []).append(i)
    # The findings in turn, and of each its prompts in turn, both in an order of chance.
    turns = itertools.cycle([itertools.cycle(queue) for queue in queues.values()])
    order = [next(queue) for queue in itertools.islice(turns, config.prompts_per_step)]
    chosen = [i for i in order for _ in range(config.images_per_prompt)]
    seeds = torch.randint(2**62, (len(chosen),), device=generator.device, generator=generator).tolist()
    texts, modalities = ([prompts[i][column] for i in chosen] for column in ("Text", "modality"))
    steps = {"num_inference_steps": config.num_inference_steps}
    latents = [
        draw_batch(pipe, texts[batch], modalities[batch], seeds[batch], config.bf16, **steps).float()
        for batch in batches(len(chosen), config.sampling_batch_size)
    ]
    return Samples(torch.cat(latents), torch.tensor(chosen, device=pipe.device))


def score(pipe: MinimPipeline, drawn: Samples, prompts: list[dict]) -> dict[str, torch.Tensor]:
    """Rates the finished images: `reward` and `spread` [N], to be watched. Copies of training images do not count."""
    chosen = drawn.prompt.tolist()
    modalities = [prompts[i]["modality"] for i in chosen]
    rated = rate(pipe, drawn.latents, [prompts[i]["Text"] for i in chosen], modalities)
    drawn.counts = ~are_copies(pipe, rated, modalities)
    return {"reward": finding_reward(rated), "spread": spread(drawn.latents, drawn.prompt)}


class Replay:
    """Real images, so that a U-Net does not forget what they look like.

    Latents of the train images of `--replay`, each in some versions, with captions in some phrasings.

    Raises:
        ValueError: the CSV has no train rows of the pipeline's modalities.
    """

    def __init__(self, config: PreferenceConfig, run: Run, pipe: MinimPipeline):
        known = pipe.config.modalities or list(MODALITIES)
        data = config.replay_data(pipe.unet.config.sample_size * pipe.vae_scale_factor)
        rows, _ = read_splits(data)
        rows = [row for row in rows if resolve_modality(row["modality"]).id in known]
        if not rows:
            raise ValueError(f"{config.replay} has no train images of {', '.join(known)}.")
        check_processes(rows, f"--replay {config.replay}")
        self.text_encoder = pipe.text_encoder
        self.variants = config.latent_variants
        captions = load_captions(config.captions)
        phrased = phrase_once(rows, captions, pipe.tokenizer, config.caption_variants, config.seed)
        self.ids, self.captions = (part.to(run.device) for part in phrased)  # [T, L], and places in it [N, variants]
        latents = Latents.encode(run, pipe.vae, data, rows, "replay", config.latent_variants)
        self.latents = latents.hold(run.device)

    @torch.no_grad()
    def draw(self, count: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents [count, C, h, w], scaled as the U-Net takes them, and hidden states [count, L, D]."""

        def randint(high: int) -> torch.Tensor:
            return torch.randint(high, (count,), device=g.device, generator=g)

        index = randint(len(self.captions))
        latents = self.latents.draw(index, randint(self.variants), g)
        text = self.ids[self.captions[index, randint(self.captions.shape[1])]]
        return latents, self.text_encoder(text).last_hidden_state
