"""The published runs in runs/: every command is one that its script understands."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_script, small_classifiers, write_csv
from PIL import Image

from minim_pipeline import resolve_modality
from minim_pipeline.evaluation.judges import load_judges
from minim_pipeline.evaluation.stand_in import StandIn
from minim_pipeline.training.config import yaml_arguments


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
        from minim_pipeline.cli import build_parser
        from minim_pipeline.evaluation.options import EvaluateOptions
        from minim_pipeline.options import options_from

        options_from(EvaluateOptions, build_parser().parse_args(["evaluate", *arguments]))
        return
    module = importlib.import_module(Path(script).stem)
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


# The embedded model in miniature: what each script is given beside. The rounds, the evaluation and the card, whose
# template tells of six modalities, have tests of their own.
TINY = {
    "train_autoencoder": "--preset tiny --resolution 64 --crop 32 --train_batch_size 2 --max_train_steps 1",
    "train_text_encoder": "--corpus_size 20 --vocab_size 700 --hidden_size 32 --num_layers 1 --max_train_steps 1",
    "train_text_to_image": "--preset tiny --resolution 64 --train_batch_size 4 --max_train_steps 1 "
    "--caption_variants 2 --latent_variants 1 --validation_samples 1 --num_inference_steps 2",
    "train_classifier": "--width 16 --resolution 32 --train_batch_size 4 --max_train_steps 1 --min_train 1 "
    "--min_val 1",
    "train_encoder": "--width 8 --text_width 16 --projection 12 --resolution 32 --train_batch_size 4 "
    "--max_train_steps 1 --caption_variants 2",
    "add_modality": "--train_batch_size 4 --max_train_steps 1 --caption_variants 2 --latent_variants 1 "
    "--validation_samples 1 --min_train 1 --min_val 1",
    "train_filter": "--resolution 64 --min_train 1 --caption_variants 2 --latent_variants 1 --drawn_images 4 "
    "--draw_batch_size 4 --trajectory_steps 2 --train_batch_size 4 --block_out_channels 8 16 --max_train_steps 2 "
    "--rating_steps 1 --folds 2",
    "stand_in": "--classifier_steps 1 --realism_steps 1 --width 16 --min_train 1 --min_val 1 --images_per_caption 1",
    "calibrate_filter": "--prompts_per_modality 4 --candidates 2 --code_bits 16 --code_versions 2 --min_train 1 "
    "--min_val 1 --finding_floor 1 --most_cost 2 --copy_false_alarms 0.5 --batch_size 8",
    "evaluate_filter": "--images_per_finding 3 --pairs 4 --batch_size 16",
    "gather_filter": "",
    "compare_models": "--images_per_finding 3 --pairs 4 --batch_size 16",
    "report_model": "--images_per_finding 1 --batch_size 4 --num_inference_steps 1 --dtype float32 --threads 1",
}
KINDS = [("OCT", "normal"), ("OCT", "diabetic macular edema"), ("CXR", "normal"), ("CXR", "COVID-19")]
KINDS += [("BreastUS", "benign"), ("BreastUS", "malignant")]


def write_images(folder: Path) -> None:
    """Six train images and three val images of each finding, in the CSV files of the run, and grades of some."""
    generator, rows = torch.Generator().manual_seed(0), []
    for i in range(9 * len(KINDS)):
        modality, finding = KINDS[i % len(KINDS)]
        image = (torch.rand(8, 8, 3, generator=generator) * 255).byte().numpy()
        Image.fromarray(image).resize((64, 64), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
        split, part = ("val", "") if i >= 6 * len(KINDS) else ("train", "ABC"[i // len(KINDS) % 3])
        row = dict(path=f"{i}.png", Text=f"{finding.capitalize()}.", modality=modality, finding=finding, split=split)
        rows.append(row | {"part": part, "group": f"g{i}"})
    new = [row for row in rows if row["modality"] == "BreastUS"]
    write_csv(folder / "data.csv", [row for row in rows if row not in new])
    write_csv(folder / "new_domain.csv", new)
    for name in ("all", "judged", "replay"):
        write_csv(folder / f"{name}.csv", rows)
    graded = [{**row, "rating": 1 + i % 3, "source": "camera"} for i, row in enumerate(rows[:12])]
    write_csv(folder / "ratings.csv", graded)


@pytest.mark.slow
def test_the_embedded_model_is_made_from_images_to_its_report(tmp_path, teacher, monkeypatch):
    """What one command writes is what the next takes."""
    write_images(tmp_path)
    names = {"FIVE": "data", "NEW": "new_domain", "ALL": "all", "JUDGED": "judged", "RATINGS": "ratings"}
    variables = {name: str(tmp_path / f"{file}.csv") for name, file in {**names, "REPLAY": "replay"}.items()}
    out = tmp_path / "out"
    texts: dict[str, dict] = {}
    for modality, finding in KINDS:
        phrasings = {"train": [finding], "new": [f"Shows {finding}"]}
        texts.setdefault(resolve_modality(modality).id, {})[finding] = phrasings
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    captions = ["--captions", str(tmp_path / "texts.json")]
    special = {"train_text_encoder": ["--teacher", str(teacher)], "report_model": captions, "gather_filter": []}
    special |= {name: [*captions, "--mixed_precision", "no"] for name in ("evaluate_filter", "compare_models")}
    for call in commands(RUNS / "embedded" / "run.sh", tmp_path, **variables):
        if call[0] == "-c":
            monkeypatch.setattr("sys.argv", call[1:])
            exec(call[1], {})
            continue
        script, *arguments = call
        name = Path(script).stem
        if name == "self_improve":
            options = dict(zip(arguments[::2], arguments[1::2], strict=True))
            model = options["--pretrained_model_name_or_path"]
            shutil.copytree(model, Path(options["--output_dir"]) / "pipeline", dirs_exist_ok=True)
        if name not in TINY:
            continue
        module = importlib.import_module(name)
        if arguments[0].endswith(".yaml"):
            arguments = [*yaml_arguments(ROOT / arguments[0]), *arguments[1:]]
        arguments += [*TINY[name].split(), *special.get(name, ["--mixed_precision", "no"])]
        if "--compile" in arguments:
            arguments += ["--compile", "False"]
        with small_classifiers():
            run_script(module, *arguments)
    filtered = json.loads((out / "docs" / "filter" / "report.json").read_text())
    compared = json.loads((out / "comparison" / "report.json").read_text())
    assert filtered["comparisons"] and compared["n"] == 36 and "rated_3_by_stand_in" in compared
    report = json.loads((out / "docs" / "report.json").read_text())
    assert set(report["generated"]["new"]["modalities"]) == {"oct", "cxr", "breast_us"}
    assert StandIn.from_pretrained(out / "stand_in").findings.classes == load_judges(out / "judges").classes
