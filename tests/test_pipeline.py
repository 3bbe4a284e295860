"""What a call of the pipeline promises."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback

from minim_pipeline import MinimPipeline, MinimPipelineOutput
from minim_pipeline.notices import warn_once


CALL = {"prompt": "diabetic macular edema", "modality": "oct", "output_type": "np"}
SCHEDULERS = ["DDIM", "DDPM", "DPMSolverMultistep", "EulerDiscrete", "EulerAncestralDiscrete", "UniPCMultistep"]


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "filtered"])
def shared_pipeline(make_pipeline, request):
    """What a call promises holds with a filter head, too."""
    return make_pipeline(filtered=request.param)


@pytest.fixture(params=[False, True], ids=["plain", "filtered"])
def pipeline(make_pipeline, request):
    return make_pipeline(filtered=request.param)


def differ(a, b) -> float:
    return float(np.abs(a - b).max())


def test_count_and_order(shared_pipeline):
    prompts, modalities = ["drusen", "effusion"], ["oct", "cxr"]
    out = shared_pipeline(prompts, modalities, num_images_per_prompt=2, seeds=[1, 2, 3, 4], output_type="np")
    assert out.images.shape == (4, 64, 64, 3)
    for i, (prompt, modality) in enumerate([("drusen", "oct")] * 2 + [("effusion", "cxr")] * 2):
        alone = shared_pipeline(prompt, modality, seeds=[i + 1], output_type="np").images[0]
        assert differ(out.images[i], alone) < 1e-4
    assert differ(out.images[0], out.images[1]) > 1e-2 and differ(out.images[1], out.images[3]) > 1e-2


def test_prompt_and_modality_both_matter(shared_pipeline):
    base = shared_pipeline(**CALL, seeds=[0]).images
    assert differ(base, shared_pipeline(**{**CALL, "prompt": "normal"}, seeds=[0]).images) > 1e-4
    assert differ(base, shared_pipeline(**{**CALL, "modality": "cxr"}, seeds=[0]).images) > 1e-4


@pytest.mark.parametrize("name", SCHEDULERS)
def test_an_image_does_not_depend_on_its_batch(pipeline, name):
    pipeline.scheduler = getattr(diffusers, f"{name}Scheduler").from_config(pipeline.scheduler.config)
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    batch = pipeline(**CALL, eta=0.7, num_images_per_prompt=3, generator=generators)
    assert batch.seeds == [0, 1, 2]
    alone = pipeline(**CALL, eta=0.7, generator=torch.Generator().manual_seed(2))
    assert differ(batch.images[2], alone.images[0]) < 1e-4
    assert differ(batch.images[0], alone.images[0]) > 1e-2
    redrawn = pipeline(**CALL, eta=0.7, num_images_per_prompt=2, seeds=batch.seeds[1:])
    assert differ(batch.images[1:], redrawn.images) < 1e-4


def test_noise_of_the_sde_solver_is_each_images_own(pipeline):
    config = pipeline.scheduler.config
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(config, algorithm_type="sde-dpmsolver++")
    batch = pipeline(**CALL, num_images_per_prompt=2, seeds=[5, 6]).images
    assert differ(batch[1], pipeline(**CALL, seeds=[6]).images[0]) < 1e-4


def test_seeds_are_always_told_when_nothing_is_given(shared_pipeline):
    torch.manual_seed(1)
    out = shared_pipeline(**CALL, num_images_per_prompt=2)
    assert len(set(out.seeds)) == 2 and all(0 <= seed < 2**63 for seed in out.seeds)
    assert differ(out.images[1], shared_pipeline(**CALL, seeds=out.seeds[1:]).images[0]) < 1e-4
    torch.manual_seed(1)
    assert shared_pipeline(**CALL, num_images_per_prompt=2).seeds == out.seeds


def test_seeds_are_told_only_where_they_draw_the_image_again(shared_pipeline):
    generator = torch.Generator().manual_seed(-4)
    first, second = (shared_pipeline(**CALL, generator=generator) for _ in range(2))
    assert first.seeds == [-4] and second.seeds == [None]
    assert differ(first.images, shared_pipeline(**CALL, seeds=[-4]).images) < 1e-4
    generator = torch.Generator().manual_seed(3)
    assert shared_pipeline(**CALL, num_images_per_prompt=2, generator=generator).seeds == [None, None]
    generator = torch.Generator().manual_seed(3)
    assert shared_pipeline(**CALL, num_images_per_prompt=2, generator=[generator] * 2).seeds == [None, None]
    assert shared_pipeline(**CALL, latents=torch.zeros(1, 8, 8, 8)).seeds == [None]


def test_one_generator_draws_latents_as_in_stable_diffusion(shared_pipeline):
    out = shared_pipeline(**CALL, num_images_per_prompt=2, generator=torch.Generator().manual_seed(3))
    latents = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(3))
    assert differ(out.images, shared_pipeline(**CALL, num_images_per_prompt=2, latents=latents).images) < 1e-4


def test_output_without_a_filter(make_pipeline):
    pipe = make_pipeline()
    out = pipe(**CALL, num_images_per_prompt=2, seeds=[0, 1])
    assert isinstance(out, MinimPipelineOutput)
    assert out.scores == out.accepted == [None, None] and out.seeds == [0, 1] and out.candidates == [1, 1]
    images, _, _, seeds, _, rejected = pipe(
        **CALL, num_images_per_prompt=2, seeds=[0, 1], use_filter=False, return_dict=False
    )
    assert differ(images, out.images) < 1e-6 and seeds == [0, 1] and rejected == [None, None]
    with pytest.raises(ValueError, match="no filter head"):
        pipe.score(out.images, "normal", "oct")
    for arguments, message in (
        ({"num_candidates": 4}, "`num_candidates=4` needs a filter, and this pipeline has no filter head"),
        ({"max_rounds": 2}, "`max_rounds=2` needs a filter"),
        ({"use_filter": True}, "no filter head"),
        ({"filter_threshold": 2.0}, "`filter_threshold=2.0` needs a filter"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(**CALL, **arguments)


def test_grey_modalities_have_equal_channels(shared_pipeline):
    call = {"prompt": ["normal"] * 3, "modality": ["oct", "fundus", "cxr"], "seeds": [0, 1, 2]}
    array = shared_pipeline(**call, output_type="np").images
    tensor = shared_pipeline(**call, output_type="pt").images
    pictures = shared_pipeline(**call, output_type="pil").images
    assert tensor.shape == (3, 3, 64, 64) and tensor.dtype == torch.float32
    assert tensor.min() >= 0 and tensor.max() <= 1
    for images in (array, tensor.permute(0, 2, 3, 1).numpy(), np.stack([np.asarray(p) for p in pictures])):
        for i, grey in enumerate([True, False, True]):
            assert (np.ptp(images[i], axis=-1).max() == 0) == grey


def test_latent_output(shared_pipeline):
    latents = shared_pipeline(**{**CALL, "output_type": "latent"}, num_images_per_prompt=2, seeds=[0, 1]).images
    assert latents.shape == (2, 8, 8, 8)
    images = shared_pipeline.vae.decode(latents[1:]).sample.detach()
    grey = (images.mean(1)[0] / 2 + 0.5).clamp(0, 1).numpy()
    assert differ(grey, shared_pipeline(**CALL, seeds=[1]).images[0, :, :, 0]) < 1e-4


def test_size(shared_pipeline):
    assert shared_pipeline(**CALL, height=48).images.shape == (1, 48, 64, 3)
    assert shared_pipeline(**CALL, width=72).images.shape == (1, 64, 72, 3)


def test_a_size_that_was_not_learned_is_told_once(shared_pipeline, caplog):
    warn_once.cache_clear()
    for size in ({}, {"height": 64, "width": 64}, {"height": 48}, {"height": 48}, {"width": 128, "height": 128}):
        shared_pipeline(**CALL, **size)
    told = [message for message in caplog.messages if "no size that this model has learned" in message]
    assert [message.partition(" (")[0] for message in told] == ["48 x 64", "128 x 128"]
    assert all("learned, which is 64 x 64" in message for message in told)


def test_a_model_that_names_no_modality_says_so_once(make_pipeline, shared_pipeline, caplog):
    warn_once.cache_clear()
    shared_pipeline(**CALL)
    assert "no modality that it has learned" not in caplog.text
    for pipe in (make_pipeline("sd1"), make_pipeline(modalities=[])):
        warn_once.cache_clear()
        caplog.clear()
        for _ in range(2):
            pipe(**CALL, num_inference_steps=2)
        assert sum("names no modality that it has learned" in message for message in caplog.messages) == 1


def test_defaults_are_those_of_the_config(pipeline):
    pipeline(**CALL)
    assert (pipeline.num_timesteps, pipeline.guidance_scale, pipeline.guidance_rescale) == (3, 2.0, 0.5)
    pipeline(**CALL, num_inference_steps=2, guidance_scale=1.0, guidance_rescale=0.0)
    assert (pipeline.num_timesteps, pipeline.guidance_scale, pipeline.guidance_rescale) == (2, 1.0, 0.0)
    assert not pipeline.do_classifier_free_guidance


def test_guidance_and_its_rescaling_matter(shared_pipeline):
    a, b, c = (
        shared_pipeline(**CALL, seeds=[0], guidance_scale=scale, guidance_rescale=rescale).images
        for scale, rescale in ((1.0, 0.0), (9.0, 0.0), (9.0, 0.9))
    )
    assert min(differ(a, b), differ(b, c)) > 1e-4


def test_guidance_interval_saves_the_negative_side_elsewhere(shared_pipeline):
    batches = []
    hook = shared_pipeline.unet.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    call = {**CALL, "seeds": [0], "num_inference_steps": 4, "guidance_scale": 9.0}
    first_half = shared_pipeline(**call, guidance_interval=(0.0, 0.5)).images
    hook.remove()
    assert batches == [2, 2, 1, 1]
    never = shared_pipeline(**call, guidance_interval=(0.5, 0.5)).images
    assert differ(never, shared_pipeline(**{**call, "guidance_scale": 1.0}).images) < 1e-6
    assert min(differ(first_half, never), differ(first_half, shared_pipeline(**call).images)) > 1e-4
    for interval in ((0.5, 0.2), (0.0, 1.5), (0.5,)):
        with pytest.raises(ValueError, match="guidance_interval.*ascending"):
            shared_pipeline(**call, guidance_interval=interval)


def test_callback_sees_the_tensors_and_may_change_them(shared_pipeline):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, {name: tuple(tensor.shape) for name, tensor in tensors.items()}))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else tensors

    names = shared_pipeline._callback_tensor_inputs
    latents = shared_pipeline(
        **{**CALL, "output_type": "latent"},
        num_images_per_prompt=2,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=names,
    ).images
    shapes = {"latents": (2, 8, 8, 8), "prompt_embeds": (4, 48, 32), "negative_prompt_embeds": (2, 48, 32)}
    assert seen == [(step, shapes) for step in range(3)]
    assert latents.abs().max() == 0


def test_diffusers_own_callback_ends_guidance(shared_pipeline):
    callback = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    images = shared_pipeline(**CALL, seeds=[0], callback_on_step_end=callback).images
    assert differ(images, shared_pipeline(**CALL, seeds=[0]).images) > 1e-4


def test_interrupt(shared_pipeline):
    steps = []

    def callback(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = step == 1
        return tensors

    images = shared_pipeline(**CALL, callback_on_step_end=callback).images
    assert steps == [0, 1] and images.shape == (1, 64, 64, 3)


def test_minims_prefix_is_understood(shared_pipeline):
    expected = shared_pipeline(["edema", "edema"], ["oct", "chest_ct"], seeds=[0, 1], output_type="np").images
    call = {"seeds": [0, 1], "output_type": "np"}
    assert differ(shared_pipeline(["OCT: edema", "Chest CT: edema"], **call).images, expected) < 1e-6
    assert differ(shared_pipeline(["OCT: edema", "edema"], ["oct", "ChestCT"], **call).images, expected) < 1e-6


def test_negative_side_is_the_token_alone_by_default(shared_pipeline):
    pipe = shared_pipeline
    _, negative = pipe.encode_prompt(["a", "b"], modality=["oct", "cxr"])
    assert torch.allclose(negative, pipe.encode_texts(["<oct>", "<cxr>"], "cpu"))
    positive, negative = pipe.encode_prompt("a", num_images_per_prompt=2, negative_prompt="blur", modality="oct")
    assert torch.allclose(negative, pipe.encode_texts(["<oct> blur"] * 2, "cpu"))
    assert torch.allclose(positive, pipe.encode_texts(["<oct> a"] * 2, "cpu"))
    assert pipe.encode_prompt("a", do_classifier_free_guidance=False, modality="oct")[1] is None


def test_prompt_embeds(shared_pipeline):
    pipe = shared_pipeline
    expected = pipe(["drusen", "edema"], "oct", seeds=[0, 1], output_type="np").images
    embeds, negative = pipe.encode_prompt(["drusen", "edema"], modality="oct")
    call = {"modality": "oct", "seeds": [0, 1], "output_type": "np", "prompt_embeds": embeds}
    assert differ(pipe(**call).images, expected) < 1e-4
    assert differ(pipe(**call, negative_prompt_embeds=negative).images, expected) < 1e-4
    assert pipe(**{**call, "seeds": range(4)}, num_images_per_prompt=2).images.shape[0] == 4


def test_too_long_a_prompt_is_cut_with_a_warning(shared_pipeline, caplog):
    diffusers.utils.logging.enable_propagation()
    shared_pipeline(["short", "e" * 45 + "xyz"], "oct", num_inference_steps=1)
    diffusers.utils.logging.disable_propagation()
    assert "up to 48 tokens" in caplog.text and "['xyz']" in caplog.text


def test_clip_skip(shared_pipeline):
    pipe = shared_pipeline
    assert differ(pipe(**CALL, seeds=[0], clip_skip=1).images, pipe(**CALL, seeds=[0]).images) > 1e-5
    assert torch.allclose(pipe.encode_texts(["<oct> a"], "cpu", 0), pipe.encode_texts(["<oct> a"], "cpu"), atol=1e-6)


def test_timesteps_and_sigmas(pipeline):
    pipeline(**CALL, timesteps=[999, 600, 300, 10])
    assert pipeline.num_timesteps == 4
    with pytest.raises(ValueError, match="DPMSolverMultistepScheduler takes no `sigmas`"):
        pipeline(**CALL, sigmas=[10.0, 1.0])
    with pytest.raises(ValueError, match="not both"):
        pipeline(**CALL, sigmas=[10.0, 1.0], timesteps=[999, 10])
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline(**CALL, sigmas=[10.0, 1.0, 0.1, 0.0])
    assert pipeline.num_timesteps == 3


def test_slicing_and_tiling(pipeline):
    call = {**CALL, "num_images_per_prompt": 2, "seeds": [0, 1]}
    expected = pipeline(**call).images
    pipeline.enable_vae_slicing()
    assert differ(pipeline(**call).images, expected) < 1e-4
    pipeline.enable_vae_tiling()
    assert pipeline(**call, height=128).images.shape == (2, 128, 64, 3)


def test_mixed_dtypes_and_half_precision(pipeline):
    expected = pipeline(**CALL, seeds=[0]).images
    pipeline.text_encoder.half()
    assert differ(pipeline(**CALL, seeds=[0]).images, expected) < 1e-2
    pipeline.unet.half()
    pipeline.vae.half()
    assert differ(pipeline(**CALL, seeds=[0]).images, expected) < 5e-2
    assert pipeline.vae.dtype == torch.float16


BAD_INPUT = [
    ({"modality": "octt"}, "Unknown modality 'octt'; known: .*Did you mean 'oct'"),
    ({"modality": "breast_mri"}, "has not been trained on it; trained: 'oct', 'fundus'"),
    ({"modality": "MRI"}, "ambiguous: it may be 'brain_mri' or 'breast_mri'"),
    ({"modality": None}, "`modality` is missing for 'edema'.*'oct'.*begin the prompt"),
    ({"modality": None, "prompt": "BreastUS: mass"}, "has not been trained"),
    ({"prompt": "CXR: effusion"}, "begins with 'CXR', but `modality` is 'oct'"),
    ({"prompt": ""}, "`prompt` is empty: ''"),
    ({"prompt": ["edema", " "]}, "`prompt` is empty: ' '"),
    ({"prompt": "OCT:"}, "`prompt` is empty: 'OCT:'"),
    ({"prompt": "nan"}, "'nan' is no caption"),
    ({"prompt": ["edema", "OCT: None"]}, "'None' is no caption"),
    ({"negative_prompt": "N/A"}, "'N/A' is no caption"),
    ({"prompt": []}, r"string or a list of strings, got \[\]"),
    ({"prompt": 3}, "string or a list of strings, got 3"),
    ({"prompt": None}, "exactly one of `prompt` and `prompt_embeds`"),
    ({"prompt_embeds": torch.zeros(1, 48, 32)}, "exactly one of `prompt` and `prompt_embeds`"),
    ({"prompt": None, "modality": None, "prompt_embeds": torch.zeros(1, 48, 32)}, "need `modality`"),
    ({"prompt": ["a", "b", "c"], "modality": ["oct", "cxr"]}, "`modality` has 2 entries for 3 prompts"),
    ({"modality": ["oct", "cxr"]}, "`modality` has 2 entries for 1 prompts"),
    ({"prompt": ["a", "b"], "negative_prompt": ["c"]}, "`negative_prompt` has 1 entries for 2 prompts"),
    ({"negative_prompt": "a", "negative_prompt_embeds": torch.zeros(1, 48, 32)}, "not both"),
    ({"height": 60}, "`height` has to be a positive multiple of 8, got 60"),
    ({"width": 0}, "`width` has to be a positive multiple of 8, got 0"),
    ({"num_inference_steps": 0}, "`num_inference_steps` has to be a positive integer, got 0"),
    ({"num_images_per_prompt": -1}, "`num_images_per_prompt` has to be a positive integer, got -1"),
    ({"num_candidates": 0}, "`num_candidates` has to be a positive integer, got 0"),
    ({"max_rounds": 0}, "`max_rounds` has to be a positive integer, got 0"),
    ({"seeds": [1, 2]}, r"one seed for each of 1 images, got \[1, 2\]"),
    ({"seeds": 1}, "one seed for each of 1 images, got 1"),
    ({"seeds": [2**63]}, "integers of 64 bits"),
    ({"seeds": ["1"]}, "integers of 64 bits"),
    ({"seeds": [1], "generator": torch.Generator()}, "`seeds` replaces `generator` and `latents`"),
    ({"generator": [torch.Generator()] * 2}, "`generator` has 2 entries for 1 images"),
    ({"latents": torch.zeros(1, 4, 8, 8)}, r"shape \(1, 4, 8, 8\), but \(1, 8, 8, 8\) is needed"),
    ({"output_type": "jpeg"}, "`output_type` has to be one of .*'latent'.*got 'jpeg'"),
    ({"callback_on_step_end_tensor_inputs": ["noise"]}, "may name .*'latents'.* got 'noise'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT)
def test_bad_input(shared_pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        shared_pipeline(**{"prompt": "edema", "modality": "oct", **arguments})


@pytest.mark.parametrize("name", ["PNDM", "HeunDiscrete", "DEISMultistep", "FlowMatchEulerDiscrete"])
def test_schedulers_that_do_not_fit_zero_terminal_snr(pipeline, name):
    pipeline.scheduler = getattr(diffusers, f"{name}Scheduler")()
    with pytest.raises(ValueError, match=f"{name}Scheduler does not fit this model.*DDIMScheduler.*UniPC"):
        pipeline(**CALL)


def test_scheduler_of_another_schedule(pipeline):
    pipeline.scheduler = diffusers.DDIMScheduler()
    with pytest.raises(ValueError, match="rescale_betas_zero_snr=False and prediction_type='epsilon'; make it with"):
        pipeline(**CALL)


def test_a_prompt_is_resolved_once_in_a_call(shared_pipeline, monkeypatch):
    """Or what a first look took for the modality's name, and cut, would be looked for again in the rest."""
    seen, resolve = [], MinimPipeline.resolve_prompts
    monkeypatch.setattr(
        MinimPipeline, "resolve_prompts", lambda self, *given: (seen.append(given), resolve(self, *given))[1]
    )
    shared_pipeline("OCT: CXR: seen on both", seeds=[0], output_type="latent")
    assert seen == [("OCT: CXR: seen on both", None, 1)]
