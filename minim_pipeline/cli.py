"""The command `minim`. Arguments are checked before torch and diffusers, which take seconds, are imported."""

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from . import EMBEDDED_CHECKPOINT, __version__
from .captions import check_caption
from .data.image_reader import add_reading_arguments
from .data.sources import image_name, name_digits, read_csv
from .evaluation.command import add_arguments as add_evaluate_arguments
from .evaluation.command import run as evaluate
from .generate.command import DTYPES, REASONS, SCHEDULERS, Item, generate, plan_file, plan_prompt, register_modalities
from .generate.shortfall import MAX_ROUNDS, Shortfall
from .modalities import MODALITIES, resolve_modality, split_prefix
from .ratings import RatingStore, counts, read_ratings
from .scoring import score_csv


IMAGE_ROOT_HELP = "look for the images here: under their whole path, or what is left of it without its first folders"


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def number(kind: type, least: float, multiple: int = 1) -> Callable[[str], float]:
    """A type for argparse: a number of `kind` from `least` on, and a multiple of `multiple`."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        # Written so that nan fails too.
        if value is None or not least <= value < 2**63 or (multiple > 1 and value % multiple):
            what = "a whole number" if kind is int else "a number"
            of = f", a multiple of {multiple}" if multiple > 1 else ""
            raise argparse.ArgumentTypeError(f"has to be {what} from {least} on{of}, got {text!r}")
        return value

    return parse


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="minim", description="Synthetic medical images from a modality and a sentence.")
    parser.add_argument("--version", action="version", version=f"minim {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    model = {
        "default": str(EMBEDDED_CHECKPOINT),
        "metavar": "PATH_OR_HUB_ID",
        "help": "a folder or a model on the Hub (default: the embedded model)",
    }

    p = commands.add_parser(
        "generate",
        help="draw images of one prompt, or of a list of them",
        description="Draws images of one prompt, or of a CSV of prompts, into a folder: NNNN.png, grid.png, and "
        "data.csv in MINIM's format. At a terminal it asks for what is missing. The same command again goes on where "
        "it was stopped and repeats nothing; several GPUs: accelerate launch -m minim_pipeline.cli generate ...",
    )
    p.set_defaults(run=run_generate)
    p.add_argument(
        "--modality",
        help="e.g. OCT, Fundus, CXR, ChestCT, BrainMRI; minim modalities lists them. With --prompts-file: of all rows",
    )
    p.add_argument("--prompt", help="what the image shows, e.g. 'diabetic macular edema'")
    p.add_argument(
        "--prompts-file",
        type=Path,
        metavar="CSV",
        help="many prompts: columns Text,modality, optional num_images,seed; others are carried through to data.csv",
    )
    p.add_argument("--num-images", type=number(int, 1), help="images of the prompt (default 4), or of each row (1)")
    p.add_argument(
        "--seed",
        type=number(int, 0),
        default=0,
        help="image i uses seed + i; of a row with a seed of its own, image i uses that one + i (default 0)",
    )
    p.add_argument("--output-dir", type=Path, metavar="FOLDER")
    p.add_argument("--model", **model)
    p.add_argument(
        "--unet",
        type=Path,
        metavar="FOLDER",
        help="draw with this U-Net, such as MINIM's checkpoint/unet; --model is what it was trained from. If that is "
        "Stable Diffusion, the prompt is read as it stands, as in MINIM's training",
    )
    p.add_argument("--num-inference-steps", type=number(int, 1), help="default: the model's own")
    p.add_argument("--guidance-scale", type=number(float, 0), help="default: the model's own")
    p.add_argument("--negative-prompt", help="what the image shall not show")
    size = "pixels, a multiple of 8 (default: the model's own; it has learned no other)"
    p.add_argument("--height", type=number(int, 8, multiple=8), help=size)
    p.add_argument("--width", type=number(int, 8, multiple=8), help=size)
    p.add_argument("--scheduler", choices=SCHEDULERS, help="default: the model's own")
    p.add_argument("--lora", metavar="PATH_OR_HUB_ID", help="LoRA weights to add, of diffusers, kohya or PEFT")
    p.add_argument("--device", help="e.g. cpu, cuda, cuda:1 (default: a GPU if there is one)")
    p.add_argument("--dtype", choices=DTYPES, default="float32")
    p.add_argument("--batch-size", type=number(int, 1), help="images drawn together (default 4 on a CPU, else 8)")
    p.add_argument("--no-filter", action="store_true", help="leave the model's filter out")
    p.add_argument("--num-candidates", type=number(int, 1), help="of which the filter chooses (default: the model's)")
    p.add_argument(
        "--filter-threshold", type=number(float, 1), help="score from 1 to 3 to accept (default: the model's)"
    )
    p.add_argument(
        "--max-rounds",
        type=number(int, 1),
        help=f"draw what falls short again (default 1: never; with --accepted-only {MAX_ROUNDS})",
    )
    p.add_argument(
        "--accepted-only",
        action="store_true",
        help="write accepted images alone, drawn on until there are as many as asked for, at most --max-rounds times;"
        " exit code 3 if some fall short",
    )
    p.add_argument("--keep-copies", action="store_true", help="let the filter accept copies of training images")
    p.add_argument("--skip-bad-rows", action="store_true", help="leave bad rows of the CSV out instead of stopping")
    p.add_argument("--quiet", action="store_true", help="no progress bar, and nothing said at the end")

    p = commands.add_parser(
        "score",
        help="rate images with the filter",
        description="Rates the images of a CSV, real or generated, with the filter of a model: a score from 1 to 3, "
        "the ratings of quality and finding that it is made of, whether the filter accepts them, and why not.",
    )
    p.set_defaults(run=run_score)
    p.add_argument("--data", type=Path, required=True, metavar="CSV", help="columns path,Text,modality")
    p.add_argument("--output", type=Path, metavar="CSV", help="default: NAME-scored.csv beside the data")
    p.add_argument("--split", help="only its rows of this split")
    p.add_argument("--modality", help="of all rows, where the CSV has no such column")
    p.add_argument("--image-root", "--image_root", type=Path, metavar="FOLDER", help=IMAGE_ROOT_HELP)
    p.add_argument("--model", **model)
    p.add_argument("--device", help="e.g. cpu, cuda (default: a GPU if there is one)")
    p.add_argument("--batch-size", type=number(int, 1), default=16)
    p.add_argument("--keep-copies", action="store_true", help="do not reject the model's training images and copies")
    add_reading_arguments(p)
    p.add_argument("--skip-bad-rows", action="store_true", help="leave bad rows of the CSV out instead of stopping")
    p.add_argument("--quiet", action="store_true", help="no progress bar, and nothing said at the end")

    p = commands.add_parser(
        "ratings",
        help="people's ratings: out of the store of the rating page as a CSV, or into it",
        description="Writes a store's ratings as the CSV that train_filter.py reads, or adds a CSV's to the store.",
    )
    p.set_defaults(run=run_ratings)
    p.add_argument("--store", type=Path, required=True, metavar="SQLITE", help="ratings.sqlite of the rating page")
    way = p.add_mutually_exclusive_group(required=True)
    way.add_argument("--output", type=Path, metavar="CSV", help="write all ratings there")
    way.add_argument("--input", type=Path, metavar="CSV", help="add these ratings to the store")
    p.add_argument("--images", type=Path, required=True, metavar="FOLDER", help="of the generated images rated")
    p.add_argument("--real", type=Path, metavar="FOLDER", help="of the real images rated")
    p.add_argument(
        "--modalities-from", metavar="PATH_OR_HUB_ID", help="know the modalities that this model has defined, too"
    )

    p = commands.add_parser(
        "evaluate",
        help="measure synthetic images against real ones",
        description="Measures synthetic images against real ones: are they faithful, diverse, what was asked for, "
        "useful, and new? Writes report.json and report.html, a page that stands alone. The same command again draws "
        "and trains nothing twice; several GPUs: accelerate launch -m minim_pipeline.cli evaluate ...",
    )
    p.set_defaults(run=run_evaluate)
    add_evaluate_arguments(p)

    p = commands.add_parser("modalities", help="list modalities, their aliases, and the findings that a model learned")
    p.set_defaults(run=run_modalities)
    p.add_argument("--model", **model)
    return parser


def prompt(text: str) -> str:
    """`text`, unless it stands for a caption that is missing."""
    check_caption(text)
    return text


def ask(question: str, parse: Callable[[str], object], default: str | None = None) -> object:
    """Asks at the terminal until `parse` takes the answer."""
    while True:
        answer = input(f"{question}{f' [{default}]' if default else ''}: ").strip() or default
        try:
            if answer:
                return parse(answer)
        except (ValueError, argparse.ArgumentTypeError) as error:
            print(error)


def complete(args: argparse.Namespace, trained: list[str] | None) -> None:
    """Fills in what `args` lacks by asking for it, or raises ValueError where nobody can be asked."""
    if args.prompts_file is not None:
        if args.prompt is not None:
            raise ValueError("--prompts-file names the prompts itself: leave --prompt out.")
        needed = ["output_dir"]
    else:
        if args.prompt is not None and args.modality is None:
            args.modality, args.prompt = split_prefix(args.prompt, trained)  # MINIM's own "OCT: macular edema"
        needed = ["modality", "prompt", "output_dir"]
    missing = [name for name in needed if getattr(args, name) is None]
    if args.modality is not None:
        args.modality = resolve_modality(args.modality, trained)
    if args.prompt is not None and not args.prompt.strip():
        raise ValueError(f"--prompt has to say what the image shows, got {args.prompt!r}.")
    for name in ("prompt", "negative_prompt"):
        text = getattr(args, name)
        if text is not None and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"--{name.replace('_', '-')} is not UTF-8: {text!r}.")
        check_caption(text or "")
    if missing and not sys.stdin.isatty():
        options = ", ".join("--" + name.replace("_", "-") for name in missing)
        raise ValueError(f"{options} missing (they are asked for at a terminal only).")

    if "modality" in missing:
        names = ", ".join(MODALITIES[id].name for id in trained or MODALITIES)
        args.modality = ask(f"Modality ({names})", lambda answer: resolve_modality(answer, trained))
    if "prompt" in missing:
        args.prompt = ask("Prompt, e.g. diabetic macular edema", prompt)
    if args.num_images is None:
        if missing and args.prompts_file is None:
            args.num_images = ask("Number of images", number(int, 1), "4")
        else:
            args.num_images = 4 if args.prompts_file is None else 1
    if "output_dir" in missing:
        args.output_dir = ask("Output folder", Path, "out")


def run_generate(args: argparse.Namespace) -> int:
    trained = register_modalities(args.model).get("modalities") or None
    complete(args, trained)
    if args.prompts_file is not None:
        with warnings.catch_warnings(record=True) as caught:
            modality = args.modality and args.modality.id
            items = plan_file(args.prompts_file, args.num_images, args.seed, trained, args.skip_bad_rows, modality)
        for warning in caught:
            say(f"minim generate: warning: {warning.message}")
    else:
        items = plan_prompt(args.prompt.strip(), args.modality, args.num_images, args.seed)

    own = ("command", "run", "modality", "prompt", "prompts_file", "num_images", "seed", "skip_bad_rows")
    folder = args.output_dir
    try:
        generate(items, **{name: value for name, value in vars(args).items() if name not in own})
    except KeyboardInterrupt:
        digits = name_digits(folder, len(items))
        done = sum((folder / image_name(item.index, digits)).exists() for item in items)
        say(f"\nStopped: {done} of {len(items)} images are in {folder}. The same command goes on from there.")
        raise
    if args.accepted_only:
        return tell_accepted(items, folder, args.quiet)
    if not args.quiet:
        say(f"{len(items)} images in {folder}: {folder / 'grid.png'} shows them, {folder / 'data.csv'} lists them.")
        rows = [row for row in read_csv(folder / "data.csv", check_images=False) if row.get("accepted")]
        if rows:
            drawn = sum(int(row["candidates"]) for row in rows)
            accepted = sum(row["accepted"] == "true" for row in rows)
            why = {reason: sum(int(row[f"rejected_{reason}"] or 0) for row in rows) for reason in REASONS}
            say(
                f"The filter accepted {accepted} of {len(rows)} images. Of {drawn} candidates it left out"
                f" {sum(why.values())}: {why['quality']} for their quality, {why['finding']} for the finding,"
                f" {why['copy']} as copies of training images."
            )
    return 0


def tell_accepted(items: list[Item], folder: Path, quiet: bool) -> int:
    """What --accepted-only came to and what it cost; the exit code, 3 if images fell short, which is always told."""
    short = list(Shortfall(folder).entries.values())
    data, digits = folder / "data.csv", name_digits(folder, len(items))
    asked = {image_name(item.index, digits) for item in items}  # the folder may hold more, of an earlier run
    rows = read_csv(data, check_images=False) if data.exists() else []
    rows = [row for row in rows if row["path"] in asked]
    drawn = sum(int(row["candidates"]) for row in rows) + sum(entry["candidates"] for entry in short)
    if not quiet:
        each = f", {drawn / len(rows):.1f} for each of them" if rows else ""
        say(
            f"{len(rows)} accepted images in {folder}, of {len(items)} asked for. {drawn} candidates were drawn{each}."
        )
    if not short:
        return 0
    why = {reason: sum(entry["rejected"].get(reason, 0) for entry in short) for reason in REASONS}
    told, rounds = ", ".join(f"{reason} {count}" for reason, count in why.items()), max(e["rounds"] for e in short)
    say(
        f"minim generate: {len(short)} of {len(items)} images fell short in {rounds} round{'s' * (rounds > 1)} ({told}"
        f"; {Shortfall(folder).file} lists them): the same command with a larger --max-rounds goes on."
    )
    return 3


def run_evaluate(args: argparse.Namespace) -> None:
    evaluate(args)
    say(f"The report is in {args.output_dir}: report.html to look at, report.json with every figure.")


def run_score(args: argparse.Namespace) -> None:
    path, rows = score_csv(**{name: value for name, value in vars(args).items() if name not in ("command", "run")})
    if args.quiet:
        return
    for name in dict.fromkeys(resolve_modality(row["modality"]).name for row in rows):
        mine = [row for row in rows if resolve_modality(row["modality"]).name == name]
        accepted, mean = sum(row["accepted"] == "true" for row in mine), sum(float(row["score"]) for row in mine)
        counts = [(reason, sum(row["reason"] == reason for row in mine)) for reason in REASONS]
        why = ", ".join(f"{reason} {count}" for reason, count in counts if count)
        why = f" (rejected: {why})" if why else ""
        say(f"{name}: {accepted} of {len(mine)} accepted{why}, mean score {mean / len(mine):.2f}")
    say(f"{path} lists them.")


def run_ratings(args: argparse.Namespace) -> None:
    if args.output is not None and not args.store.is_file():
        raise ValueError(f"There is no store of ratings at {args.store}.")
    folders = {"generated": args.images} | ({"real": args.real} if args.real else {})
    for folder in folders.values():
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder.")
    if args.modalities_from:
        register_modalities(args.modalities_from)
    if args.input is not None and not args.store.exists():
        read_ratings(args.input, folders)  # what is wrong is told before there is a store
    store = RatingStore(args.store)
    if args.input is not None:
        say(f"{store.read_csv(args.input, folders)} ratings of {args.input} are in {args.store} now.")
        return
    number = store.write_csv(args.output, folders)
    table = ", ".join(f"{MODALITIES[name].name} {row['ratings']}" for name, row in counts(store.ratings()).items())
    say(f"{number} ratings in {args.output}{f' ({table})' if table else ''}.")


def run_modalities(args: argparse.Namespace) -> None:
    index = register_modalities(args.model)
    trained = index.get("modalities") or []
    findings = index.get("findings") or {}
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


def main(argv: list[str] | None = None) -> int:
    """Runs `minim` with the arguments `argv` (default: those of the process), and returns its exit code.

    0: done. 2: bad input, said in one message, and nothing written. 3: done, but with --accepted-only fewer images
    than asked for. 130: stopped by Ctrl-C; the same command goes on.
    """
    args, unknown = build_parser().parse_known_args(argv)
    try:
        if unknown:
            raise ValueError(f"unknown arguments {' '.join(unknown)} (see minim {args.command} --help)")
        return args.run(args) or 0
    except (ValueError, OSError, EOFError, ImportError) as error:
        say(f"minim {args.command}: error: {str(error) or 'no answer'}")
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
