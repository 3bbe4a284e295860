"""What no run can have is refused by every script before any work is done, in the same words."""

import importlib

import pytest


NEEDED = {"train_data": "none.csv", "output_dir": "none", "data": "none.csv", "output": "none.json", "model": "none"}
NEEDED |= {"before": "none", "after": "none", "teacher": "none", "filter_head": "none", "modality": "dermoscopy"}
NEEDED |= {"ratings": "none.csv", "replay": "none.csv"}
SCRIPTS = [
    *("train_autoencoder", "train_text_to_image", "train_text_encoder", "train_filter", "train_preference"),
    *("train_classifier", "train_encoder", "tune_filter", "calibrate_filter", "stand_in", "add_modality"),
    *("self_improve", "compare_models", "evaluate_filter", "report_model"),
]


# Whole numbers that may be 0: nothing, none or the first is meant then.
FROM_ZERO = {
    "seed",
    "comparison_seed",
    "lora_rank",
    "lr_warmup_steps",
    "warmup_steps",
    "rating_steps",
    "folds",
    "min_val",
}
# Values of pixels, of either sign; `check_reading` looks at them (tests/test_image_reader.py).
OF_ANY_SIGN = {"window"}


class Stopped(Exception):
    pass


def options_of(module, monkeypatch) -> tuple[list[str], dict[str, type]]:
    """The arguments that a script needs, and the type of each option that is a number."""
    seen = []
    with monkeypatch.context() as patch:

        def note(parser, args=None, namespace=None):
            seen.extend(parser._actions)
            raise Stopped

        patch.setattr("argparse.ArgumentParser.parse_args", note)
        with pytest.raises(Stopped):
            module.parse_args([])
    needed = [part for a in seen if a.required for part in (a.option_strings[0], NEEDED[a.dest])]
    return needed, {
        a.option_strings[0]: (a.type, a.nargs or 1)
        for a in seen
        if a.type in (int, float) and a.dest not in OF_ANY_SIGN
    }


# Those whose options are not dataclasses; of the others see test_config.py.
@pytest.mark.parametrize("script", [s for s in SCRIPTS if hasattr(importlib.import_module(s), "parse_args")])
def test_no_number_below_its_least_passes_in_any_option(script, monkeypatch):
    module = importlib.import_module(script)
    needed, numbers = options_of(module, monkeypatch)
    assert numbers
    passed = []
    for option, (kind, count) in numbers.items():
        values = ["-1", "nan", "inf"] if kind is float else ["-1"] if option[2:] in FROM_ZERO else ["-1", "0"]
        for value in values:
            given = [value] * (count if isinstance(count, int) else 1)
            try:
                module.parse_args([*needed, option, *given])
            except ValueError as error:
                assert option in str(error) and "has to be" in str(error) and value in str(error), error
            else:
                passed.append((option, value))
    assert not passed


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wandb", "--report_to wandb is not installed here; installed: tensorboard"),
        ("tensorbord", "--report_to has to be one of .*tensorboard.* or all, got 'tensorbord'"),
    ],
)
def test_a_tracker_that_is_not_there_is_refused(monkeypatch, name, message):
    from accelerate.utils import LoggerType

    from minim_pipeline.training import config
    from minim_pipeline.training.autoencoder import AutoencoderConfig

    monkeypatch.setattr(config, "get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    call = {"train_data": "none.csv", "output_dir": "none"}
    assert AutoencoderConfig(**call, report_to="tensorboard").report_to == "tensorboard"
    with pytest.raises(ValueError, match=message):
        AutoencoderConfig(**call, report_to=name)
    monkeypatch.setattr(config, "get_available_trackers", list)
    with pytest.raises(ValueError, match="--report_to all is not installed here; installed: none"):
        AutoencoderConfig(**call, report_to="all")


def test_what_an_option_would_not_do_is_refused():
    from minim_pipeline.training.filter.config import FilterConfig

    with pytest.raises(ValueError, match="--compile does nothing here"):
        FilterConfig(train_data="x", output_dir="x", teacher="x", compile=True)


def test_minim_evaluate_refuses_the_same():
    from minim_pipeline.cli import build_parser
    from minim_pipeline.evaluation.options import EvaluateOptions
    from minim_pipeline.options import options_from

    parser = build_parser()
    call = ["evaluate", "--real", "x", "--output-dir", "x", "--pipeline", "x"]
    for option, value in (("--num-inference-steps", "0"), ("--seed", "-1"), ("--guidance-scale", "nan")):
        with pytest.raises(ValueError, match=f"{option} has to be at least"):
            options_from(EvaluateOptions, parser.parse_args([*call, option, value]))
