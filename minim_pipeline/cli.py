"""The command `minim`. Arguments are checked before torch and diffusers, which take seconds, are imported."""

import argparse
import io
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from . import __version__
from .captions import check_caption
from .data.sources import image_name, name_digits, read_csv
from .evaluation.command import run as evaluate
from .evaluation.options import EvaluateOptions
from .generate.draw import REASONS
from .generate.options import GenerateOptions, ModelOptions, ShardOptions
from .generate.plan import Item, Request, count_images, expand, request_file, request_prompt
from .generate.plan_table import SHARD_SIZE, make_plan, read_plan, write_plan
from .generate.shards import Progress, generate_shards
from .generate.shortfall import Shortfall
from .generate.storage import Storage, is_url
from .generate.write import generate
from .loading import model_identity, register_modalities
from .modalities import MODALITIES, resolve_modality, split_prefix
from .options import Count, Options, Range, Whole, add_options, number, option, options_from
from .ratings import RatingStore, counts, read_ratings
from .scoring import ScoreOptions, score_csv


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong. Options may be spelled with underscores, too, as in diffusers' examples."""

    def parse_known_args(self, args=None, namespace=None):
        given = sys.argv[1:] if args is None else args
        pairs = [arg.partition("=") if arg.startswith("--") else ("", arg, "") for arg in given]
        spelled = [name.replace("_", "-") + equals + value for name, equals, value in pairs]
        return super().parse_known_args(spelled, namespace)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


@dataclass(kw_only=True)
class RequestOptions(Options):
    """What the images show, and how many there are."""

    separator = "-"

    modality: str | None = option(None, "E.g. OCT; minim modalities lists them. With --prompts-file: of all rows.")
    prompt: str | None = option(None, "What the image shows, e.g. 'diabetic macular edema'.")
    prompts_file: Path | None = option(
        None, "Many prompts: columns Text,modality, optional num_images,seed; others are carried through to data.csv."
    )
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


@dataclass(kw_only=True)
class RatingsCommand(Options):
    """The store, and where its ratings go or come from."""

    separator = "-"

    store: Path = option(help="ratings.sqlite of the rating page.")
    output: Path | None = option(None, "Write all ratings there; or --input.")
    input: Path | None = option(None, "Add these ratings to the store; or --output.")
    images: Path = option(help="Of the generated images rated.")
    real: Path | None = option(None, "Of the real images rated.")
    modalities_from: str | None = option(None, "Know the modalities that this model has defined, too.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.output) == bool(self.input):
            raise ValueError("give either --output, to write the ratings, or --input, to add to them.")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="minim", description="Synthetic medical images from a modality and a sentence.")
    parser.add_argument("--version", action="version", version=f"minim {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (run, options, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=run.__doc__)
        command.set_defaults(run=run, options=options)
        # An evaluation says all that is wrong with its options in one way, whoever makes them.
        add_options(command, options, strict=options is not EvaluateOptions)
    return parser


Answer = TypeVar("Answer")


def ask(question: str, parse: Callable[[str], Answer], default: str | None = None) -> Answer:
    """Asks at the terminal until `parse` takes the answer."""
    while True:
        answer = input(f"{question}{f' [{default}]' if default else ''}: ").strip() or default
        try:
            if answer:
                return parse(answer)
        except (ValueError, argparse.ArgumentTypeError) as error:
            print(error)


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
            requests = request_file(file, count, options.seed, trained, options.skip_bad_rows, of_all)
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
    folder, _, name = options.output.rpartition("/")
    file = io.BytesIO()
    write_plan(plan, file)
    Storage(folder or ".").write(name, file.getvalue())
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
        progress = generate_shards(plan or make_plan(requests), output, options, options)
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
    rows = [row for row in read_csv(folder / "data.csv", check_images=False) if row.get("accepted")]
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
    rows = read_csv(data, check_images=False) if data.exists() else []
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


def run_evaluate(options: EvaluateOptions) -> None:
    """Measures synthetic images against real ones: are they faithful, diverse, what was asked for, useful, and new?

    Writes report.json and report.html, a page that stands alone. The same command again draws and trains nothing
    twice; several GPUs: accelerate launch -m minim_pipeline.cli evaluate ...
    """
    evaluate(options)
    say(f"The report is in {options.output_dir}: report.html to look at, report.json with every figure.")


def run_score(options: ScoreOptions) -> None:
    """Rates the images of a CSV, real or generated, with the filter of a model.

    A score from 1 to 3, the ratings of quality and finding that it is made of, whether the filter accepts them, and
    why not.
    """
    path, rows = score_csv(options)
    if options.quiet:
        return
    for name in dict.fromkeys(resolve_modality(row["modality"]).name for row in rows):
        own = [row for row in rows if resolve_modality(row["modality"]).name == name]
        accepted, mean = sum(row["accepted"] == "true" for row in own), sum(float(row["score"]) for row in own)
        counts = [(reason, sum(row["reason"] == reason for row in own)) for reason in REASONS]
        why = ", ".join(f"{reason} {count}" for reason, count in counts if count)
        why = f" (rejected: {why})" if why else ""
        say(f"{name}: {accepted} of {len(own)} accepted{why}, mean score {mean / len(own):.2f}")
    say(f"{path} lists them.")


def run_ratings(options: RatingsCommand) -> None:
    """Writes a store's ratings as the CSV that train_filter.py reads, or adds a CSV's to the store."""
    if options.output is not None and not options.store.is_file():
        raise ValueError(f"There is no store of ratings at {options.store}.")
    folders = {"generated": options.images} | ({"real": options.real} if options.real else {})
    for folder in folders.values():
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder.")
    if options.modalities_from:
        register_modalities(options.modalities_from)
    if options.input is not None and not options.store.exists():
        read_ratings(options.input, folders)  # what is wrong is told before there is a store
    store = RatingStore(options.store)
    if options.input is not None:
        say(f"{store.read_csv(options.input, folders)} ratings of {options.input} are in {options.store} now.")
    if options.output is not None:
        written = store.write_csv(options.output, folders)
        table = ", ".join(f"{MODALITIES[name].name} {row['ratings']}" for name, row in counts(store.ratings()).items())
        say(f"{written} ratings in {options.output}{f' ({table})' if table else ''}.")


def run_modalities(options: ModelOptions) -> None:
    """Lists the modalities, their aliases, and the findings that a model has learned."""
    index = register_modalities(options.model)
    trained, findings = index.get("modalities") or [], index.get("findings") or {}
    for modality in MODALITIES.values():
        print(f"{modality.name} ({modality.id}), {'grey' if modality.grey else 'colour'}")
        print(f"  also: {', '.join(modality.aliases)}")
        if modality.id in trained:
            print(f"  findings: {', '.join(findings.get(modality.id, [])) or '(none named)'}")
        else:
            print("  not learned by this model")


def say(message: str) -> None:
    """Prints to stderr, once where several processes run the same command."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)


# What each does and is described as, its options, and how it is listed.
COMMANDS: dict[str, tuple[Callable, type[Options], str]] = {
    "generate": (run_generate, GenerateCommand, "draw images of one prompt, or of a list of them"),
    "plan": (run_plan, PlanCommand, "write down which images to draw, for generate --plan in many processes"),
    "score": (run_score, ScoreOptions, "rate images with the filter"),
    "ratings": (run_ratings, RatingsCommand, "people's ratings: out of the rating page's store as a CSV, or into it"),
    "evaluate": (run_evaluate, EvaluateOptions, "measure synthetic images against real ones"),
    "modalities": (run_modalities, ModelOptions, "list modalities, their aliases, and a model's findings"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs `minim` with the arguments `argv` (default: those of the process), and returns its exit code.

    0: done. 2: bad input, said in one message, and nothing written. 3: done, but with --accepted-only fewer images
    than asked for. 130: stopped by Ctrl-C; the same command goes on.
    """
    args, unknown = build_parser().parse_known_args(argv)
    try:
        if unknown:
            raise ValueError(f"unknown arguments {' '.join(unknown)} (see minim {args.command} --help)")
        return args.run(options_from(args.options, args)) or 0
    except (ValueError, OSError, EOFError, ImportError) as error:
        say(f"minim {args.command}: error: {str(error) or 'no answer'}")
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
