"""Trains the image-text encoder that reports and copy checks look through, from scratch, on few real images.

Two things are learned by one vision tower:

- images and sentences that tell of the same finding lie near each other: contrastive with all positives of a batch
  (UniCL, arXiv 2204.03610), since hundreds of images share a caption;
- two views of one image lie nearer than views of two (SimCLR, arXiv 2002.05709; for copies as in SSCD, arXiv
  2202.10261): views are shifted, turned, zoomed, mirrored, brightened, blurred and noised, so that a copy which was
  changed a little is still found. They are mirrored in every modality: a mirrored copy is a copy.

It learns from part A of the train split, the judges from part B: neither steers what the other measures.

    python train/train_encoder.py --train_data data.csv --output_dir runs/encoder --mixed_precision bf16
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTokenizer,
    ConvNextV2Config,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

from minim_pipeline import EMBEDDED_CHECKPOINT, names_a_side
from minim_pipeline.cli import say
from minim_pipeline.data.image_loading import load_images
from minim_pipeline.data.image_reader import add_reading_arguments, reading_of
from minim_pipeline.data.splits import read_splits
from minim_pipeline.evaluation.classifier import augment, prepare_training
from minim_pipeline.evaluation.encoder import ImageTextEncoder
from minim_pipeline.files import write_json
from minim_pipeline.finite import FiniteLoss, check_weights
from minim_pipeline.modalities import resolve_modality
from minim_pipeline.training.arguments import check_numbers, check_shares
from minim_pipeline.training.captions import load_captions, phrase
from minim_pipeline.training.common import add_modalities_argument, know_modalities
from minim_pipeline.training.hub import add_hub_arguments, check_hub_arguments, push_parts
from minim_pipeline.training.rows import add_csv_arguments, csv_options, image_paths, tell_repeats


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_data", required=True, help="CSV with path,Text,modality,finding[,split,part].")
    add_csv_arguments(parser)
    parser.add_argument(
        "--no_mirror",
        action="store_true",
        help="Mirror no image. Without it every one is, now and then: a mirrored copy is to be found, too.",
    )
    add_modalities_argument(parser)
    parser.add_argument("--output_dir", required=True)
    add_reading_arguments(parser)
    parser.add_argument("--part", default="A", help="Rows of the train split with this `part`; 'all' takes every row.")
    parser.add_argument("--tokenizer", default=str(EMBEDDED_CHECKPOINT / "tokenizer"), help="Folder of a tokenizer.")
    parser.add_argument("--captions", help="JSON with phrasings of every finding; default: the package's own.")
    parser.add_argument("--width", type=int, default=32, help="Channels of the first stage; each later one doubles.")
    parser.add_argument("--text_width", type=int, default=128)
    parser.add_argument("--projection", type=int, default=128, help="Dimensions of the space shared with texts.")
    parser.add_argument("--resolution", type=int, default=192, help="What the vision tower sees, in pixels.")
    parser.add_argument("--caption_variants", type=int, default=32, help="Phrasings of every caption.")
    parser.add_argument("--copy_weight", type=float, default=1.0, help="Weight of the loss on views of one image.")
    parser.add_argument("--temperature", type=float, default=0.1, help="Of the loss on views of one image.")
    parser.add_argument("--max_train_steps", type=int, default=3000)
    parser.add_argument("--train_batch_size", type=int, default=192, help="Images a step, two views of each.")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--adam_weight_decay", type=float, default=0.05)
    parser.add_argument("--ema_decay", type=float, default=0.998)
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads.")
    add_hub_arguments(parser)
    args = parser.parse_args(argv)
    check_hub_arguments(args)
    check_numbers(parser, args)
    check_shares(args, "ema_decay")
    if args.temperature == 0:
        raise ValueError("--temperature has to be above 0, got 0.")
    if args.train_batch_size < 2:
        raise ValueError(
            f"--train_batch_size has to be at least 2, to tell images apart, got {args.train_batch_size}."
        )
    return args


def make_model(args: argparse.Namespace, tokenizer: CLIPTokenizer) -> VisionTextDualEncoderModel:
    """A ConvNeXt V2 (arXiv 2301.00808) and two layers of text, with projections into a shared space."""
    widths = [args.width * 2**i for i in range(4)]
    # The dual encoder asks every vision tower for its `hidden_size`, and ImageTextEncoder for its `image_size`.
    vision = ConvNextV2Config(
        hidden_sizes=widths,
        depths=[2, 2, 6, 2],
        drop_path_rate=0.1,
        hidden_size=widths[-1],
        image_size=args.resolution,
    )
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.text_width,
        intermediate_size=4 * args.text_width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=args.projection)
    return VisionTextDualEncoderModel(config)


def text_loss(images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Contrastive in both directions; all pairs of one label are positives, and share the target equally.

    Args:
        images, texts: [B, P], of length 1.
        scale: by which cosines are multiplied.
        labels: [B], the finding of each.
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


def train(model: VisionTextDualEncoderModel, images, ids, labels, grey, args, device) -> VisionTextDualEncoderModel:
    """Trains on uint8 images [N, 3, H, W] and token ids [N, variants, L]; the running average of the weights."""
    model.to(device).train()
    average, optimizer, schedule = prepare_training(
        model, args.max_train_steps, args.learning_rate, args.adam_weight_decay, args.ema_decay
    )
    g = torch.Generator(device).manual_seed(args.seed)
    batch = min(args.train_batch_size, len(images))
    mirror = torch.full((batch,), not args.no_mirror, device=device)
    losses = FiniteLoss()
    with tqdm(range(args.max_train_steps), mininterval=2) as bar:
        for step in bar:
            # No image twice in a batch: it would be its own negative.
            index = torch.randperm(len(images), device=device, generator=g)[:batch]
            x = images[index].float() / 255
            views = torch.cat([augment(x, args.resolution, mirror, grey[index], g) for _ in range(2)])  # [2B, 3, S, S]
            variant = torch.randint(ids.shape[1], (batch,), device=device, generator=g)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
                pooled = model.vision_model((views - 0.5) * 4).pooler_output  # [2B, D]
                seen = model.visual_projection(pooled)  # [2B, P]
                read = model.text_projection(model.text_model(ids[index, variant]).pooler_output)  # [B, P]
            pooled, seen, read = (F.normalize(t.float(), dim=1) for t in (pooled, seen, read))
            scale = model.logit_scale.exp().clamp(max=100)
            about = text_loss(seen, read.repeat(2, 1), scale, labels[index].repeat(2))
            copies = copy_loss(*pooled.chunk(2), args.temperature)
            loss = about + args.copy_weight * copies
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            average.update_parameters(model)
            losses.add(loss, step + 1)
            if step % 50 == 0:
                bar.set_postfix(text=f"{about.item():.3f}", copies=f"{copies.item():.3f}")
    losses.check()
    check_weights(average.module)
    return average.module.eval()


def disguise(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Copies that were changed a little, as people change them; of uint8 images [N, 3, H, W]."""
    # Edges are repeated where the picture moved away from them: wrapped around they would make a line of their own.
    shifted = F.pad(images.float(), (4, 0, 4, 0), mode="replicate")[:, :, :-4, :-4].to(torch.uint8)
    return {
        "shifted by 4 px": shifted,
        "12 % brighter": (images.float() * 1.12).clamp(0, 255).to(torch.uint8),
        "mirrored": images.flip(3),
    }


def measure(encoder: ImageTextEncoder, train_images, val_images, val_rows, labels_of) -> dict:
    """What it can do on val images: copies found, findings by nearest neighbours, texts found among all texts."""
    features, embeddings = encoder.encode_images(val_images)
    pool = torch.cat([encoder.encode_images(train_images)[0], features])
    own = torch.arange(len(val_images)) + len(train_images)
    report = {"n": len(val_rows), "pool": len(pool), "copies_found": {}}
    for name, copies in disguise(val_images).items():
        nearest = (encoder.encode_images(copies)[0] @ pool.T).argmax(1)
        report["copies_found"][name] = round((nearest == own).float().mean().item(), 4)

    labels = torch.tensor(labels_of(val_rows))
    cosines = (features @ features.T).fill_diagonal_(-1)
    same = labels[cosines.topk(5, dim=1).indices] == labels[:, None]
    report["same_finding_among_5_nearest"] = round(same.float().mean().item(), 4)
    texts = encoder.encode_texts([row["Text"] for row in val_rows], [row["modality"] for row in val_rows])
    top = (embeddings @ texts.T).topk(min(10, len(texts)), dim=1).indices
    report["same_finding_among_10_texts"] = round((labels[top] == labels[:, None]).any(1).float().mean().item(), 4)
    return report


# What tells of the machine rather than of the run.
PATHS = ("train_data", "image_root", "output_dir", "tokenizer", "modalities_from")


def main(argv=None) -> dict:
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    know_modalities(args)
    require = ("path", "Text", "modality", "finding")
    rows, val_rows = read_splits(args.train_data, require=require, **csv_options(args))
    rows = [row for row in rows if args.part in ("all", row.get("part"))]
    if not rows or not val_rows:
        raise ValueError(
            f"{args.train_data} holds {len(rows)} train rows of part {args.part!r}, {len(val_rows)} of val."
        )

    tell_repeats(args.train_data, image_paths(rows, args.train_data), image_paths(val_rows, args.train_data))
    if not args.no_mirror:
        sides = sum(names_a_side(row["Text"]) for row in rows)
        say(f"{args.train_data}: all {len(rows)} images may be mirrored; {sides} of them have captions with a side.")
    classes = {}

    def labels_of(rows):
        keys = [(resolve_modality(row["modality"]).id, row["finding"]) for row in rows]
        return [classes.setdefault(key, len(classes)) for key in keys]

    labels = torch.tensor(labels_of(rows), device=device)
    grey = torch.tensor([resolve_modality(row["modality"]).grey for row in rows], device=device)
    tokenizer = CLIPTokenizer.from_pretrained(args.tokenizer)
    ids = phrase(rows, load_captions(args.captions), tokenizer, args.caption_variants, args.seed).to(device)
    # A little larger than what the vision tower sees, so that zooming in finds detail.
    size = min(256, args.resolution * 5 // 4 // 8 * 8)
    images = load_images(rows, args.train_data, size, reading=reading_of(args)).to(device)
    val_images = load_images(val_rows, args.train_data, 256, reading=reading_of(args))

    start = time.monotonic()
    model = train(make_model(args, tokenizer), images, ids, labels, grey, args, device)
    seconds = round(time.monotonic() - start)
    encoder = ImageTextEncoder(model, tokenizer, args.resolution)
    encoder.save_pretrained(args.output_dir)
    report = {
        "trained_on": {"part": args.part, "n": len(rows)},
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": seconds,
        "device": torch.cuda.get_device_name(0) if device.type == "cuda" else "cpu",
        "arguments": {k: v for k, v in vars(args).items() if k not in PATHS},
        "val": measure(encoder, images, val_images, val_rows, labels_of),
    }
    write_json(Path(args.output_dir) / "report.json", report)
    push_parts(args, "train_encoder", args.output_dir)
    print(json.dumps({k: report[k] for k in ("parameters", "seconds", "val")}, indent=2))
    return report


if __name__ == "__main__":
    main()
