"""What no run can have is refused before any work is done; of numbers see test_config.py."""

import pytest


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
