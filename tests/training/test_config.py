"""Options of the training commands: the same from a command line, from YAML and in Python, and refused alike."""

import importlib
import pkgutil
from dataclasses import MISSING, dataclass, fields
from typing import get_args, get_type_hints

import pytest

import minim_pipeline.evaluation
import minim_pipeline.training
from minim_pipeline.options import Options, Range, ranges
from minim_pipeline.training.autoencoder import AutoencoderConfig
from minim_pipeline.training.config import RunOptions, option, parse


for package in (minim_pipeline.training, minim_pipeline.evaluation):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
importlib.import_module("report_model")  # the others in research/ have theirs in the package


def below(options: type) -> list[type]:
    return [found for part in options.__subclasses__() for found in (part, *below(part))]


CONFIGS = [config for config in below(Options) if config.__module__.startswith(("minim_pipeline", "report_model"))]
# What has to be given for any of them, so that only the option in question is wrong.
NEEDED = dict.fromkeys(("train_data", "output_dir", "data", "teacher", "model"), "none")
# Values of pixels, of either sign; `check_reading` looks at them.
OF_ANY_SIGN = {"window"}


def given(config: type) -> dict:
    """Values for the options that have no default."""
    asked = [f.name for f in fields(config) if f.default is MISSING and f.default_factory is MISSING]
    return {name: NEEDED.get(name, "none") for name in asked}


def numbers(config: type) -> dict[str, list[Range]]:
    """The options that are numbers, with their ranges."""
    found = {}
    for name, hint in get_type_hints(config, include_extras=True).items():
        plain = get_type_hints(config)[name]
        kinds = {plain, *get_args(plain), *(a for part in get_args(plain) for a in get_args(part))}
        if kinds & {int, float} and name not in OF_ANY_SIGN:
            found[name] = ranges(hint)
    return found


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_number_has_a_range_and_nothing_beside_it_passes(config):
    passed = []
    for name, limits in numbers(config).items():
        assert limits, f"{config.__name__}.{name} is a number of any size"
        for value in (-1, float("nan"), float("inf"), *([0] if limits[0] == Range(1) else [])):
            try:
                config(**given(config) | {name: value})
            except ValueError as error:
                assert f"--{name.replace('_', config.separator)} has to be" in str(error) and str(value) in str(
                    error
                ), error
            else:
                passed.append((name, value))
    assert not passed


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_help_names_every_option_once(config, capsys):
    with pytest.raises(SystemExit) as end:
        parse(config, ["--help"], "What it does.")
    told = capsys.readouterr().out
    assert end.value.code == 0 and "What it does." in told
    assert all(f"--{field.name}" in told for field in fields(config))


def test_yaml_and_command_line_say_the_same(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("train_data: a.csv\noutput_dir: out\nlearning_rate: 1e-5\ncompile: true\nwindow: [-1000, 400]\n")
    call = ["--train_data", "a.csv", "--output_dir", "out", "--learning_rate", "1e-5", "--compile"]
    expected = AutoencoderConfig(
        train_data="a.csv", output_dir="out", learning_rate=1e-5, compile=True, window=[-1000, 400]
    )
    assert parse(AutoencoderConfig, [str(file)]) == expected
    assert parse(AutoencoderConfig, [*call, "--window", "-1000", "400"]) == expected
    assert parse(AutoencoderConfig, [*call, "--window", "-1000", "400", "--train-data", "a.csv"]) == expected
    # The command line has the last word.
    assert parse(AutoencoderConfig, [str(file), "--learning_rate", "2"]).learning_rate == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [("- 1\n", "has to be a table of options"), ("train_data: a\noutput_dir: b\nlearning_rat: 1\n", "learning_rat")],
)
def test_a_yaml_file_with_something_else_is_refused(tmp_path, capsys, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises((ValueError, SystemExit)) as error:
        parse(AutoencoderConfig, [str(file)])
    assert message in str(error.value) + capsys.readouterr().err


def test_an_option_that_is_cut_short_is_not_guessed(capsys):
    with pytest.raises(SystemExit):
        parse(AutoencoderConfig, ["--train_data", "a", "--output_dir", "b", "--learn", "1"])
    assert "unrecognized arguments: --learn 1" in capsys.readouterr().err


def test_ranges_are_told_as_they_are():
    @dataclass(kw_only=True)
    class Own(RunOptions):
        part: float = option(0.5, "Of what.")

    assert Own(output_dir="x").part == 0.5
    for limits, value, message in (
        (Range(0, 1), 1.5, "--a has to be between 0 and 1, got 1.5"),
        (Range(0, open=True), 0, "--a has to be above 0, got 0"),
        (Range(0, 1, open=True), 1, "--a has to be above 0 and below 1, got 1"),
        (Range(1), 0, "--a has to be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            limits.check("a", value)
