"""The commands `minim generate` and `minim plan`: what is asked for, and what is said in the end.

Arguments are checked before torch and diffusers, which take seconds, are imported.
"""

import io
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

from ..captions import check_caption
from ..data.sources import image_name, name_digits, read_dataset
from ..data.table import Columns
from ..loading import model_identity, register_modalities
from ..modalities import MODALITIES, resolve_modality, split_prefix
from ..options import Count, Options, Range, Whole, number, option
from ..terminal import ask, say
from .draw import REASONS
from .options import GenerateOptions, ModelOptions, ShardOptions
from .plan import Item, Request, count_images, expand, request_file, request_prompt
from .plan_table import SHARD_SIZE, make_plan, read_plan, write_plan
from .ray_actors import generate_on_ray
from .shards import Progress, generate_shards
from .shortfall import Shortfall
from .storage import Storage, is_url
from .write import generate


@dataclass(kw_only=True)
class RequestOptions(Options):
    """What the images show, and how many there are."""

    separator = "-"

    modality: str | None = option(None, "E.g. OCT; minim modalities lists them. With --prompts-file: of all rows.")
    prompt: str | None = option(None, "What the image shows, e.g. 'diabetic macular edema'.")
    prompts_file: Path | None = option(
        None, "Many prompts: columns Text,modality, optional num_images,seed; others are carried through to data.csv."
    )
    caption_column: str | None = option(None, "Of --prompts-file, where its name is not usual: the column of prompts.")
    modality_column: str | None = option(None, "The same of the modalities.")
    finding_column: str | None = option(None, "The same of the findings, which are carried through.")
    num_images: Count | None = option(None, "Images of the prompt (default 4), or of each row (1).")
    seed: Whole = option(0, "Image i uses seed + i; of a row with a seed of its own, that one + i (default 0).")
    skip_bad_rows: bool = option(False, "Leave bad rows of the CSV out instead of stopping.")


@dataclass(kw_only=True)
class PlanCommand(ModelOptions, RequestOptions):
    """Where the plan goes."""

    output: str = option(help="A Parquet file.")


@dataclass(kw_only=True)
class GenerateCommand(RequestOptions, ShardOptions, GenerateOptions):
    """Where the images go."""

    output_dir: str | None = option(None, "Their folder, or a URL such as s3://bucket/set.")

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("prompt", "prompts_file", "modality", "num_images") if getattr(self, name)]
        if self.plan and given:
            names = ", ".join("--" + name.replace("_", "-") for name in given)
            raise ValueError(f"--plan names the images itself: leave {names} out.")
        if self.ray is not None and self.device not in (None, "cpu", "cuda"):
            raise ValueError(f"--ray gives each actor its GPU: --device has to be cpu or cuda, got {self.device}.")


def checked(text: str, name: str = "prompt") -> str:
    """`text`; ValueError if it is none, or stands for a caption that is missing; `name`: of the option."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"--{name} is not UTF-8: {text!r}.")
    check_caption(text)
    return text


def requested(options: RequestOptions, trained: list[str] | None, **others: str | None) -> list[Request]:
    """The images that are asked for. What is missing, of what they show, is asked for at the terminal.

    `others`: further options that have to be there, by name. Raises ValueError if something is missing and nobody can
    be asked, or what is given is not possible.
    """
    modality, text, file = options.modality, options.prompt, options.prompts_file
    if file is not None and text is not None:
        raise ValueError("--prompts-file names the prompts itself: leave --prompt out.")
    columns = [f"--{name}-column" for name in ("caption", "modality", "finding") if getattr(options, f"{name}_column")]
    if file is None and columns:
        raise ValueError(f"{', '.join(columns)} belong to --prompts-file, and there is none.")
    if text is not None and modality is None:
        modality, text = split_prefix(text, trained)  # MINIM's own "OCT: macular edema"
    kind = resolve_modality(modality, trained) if modality is not None else None
    if text is not None and not text.strip():
        raise ValueError(f"--prompt has to say what the image shows, got {text!r}.")
    checked(text or "")
    needed: dict[str, object] = {"modality": modality, "prompt": text} if file is None else {}
    missing = ["--" + name.replace("_", "-") for name, value in (needed | others).items() if value is None]
    if missing and not sys.stdin.isatty():
        raise ValueError(f"{', '.join(missing)} missing (they are asked for at a terminal only).")

    if file is not None:
        with warnings.catch_warnings(record=True) as caught:
            of_all, count = kind.id if kind else None, options.num_images or 1
            called = Columns(None, options.caption_column, options.modality_column, options.finding_column)
            requests = request_file(file, count, options.seed, trained, options.skip_bad_rows, of_all, called)
        for warning in caught:
            say(f"minim generate: warning: {warning.message}")
        return requests
    if kind is None:
        names = ", ".join(MODALITIES[id].name for id in trained or MODALITIES)
        kind = ask(f"Modality ({names})", lambda answer: resolve_modality(answer, trained))
    text = text or ask("Prompt, e.g. diabetic macular edema", checked)
    count = options.num_images or (ask("Number of images", number(int, Range(1)), "4") if missing else 4)
    return request_prompt(text.strip(), kind, count, options.seed)


def run_plan(options: PlanCommand) -> None:
    """Writes what minim generate would draw as a table: an id, a prompt, a modality and a seed for each image.

    minim generate --plan draws it, in any number of processes.
    """
    trained = register_modalities(options.model).get("modalities") or None
    plan = make_plan(requested(options, trained))
    plan.settings.update(zip(("model", "revision"), model_identity(options.model)))
    folder, name = os.path.split(options.output)  # of a URL, too
    file = io.BytesIO()
    write_plan(plan, file)
    Storage(folder).write(name, file.getvalue())
    say(f"{len(plan)} images are planned in {options.output}.")


def run_generate(options: GenerateCommand) -> int:
    """Draws images of one prompt, of a CSV of prompts, or of a plan, into a folder.

    NNNN.png, grid.png, and data.csv in MINIM's format; or shards of a large set. At a terminal it asks for what is
    missing. The same command again goes on where it was stopped and repeats nothing; several GPUs: accelerate launch
    -m minim_pipeline.cli generate ...
    """
    trained = register_modalities(options.model).get("modalities") or None
    checked(options.negative_prompt or "", "negative-prompt")
    if options.plan and options.output_dir is None:
        raise ValueError("--output-dir is missing.")
    plan = read_plan(options.plan, trained) if options.plan else None
    requests = [] if plan else requested(options, trained, output_dir=options.output_dir)
    output = options.output_dir or ask("Output folder", str, "out")
    in_shards = options.asks_for_shards or is_url(output) or count_images(requests) > SHARD_SIZE
    if in_shards and (plan or not (Path(output) / "data.csv").exists()):  # what was begun as one folder goes on so
        try:
            draw = generate_shards if options.ray is None else generate_on_ray
            progress = draw(plan or make_plan(requests), output, options, options)
        except KeyboardInterrupt:
            say(f"\nStopped. Whole shards are in {output}. The same command goes on from there.")
            raise
        return say_shards(progress, output, options.quiet)
    items, folder = expand(requests), Path(output)
    try:
        generate(items, folder, options)
    except KeyboardInterrupt:
        digits = name_digits(folder, len(items))
        done = sum((folder / image_name(item.index, digits)).exists() for item in items)
        say(f"\nStopped: {done} of {len(items)} images are in {folder}. The same command goes on from there.")
        raise
    if options.accepted_only:
        return say_accepted(items, folder, options.quiet)
    if not options.quiet:
        say_drawn(items, folder)
    return 0


def say_shards(progress: Progress, output: str, quiet: bool) -> int:
    """What a run in shards came to; the exit code, 3 if images fell short, which is always said."""
    if not quiet:
        others = f", {progress.others} are another process's" if progress.others else ""
        there = f"{progress.drawn} shards drawn, {progress.there} were there{others}"
        say(f"{output}: {there}. {progress.images} images written.")
        counts = progress.counts
        if counts["candidates"]:
            left_out = {name: count for name, count in counts.items() if name.startswith("rejected_")}
            why = ", ".join(f"{name.removeprefix('rejected_')} {count}" for name, count in left_out.items())
            say(f"The filter accepted {counts['accepted']} of them, and left out candidates: {why}.")
    if not progress.short:
        return 0
    files = progress.short[0] if len(progress.short) == 1 else f"{len(progress.short)} files in fell_short"
    say(f"minim generate: images fell short ({files}): the same command with a larger --max-rounds goes on.")
    return 3


def say_drawn(items: list[Item], folder: Path) -> None:
    say(f"{len(items)} images in {folder}: {folder / 'grid.png'} shows them, {folder / 'data.csv'} lists them.")
    rows = [row for row in read_dataset(folder / "data.csv", check_images=False) if row.get("accepted")]
    if rows:
        drawn = sum(int(row["candidates"]) for row in rows)
        accepted = sum(row["accepted"] == "true" for row in rows)
        why = {reason: sum(int(row.get(f"rejected_{reason}") or 0) for row in rows) for reason in REASONS}
        unreal = f", {why['realism']} as unlike real images" if "rejected_realism" in rows[0] else ""
        say(
            f"The filter accepted {accepted} of {len(rows)} images. Of {drawn} candidates it left out"
            f" {sum(why.values())}: {why['quality']} for their quality, {why['finding']} for the finding,"
            f" {why['copy']} as copies of training images{unreal}."
        )


def say_accepted(items: list[Item], folder: Path, quiet: bool) -> int:
    """What --accepted-only came to and what it cost; the exit code, 3 if images fell short, which is always said."""
    short = list(Shortfall(folder).entries.values())
    data, digits = folder / "data.csv", name_digits(folder, len(items))
    asked = {image_name(item.index, digits) for item in items}  # the folder may hold more, of an earlier run
    rows = read_dataset(data, check_images=False) if data.exists() else []
    rows = [row for row in rows if row["path"] in asked]
    drawn = sum(int(row["candidates"]) for row in rows) + sum(entry["candidates"] for entry in short)
    if not quiet:
        each = f", {drawn / len(rows):.1f} for each of them" if rows else ""
        found = f"{len(rows)} accepted images in {folder}, of {len(items)} asked for."
        say(f"{found} {drawn} candidates were drawn{each}.")
    if not short:
        return 0
    why = {reason: sum(entry["rejected"].get(reason, 0) for entry in short) for reason in REASONS}
    reasons, rounds = ", ".join(f"{reason} {count}" for reason, count in why.items()), max(e["rounds"] for e in short)
    say(
        f"minim generate: {len(short)} of {len(items)} images fell short in {rounds} round{'s' * (rounds > 1)}"
        f" ({reasons}; {Shortfall(folder).file} lists them): the same command with a larger --max-rounds goes on."
    )
    return 3
