"""The pages' commands and blocks of Python, and which script or command of the project each runs."""

import argparse
import re
import runpy
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md"))])
# Programs that are not the project's.
FOREIGN = ("hf", "pre-commit", "python -m pytest", "python -m ruff", "python -m mypy")


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str

    @property
    def commands(self) -> list[tuple[int, list[str]]]:
        """Line in the page and words of each command; a backslash goes on in the next line."""
        found, line = [], self.line + 1
        for command in re.split(r"(?<!\\)\n", self.text.rstrip("\n")):
            if words := shlex.split(command.replace("\\\n", " "), comments=True):
                found.append((line, words))
            line += command.count("\n") + 1
        return found


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(page, text.count("\n", 0, m.start()) + 1, m[1], m[2]) for m in found]


def write_options(page: Path) -> None:
    """Writes what a page says of a file of options, a block of YAML, into the working directory."""
    for block in blocks(page):
        if block.language == "yaml":
            Path("options.yaml").write_text(block.text)


def understand(words: list[str]) -> tuple[str, list[str]]:
    """The program that a command runs, e.g. "minim score", "train_filter" or "bench/bench_space", and its options."""
    words = [str(ROOT / word) if word.startswith("runs/") and (ROOT / word).is_file() else word for word in words]
    if words[:2] == ["accelerate", "launch"]:
        from accelerate.commands.launch import launch_command_parser

        launched = launch_command_parser().parse_args(words[2:])
        words = [
            "python",
            *(["-m"] if launched.module else []),
            launched.training_script,
            *launched.training_script_args,
        ]
    if words[:3] == ["python", "-m", "minim_pipeline.cli"]:
        words = ["minim", *words[3:]]
    if words[0] == "minim":
        return f"minim {words[1]}", words[2:]
    if words[0] == "python" and words[1].endswith(".py"):
        return words[1].removesuffix(".py").removeprefix("train/"), words[2:]
    if words[:2] == ["python", "-m"]:
        return " ".join(words[:3]), words[3:]
    return words[0], words[1:]


class Parsed(Exception):
    pass


def parse(program: str, arguments: list[str], monkeypatch) -> argparse.Namespace:
    """Runs a script until it has parsed its arguments, as the script itself does it."""
    import minim_pipeline.cli

    if program.startswith("minim "):
        found, unknown = minim_pipeline.cli.build_parser().parse_known_args([program.split()[1], *arguments])
        assert not unknown, f"{program} has no {unknown}"
        return found
    found = []

    def parse_known_args(parser, args=None, namespace=None):
        known, unknown = original(parser, args, namespace)
        assert not unknown, f"{program} has no {unknown}"
        found.append(known)
        raise Parsed

    original = argparse.ArgumentParser.parse_known_args
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)
        with pytest.raises(Parsed):
            run_script(program, arguments, patch)
    return found[0]


def run_script(program: str, arguments: list[str], monkeypatch) -> None:
    script = ROOT / (f"{program}.py" if "/" in program else f"train/{program}.py")
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    monkeypatch.syspath_prepend(str(script.parent))
    runpy.run_path(str(script), run_name="__main__")
