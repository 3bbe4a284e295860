"""Trains the image-text encoder that reports and copy checks look through, from scratch, on few real images.

Two things are learned by one vision tower:

- images and sentences that tell of the same finding lie near each other: contrastive with all positives of a batch
  (UniCL, arXiv 2204.03610), since hundreds of images share a caption;
- two views of one image lie nearer than views of two (SimCLR, arXiv 2002.05709; for copies as in SSCD, arXiv
  2202.10261): views are shifted, turned, zoomed, mirrored, brightened, blurred and noised, so that a copy which was
  changed a little is still found. They are mirrored in every modality: a mirrored copy is a copy.

It learns from part A of the train split, the judges from part B: neither steers what the other measures.
"""

import json
import math
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPTokenizer, ConvNextV2Config, VisionTextDualEncoderConfig, VisionTextDualEncoderModel

from .. import EMBEDDED_CHECKPOINT, names_a_side
from ..cli import say
from ..data.mapped_images import IMAGES, map_images
from ..evaluation.classifier import augment, prepare_training, stored_side
from ..evaluation.encoder import ImageTextEncoder
from ..evaluation.judges import class_of
from ..files import read_report, write_report
from ..finite import check_weights
from ..mapped import Rows
from ..modalities import resolve_modality
from .captions import load_captions, phrase_once
from .config import Count, CsvOptions, Positive, RunOptions, Share, Weight, Whole, option
from .hub import push_parts
from .memory import hold
from .rows import of_part, read_findings, tell_repeats
from .run import Run
from .text.student import text_config


# What tells of the machine rather than of the run.
PATHS = ("train_data", "image_root", "output_dir", "tokenizer", "modalities_from", "resume_from_checkpoint")


@dataclass(kw_only=True)
class ImageTextEncoderConfig(CsvOptions, RunOptions):
    """Options of the image-text encoder's training."""

    no_mirror: bool = option(False, "Mirror no image; else all are, at times, so that a mirrored copy is found, too.")
    part: str = option("A", "Rows of the train split with this `part`; 'all' takes every row.")
    tokenizer: str = option(str(EMBEDDED_CHECKPOINT / "tokenizer"), "Folder of a tokenizer.")
    captions: str | None = option(None, "JSON with phrasings of every finding; default: the package's own.")
    width: Count = option(32, "Channels of the first stage; each later one doubles.")
    text_width: Count = 128
    projection: Count = option(128, "Dimensions of the space shared with texts.")
    resolution: Count = option(192, "What the vision tower sees, in pixels.")
    caption_variants: Count = option(32, "Phrasings of every caption.")
    copy_weight: Weight = option(1.0, "Weight of the loss on views of one image.")
    temperature: Positive = option(0.1, "Of the loss on views of one image.")
    max_train_steps: Count = 3000
    train_batch_size: Count = option(192, "Images a step and a process, two views of each.")
    learning_rate: Weight = 1e-3
    lr_warmup_steps: Whole = 150
    adam_weight_decay: Weight = 0.05
    ema_decay: Share = 0.998
    threads: Count | None = option(None, "CPU threads.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (batch := self.train_batch_size) < 2:
            raise ValueError(f"--train_batch_size has to be at least 2, to tell images apart, got {batch}.")
        if self.gradient_checkpointing:
            raise ValueError("--gradient_checkpointing does nothing here: leave it out.")


def make_model(config: ImageTextEncoderConfig, tokenizer: CLIPTokenizer) -> VisionTextDualEncoderModel:
    """A ConvNeXt V2 (arXiv 2301.00808) and two layers of text, with projections into a shared space."""
    widths = [config.width * 2**i for i in range(4)]
    # The dual encoder asks every vision tower for its `hidden_size`, and ImageTextEncoder for its `image_size`.
    shape = {"hidden_sizes": widths, "depths": [2, 2, 6, 2], "drop_path_rate": 0.1}
    vision = ConvNextV2Config(**shape, hidden_size=widths[-1], image_size=config.resolution)
    text = text_config(tokenizer, config.text_width, layers=2, heads=4)
    both = VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=config.projection)
    return VisionTextDualEncoderModel(both)


def text_loss(images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Contrastive in both directions; all pairs of one label [B] are positives, and share the target equally.

    Images and texts [B, P] are of length 1; their cosines are multiplied by `scale`.
    """
    logits = scale * images @ texts.T  # [B, B]
    target = (labels[:, None] == labels).float()
    target = target / target.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def copy_loss(first: torch.Tensor, second: torch.Tensor, temperature: float) -> torch.Tensor:
    """NT-Xent: of all other views [2B, D] of a batch, the one of the same image is to be found."""
    views = torch.cat([first, second])
    logits = (views @ views.T / temperature).fill_diagonal_(-math.inf)
    batch = len(first)
    target = torch.arange(2 * batch, device=views.device).roll(batch)
    return F.cross_entropy(logits, target)


def disguise(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Copies that were changed a little, as people change them; of uint8 images [N, 3, H, W]."""
    # Edges are repeated where the picture moved away from them: wrapped around they would make a line of their own.
    shifted = F.pad(images.float(), (4, 0, 4, 0), mode="replicate")[:, :, :-4, :-4].to(torch.uint8)
    return {
        "shifted_by_4_px": shifted,
        "brighter_by_12_percent": (images.float() * 1.12).clamp(0, 255).to(torch.uint8),
        "mirrored": images.flip(3),
    }


def measure(encoder: ImageTextEncoder, train_images: Rows, val_images: Rows, val_rows: list[dict]) -> dict:
    """What it can do on val images: copies found, findings by nearest neighbours, texts found among all texts."""
    features, embeddings = encoder.encode_images(val_images)
    pool = torch.cat([encoder.encode_images(train_images)[0], features])
    own = torch.arange(len(val_images)) + len(train_images)
    report: dict[str, Any] = {"n": len(val_rows), "pool": len(pool), "copies_found": {}}
    looked_at: dict[str, list[torch.Tensor]] = {}
    for part in val_images.split(256):
        for name, copies in disguise(part).items():
            looked_at.setdefault(name, []).append(encoder.encode_images(copies)[0])
    for name, parts in looked_at.items():
        nearest = torch.cat([(part @ pool.T).argmax(1) for part in parts])
        report["copies_found"][name] = round((nearest == own).float().mean().item(), 4)

    labels = torch.tensor(numbered(val_rows))
    cosines = (features @ features.T).fill_diagonal_(-1)
    same = labels[cosines.topk(min(5, len(labels)), dim=1).indices] == labels[:, None]
    report["same_finding_among_5_nearest"] = round(same.float().mean().item(), 4)
    texts = encoder.encode_texts([row["Text"] for row in val_rows], [row["modality"] for row in val_rows])
    top = (embeddings @ texts.T).topk(min(10, len(texts)), dim=1).indices
    report["same_finding_among_10_texts"] = round((labels[top] == labels[:, None]).any(1).float().mean().item(), 4)
    return report


def numbered(rows: list[dict]) -> list[int]:
    """The number of each row's modality and finding, in the order in which they come."""
    numbers: dict[tuple[str, str], int] = {}
    return [numbers.setdefault(class_of(row), len(numbers)) for row in rows]


class Reader(nn.Module):
    """Both towers in one forward, which is what is distributed: features, and images and texts in the shared space."""

    def __init__(self, model: VisionTextDualEncoderModel):
        super().__init__()
        self.model = model

    def forward(self, views: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pooled = self.model.vision_model((views - 0.5) * 4).pooler_output  # views [2B, 3, S, S] in [0, 1]
        seen = self.model.visual_projection(pooled)  # [2B, P]
        read = self.model.text_projection(self.model.text_model(ids).pooler_output)  # ids [B, L]
        pooled, seen, read = (F.normalize(t.float(), dim=1) for t in (pooled, seen, read))
        return pooled, seen, read, self.model.logit_scale.exp().clamp(max=100)


class Trainer:
    """The image-text encoder of `config` in the run `run`."""

    def __init__(self, config: ImageTextEncoderConfig, run: Run):
        self.config, self.run = config, run
        self.read_data()
        self.batch = min(config.train_batch_size, len(self.images))
        model = Reader(make_model(config, self.tokenizer)).to(run.device)
        rates = config.learning_rate, config.adam_weight_decay, config.ema_decay
        self.average, optimizer, _ = prepare_training(model, config.max_train_steps, *rates)
        self.reader = model
        self.model, self.optimizer = run.accelerator.prepare(model, optimizer)
        if config.compile:
            model.compile(dynamic=False)
        run.begin(self.average)
        self.reader.train()

    def read_data(self) -> None:
        config, device = self.config, self.run.device
        rows, self.val_rows = read_findings(config)
        self.rows = rows = of_part(rows, config.part)
        if not rows or not self.val_rows:
            found = f"{len(rows)} train rows of part {config.part!r}, {len(self.val_rows)} of val"
            raise ValueError(f"{config.train_data} holds {found}.")
        tell_repeats(config.train_data, rows, self.val_rows)
        if not config.no_mirror:
            sides = sum(names_a_side(row["Text"]) for row in rows)
            mirroring = f"all {len(rows)} images may be mirrored; {sides} of them have captions with a side"
            say(f"{config.train_data}: {mirroring}.")
        self.labels = torch.tensor(numbered(rows), device=device)
        self.grey = torch.tensor([resolve_modality(row["modality"]).grey for row in rows], device=device)
        self.tokenizer = CLIPTokenizer.from_pretrained(config.tokenizer)
        captions = load_captions(config.captions)
        phrased = phrase_once(rows, captions, self.tokenizer, config.caption_variants, config.seed)
        self.ids, self.captions = (part.to(device) for part in phrased)  # [T, L], and places in it [N, variants]
        side = stored_side(config.resolution)
        train, val = (config.output / IMAGES / name for name in ("train", "val"))
        self.images = hold(map_images(train, rows, config.train_data, side, reading=config.reading), device)
        self.val_images = map_images(val, self.val_rows, config.train_data, 256, reading=config.reading)

    def step(self) -> dict[str, torch.Tensor]:
        config, run = self.config, self.run
        g = run.generator()
        # No image twice in a batch: it would be its own negative.
        index = torch.randperm(len(self.images), device=run.device, generator=g)[: self.batch]
        x = self.images[index.to(self.images.device)].to(run.device).float() / 255
        mirror = torch.full((self.batch,), not config.no_mirror, device=run.device)
        views = torch.cat([augment(x, config.resolution, mirror, self.grey[index], g) for _ in range(2)])
        variant = torch.randint(config.caption_variants, (self.batch,), device=run.device, generator=g)
        run.schedule.set_learning_rates(self.optimizer, [config.learning_rate] * 2, config.lr_warmup_steps)
        pooled, seen, read, scale = self.model(views, self.ids[self.captions[index, variant]])
        about = text_loss(seen, read.repeat(2, 1), scale, self.labels[index].repeat(2))
        first, second = pooled.chunk(2)
        copies = copy_loss(first, second, config.temperature)
        loss = about + config.copy_weight * copies
        run.accelerator.backward(loss)
        run.accelerator.clip_grad_norm_(self.reader.parameters(), config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update_parameters(self.reader)
        return {"loss": loss.detach(), "text": about.detach(), "copies": copies.detach()}

    def encoder(self) -> ImageTextEncoder:
        """With the averaged weights."""
        return ImageTextEncoder(self.average.module.model, self.tokenizer, self.config.resolution)

    def validate(self) -> None:
        """By the main process; nothing is chosen by it."""
        if self.run.is_main:
            self.report = measure(self.encoder(), self.images, self.val_images, self.val_rows)
            self.run.log.write("val", **self.report)
        self.run.accelerator.wait_for_everyone()

    def finish(self) -> dict:
        """Writes the encoder and `report.json`, by the main process, and gives the report."""
        config, run, encoder = self.config, self.run, self.encoder()
        check_weights(encoder.model)
        report = {
            "trained_on": {"part": config.part, "n": len(self.rows)},
            "parameters": sum(p.numel() for p in encoder.model.parameters()),
            "seconds": round(run.schedule.spent),
            "device": torch.cuda.get_device_name(0) if run.device.type == "cuda" else "cpu",
            "arguments": {name: value for name, value in asdict(config).items() if name not in PATHS},
        }
        if run.is_main:
            report["val"] = self.report
            encoder.save_pretrained(run.output)
            write_report(run.output / "report.json", report)
            shutil.rmtree(run.output / IMAGES)
            print(json.dumps({name: report[name] for name in ("parameters", "seconds", "val")}, indent=2))
        run.finish()
        return report


def train(config: ImageTextEncoderConfig) -> dict:
    """Trains the encoder, writes it to `--output_dir` as `ImageTextEncoder` reads it, and gives the report.

    Raises:
        ValueError: there are no train rows of this part, or no val rows; and as `Run.open`.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    with Run.open(config, "minim-image-text-encoder") as run:
        if run.finished:
            report = read_report(config.output / "report.json")
        else:
            trainer = Trainer(config, run)
            run.train(trainer.step, trainer.validate)
            report = trainer.finish()
        if run.is_main and config.push_to_hub:
            with tempfile.TemporaryDirectory(prefix="minim-") as folder:
                # Without the run's checkpoints and log, which lie beside it.
                whole = Path(folder) / config.output.resolve().name
                ImageTextEncoder.from_pretrained(config.output).save_pretrained(whole)
                push_parts(config, "train_encoder", whole)
    return report
