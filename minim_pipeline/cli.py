"""The command `minim`. Arguments are checked before torch and diffusers, which take seconds, are imported."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import __version__
from .evaluation.command import run as evaluate
from .evaluation.options import EvaluateOptions
from .generate.command import GenerateCommand, PlanCommand, run_generate, run_plan
from .generate.draw import REASONS
from .generate.options import ModelOptions
from .loading import register_modalities
from .modalities import MODALITIES, resolve_modality
from .options import Options, add_options, option, options_from
from .ratings import RatingStore, counts, read_ratings
from .scoring import ScoreOptions, score_csv
from .terminal import say


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


@dataclass(kw_only=True)
class PushDatasetCommand(Options):
    """The set, and where it goes."""

    separator = "-"

    data: Path = option(help="Folder that minim generate has written, flat or in shards.")
    repo_id: str = option(help="Where to: owner/name.")
    license: str = option(help="For the images, as the Hub calls it, e.g. cc-by-4.0, or other.")
    license_name: str | None = option(None, "Of the license other.")
    private: bool = option(False, "A new repository becomes private.")
    dry_run: bool = option(False, "List the files and print the card; nothing is asked of the Hub, or sent.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.license == "other") != bool(self.license_name):
            raise ValueError("--license other needs --license-name, and no other license has one.")


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


def run_push_dataset(options: PushDatasetCommand) -> None:
    """Puts a generated set on the Hugging Face Hub, with a card: generator, settings, acceptance, counts, samples.

    Every image has to say that it is synthetic; files with paths of this machine are refused. The token is what `hf
    auth login` stored, or HF_TOKEN.
    """
    from .publishing import publish_dataset, staged_dataset

    fields = {name: value for name, value in options.values("license", "license_name").items() if value}
    if options.dry_run:
        with staged_dataset(options.data, options.repo_id, fields) as folder:
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                print(f"{path.stat().st_size:>14,}  {path.relative_to(folder).as_posix()}")
            print((folder / "README.md").read_text(encoding="utf-8"))
        return
    say(f"dataset: {publish_dataset(options.data, options.repo_id, fields, options.private or None)}")


# What each does and is described as, its options, and how it is listed.
COMMANDS: dict[str, tuple[Callable, type[Options], str]] = {
    "generate": (run_generate, GenerateCommand, "draw images of one prompt, or of a list of them"),
    "plan": (run_plan, PlanCommand, "write down which images to draw, for generate --plan in many processes"),
    "score": (run_score, ScoreOptions, "rate images with the filter"),
    "ratings": (run_ratings, RatingsCommand, "people's ratings: out of the rating page's store as a CSV, or into it"),
    "evaluate": (run_evaluate, EvaluateOptions, "measure synthetic images against real ones"),
    "push-dataset": (run_push_dataset, PushDatasetCommand, "put a generated set on the Hugging Face Hub"),
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
