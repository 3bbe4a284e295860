"""The published runs in runs/: every command is one that its script understands."""

import importlib
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from minim_pipeline.training.config import yaml_arguments


ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs"
# In the place of python and accelerate: writes what it is called with, and does nothing.
STUB = """#!/usr/bin/env bash
printf '%s\\0' "$(basename "$0")" "$@" >> "$CALLS"
printf '\\036\\0' >> "$CALLS"
"""


class Parsed(Exception):
    """The options were understood: what comes after is not for these tests."""


def commands(script: Path, folder: Path, **variables: str) -> list[list[str]]:
    """The calls of Python that a shell script makes, each from the script's path or `-c` on."""
    (folder / "bin").mkdir(exist_ok=True)
    for name in ("python", "accelerate", "cp"):
        (folder / "bin" / name).write_text(STUB)
        (folder / "bin" / name).chmod(0o755)
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "CALLS": str(folder / "calls"), "OUT": str(folder / "out"), **variables}
    subprocess.run(["bash", str(script)], check=True, cwd=ROOT, env=environment)
    calls = [call.split("\0")[:-1] for call in (folder / "calls").read_text().split("\x1e\0")[:-1]]
    found = []
    for program, *call in calls:
        if program == "accelerate":
            call = call[next(i for i, part in enumerate(call) if part.endswith(".py")) :]
        if program != "cp":
            found.append(call)
    return found


def understood(call: list[str], monkeypatch) -> None:
    """Fails unless the script of `call` takes its options."""
    if call[0] == "-c":
        compile(call[1], "runs", "exec")
        return
    script, *arguments = call
    if "train/evaluate" in script:
        import argparse

        from minim_pipeline.evaluation.command import add_arguments, check

        parser = argparse.ArgumentParser()
        add_arguments(parser)
        check(parser.parse_args(arguments))
        return
    module = importlib.import_module(Path(script).stem)
    if hasattr(module, "parse_args"):  # as long as its options are no dataclass
        if arguments[0].endswith(".yaml"):
            switches = [part for part in yaml_arguments(ROOT / arguments[0]) if part != "True"]
            arguments = [*switches, *arguments[1:]]
        module.parse_args(arguments)
    else:
        parse = module.parse

        def only_parse(config, argv=None, description=None):
            parse(config, argv, description)
            raise Parsed

        with monkeypatch.context() as patch:
            patch.setattr(module, "parse", only_parse)
            with pytest.raises(Parsed):
                module.main(arguments)


def make_files(call: list[str], folder: Path) -> None:
    """What a command is given, or earlier ones have made, is there."""
    for path in (Path(part) for part in call if part.startswith(str(folder))):
        places = [path] if path.suffix else [path / "report.json", path / "candidates.npz"]
        for place in places:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


SCRIPTS = [
    ("embedded/run.sh", {}, 24),
    ("round.sh", {}, 1),
    ("round.sh", {"RATINGS": "given.csv"}, 1),
    ("round.sh", {"STAND_IN": "1"}, 2),
    ("new_modality.sh", {}, 2),
]


@pytest.mark.parametrize(("script", "variables", "count"), SCRIPTS)
def test_every_command_of_a_shell_script_is_understood(script, variables, count, tmp_path, monkeypatch):
    data = re.findall(r"^(\w+)=\$\{\w+:-(\w+\.csv)\}", (RUNS / script).read_text(), re.MULTILINE)
    variables = {name: str(tmp_path / file) for name, file in [*data, *variables.items()]}
    for file in variables.values():
        Path(file).touch()
    calls = commands(RUNS / script, tmp_path, **variables)
    assert len(calls) == count
    for call in calls:
        make_files(call, tmp_path)
        understood(call, monkeypatch)


@pytest.mark.parametrize("file", sorted(RUNS.rglob("*.yaml")), ids=lambda file: file.name)
def test_the_command_above_the_options_of_a_trainer_is_understood(file, monkeypatch):
    comment = "".join(line.removeprefix("#") for line in file.read_text().splitlines(True) if line.startswith("#"))
    command = re.search(r"(?:accelerate launch|python) (?:.*\\\n)*.*", comment)[0]
    words = shlex.split(command.replace("\\\n", " "))
    call = words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]
    assert call[1] == file.relative_to(ROOT).as_posix()
    understood(call, monkeypatch)


def test_an_option_that_there_is_not_would_be_seen(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        understood(["train/train_encoder.py", "--train_data", "a", "--output_dir", "b", "--widht", "8"], monkeypatch)
    assert "--widht" in capsys.readouterr().err


def test_every_run_is_listed():
    names = {path.relative_to(RUNS).as_posix() for path in RUNS.rglob("*.sh") if "out" not in path.parts}
    assert names == {script for script, _, _ in SCRIPTS}
