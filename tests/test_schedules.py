"""Schedulers: what samples the model as it was trained, what is refused, and what is warned of."""

import json

import diffusers
import numpy as np
import pytest

from minim_pipeline import EMBEDDED_CHECKPOINT, MinimPipeline
from minim_pipeline.notices import warn_once
from minim_pipeline.schedules import karras_timesteps, model_timesteps


CALL = {"prompt": "edema", "modality": "oct", "seeds": [0], "output_type": "np"}


@pytest.fixture(autouse=True)
def told_anew():
    warn_once.cache_clear()


@pytest.mark.parametrize("name", ["DDIM", "DDPM"])
@pytest.mark.parametrize("by_way_of", [None, "EulerDiscrete", "UniPCMultistep"])
def test_from_config_never_clips(pipeline, name, by_way_of, tmp_path):
    """The call that everyone of diffusers' users writes, and that our own messages recommend."""
    pipeline.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    assert saved["clip_sample"] is False
    kind = getattr(diffusers, f"{name}Scheduler")
    scheduler = pipeline.scheduler
    if by_way_of:
        scheduler = getattr(diffusers, f"{by_way_of}Scheduler").from_config(scheduler.config)
    for made in (kind.from_config(scheduler.config), kind.from_pretrained(tmp_path, subfolder="scheduler")):
        assert made.config.clip_sample is False
        pipeline.scheduler = made
        pipeline(**CALL)


def test_a_model_saved_without_that_line_does_not_clip_either(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    path = tmp_path / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    del config["clip_sample"]
    path.write_text(json.dumps(config))
    loaded = MinimPipeline.from_pretrained(tmp_path)
    assert diffusers.DDIMScheduler.from_config(loaded.scheduler.config).config.clip_sample is False


def test_a_scheduler_that_was_swapped_in_is_saved_with_that_line(pipeline, tmp_path):
    config = dict(pipeline.scheduler.config)
    del config["clip_sample"]
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(config)
    pipeline.save_pretrained(tmp_path)
    again = diffusers.DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert again.config.clip_sample is False


def test_the_embedded_model_says_so_itself():
    assert (
        diffusers.DDPMScheduler.from_pretrained(EMBEDDED_CHECKPOINT, subfolder="scheduler").config.clip_sample is False
    )


@pytest.mark.parametrize("kind", ["minim", "sd1"])
@pytest.mark.parametrize(
    ("name", "setting"),
    [("DDIM", "clip_sample"), ("DDPM", "clip_sample"), ("DDIM", "thresholding"), ("UniPCMultistep", "thresholding")],
)
def test_what_clips_latents_is_refused_with_the_call_that_does_not(make_pipeline, kind, name, setting):
    pipe = make_pipeline(kind)
    made = getattr(diffusers, f"{name}Scheduler")
    pipe.scheduler = made.from_config(pipe.scheduler.config, **{setting: True})
    with pytest.raises(
        ValueError, match=rf"{name}Scheduler has {setting}=True.*ruins latents.*from_config\(.*, {setting}=False\)"
    ):
        pipe(**CALL)
    pipe.scheduler = made.from_config(pipe.scheduler.config, **{setting: False})
    pipe(**CALL)


def test_settings_of_another_class_are_not_held_against_a_scheduler(pipeline):
    clipping = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=True)
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(clipping.config)
    pipeline(**CALL)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("DDIM", {"timestep_spacing": "leading"}),
        ("UniPCMultistep", {"timestep_spacing": "leading"}),
    ],
)
def test_a_schedule_without_pure_noise_under_zero_snr_is_warned_of_once(make_pipeline, caplog, name, settings):
    (setting, value), pipe = *settings.items(), make_pipeline()
    pipe.scheduler = getattr(diffusers, f"{name}Scheduler").from_config(pipe.scheduler.config, **settings)
    for _ in range(2):
        pipe(**CALL)
    told = [message for message in caplog.messages if f"{name}Scheduler has {setting}={value!r}" in message]
    assert len(told) == 1 and "lowers the scores" in told[0]


def test_the_models_own_schedule_is_not_warned_of(pipeline, make_pipeline, caplog):
    pipeline(**CALL)
    karras = {"use_karras_sigmas": True}
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, **karras)
    assert np.isfinite(pipeline(**CALL).images).all()
    for name in ("DDIM", "EulerDiscrete", "UniPCMultistep"):
        pipeline.scheduler = getattr(diffusers, f"{name}Scheduler").from_config(pipeline.scheduler.config)
        assert np.isfinite(pipeline(**CALL).images).all()
    base = make_pipeline("sd1")  # has no zero terminal SNR: "leading" is its own
    base.scheduler = diffusers.DDIMScheduler.from_config(base.scheduler.config)
    base(**CALL)
    assert not [message for message in caplog.messages if "noise levels" in message]


def timesteps_of(pipe, **call) -> list[int]:
    seen: list[int] = []

    def note(_, __, t, kwargs):
        seen.append(int(t))
        return kwargs

    pipe(**CALL | call, callback_on_step_end=note)
    return seen


def test_a_model_is_sampled_at_its_own_timesteps_and_keeps_them(pipeline, tmp_path):
    own = karras_timesteps(pipeline.scheduler, 6, 50.0)
    last = pipeline.scheduler.config.num_train_timesteps - 1
    assert own[0] == last and own[-1] == 0 and len(own) == 6
    pipeline.register_to_config(timesteps=own, num_inference_steps=6)
    pipeline.save_pretrained(tmp_path)
    loaded = MinimPipeline.from_pretrained(tmp_path)
    assert timesteps_of(loaded, num_inference_steps=None) == own
    assert timesteps_of(loaded, num_inference_steps=None, timesteps=[last, 20, 3]) == [last, 20, 3], (
        "the caller's first"
    )
    for count in (1, 2, 4, 9, 40, 500, last + 1):
        spread = model_timesteps(loaded.scheduler, own, count)
        if count < 10:
            assert timesteps_of(loaded, num_inference_steps=count) == spread
        assert len(spread) == count and spread[0] == last and spread == sorted(set(spread), reverse=True)
        assert not 1 < count < 10 or spread[1] == own[1]
        assert count < 3 or spread[-1] == 0
    assert model_timesteps(loaded.scheduler, own, last + 2) is None, "the scheduler says what is wrong"


@pytest.mark.parametrize("sigma_max", [0.001, 1e9])
def test_a_level_that_training_has_not_is_refused(pipeline, sigma_max):
    with pytest.raises(ValueError, match=f"sigma_max has to be above 0.01 and at most .*, got {sigma_max}"):
        karras_timesteps(pipeline.scheduler, 6, sigma_max)


def test_a_scheduler_with_a_spacing_of_its_own_is_left_alone(pipeline):
    plain = timesteps_of(pipeline, num_inference_steps=4)
    pipeline.register_to_config(timesteps=karras_timesteps(pipeline.scheduler, 4, 50.0))
    assert timesteps_of(pipeline, num_inference_steps=4) != plain
    config = pipeline.scheduler.config
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(config)  # takes no timesteps
    assert timesteps_of(pipeline, num_inference_steps=4) == plain
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=True)
    assert timesteps_of(pipeline, num_inference_steps=4) != pipeline.config.timesteps
