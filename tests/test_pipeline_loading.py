"""Saving, loading, adapting: what happens to the pipeline as files."""

import importlib
import json
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from minim_pipeline import MinimPipeline


CALL = {"prompt": "edema", "modality": "oct", "seeds": [0], "output_type": "np"}
MODELS = ("vae", "text_encoder", "unet")


def draw(pipe, **arguments) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    return pipe(**{**CALL, **arguments}).images


def differ(a, b) -> float:
    return float(np.abs(a - b).max())


def dtypes(pipe) -> set[torch.dtype]:
    return {getattr(pipe, name).dtype for name in MODELS}


def test_save_and_reload(shared_pipeline, pipeline_dir):
    pipe = MinimPipeline.from_pretrained(pipeline_dir)
    assert differ(draw(pipe), draw(shared_pipeline)) < 1e-5
    for name in ("modalities", "findings", "num_inference_steps", "guidance_scale", "zero_terminal_snr"):
        assert pipe.config[name] == shared_pipeline.config[name]
    assert pipe.filter_head is None and MinimPipeline.from_pretrained(pipeline_dir, filter_head=None).unet is not None


def test_numbers_may_be_overridden_at_load(pipeline_dir):
    pipe = MinimPipeline.from_pretrained(pipeline_dir, num_inference_steps=2)
    draw(pipe)
    assert pipe.num_timesteps == 2


def test_no_path_of_this_machine_is_saved(pipeline_dir, tmp_path):
    MinimPipeline.from_pretrained(pipeline_dir).save_pretrained(tmp_path / "again")
    files = list((tmp_path / "again").rglob("*.json"))
    assert len(files) > 5
    for path in files:
        text = path.read_text()
        assert "name_or_path" not in text and str(pipeline_dir.parent) not in text, path


def test_the_config_can_be_saved_alone(make_pipeline, tmp_path):
    make_pipeline(filtered=True).save_config(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"model_index.json", "pipeline.py"}


def test_diffusers_finds_the_class(pipeline_dir, shared_pipeline):
    pipe = diffusers.DiffusionPipeline.from_pretrained(pipeline_dir)
    assert type(pipe) is MinimPipeline and differ(draw(pipe), draw(shared_pipeline)) < 1e-5


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_fp16_files_load_as_fp32(pipeline, tmp_path, variant):
    expected = draw(pipeline)
    pipeline.to(dtype=torch.float16).save_pretrained(tmp_path, variant=variant)
    for cls in (MinimPipeline, diffusers.DiffusionPipeline):
        loaded = cls.from_pretrained(tmp_path, variant=variant)
        assert dtypes(loaded) == {torch.float32}
        assert differ(draw(loaded), expected) < 1e-2
    half = MinimPipeline.from_pretrained(tmp_path, variant=variant, dtype=torch.float16)
    assert dtypes(half) == {torch.float16}
    assert differ(draw(half), expected) < 5e-2


def test_half_precision_text_encoder_of_transformers_own_saving(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    pipeline.text_encoder.half().save_pretrained(tmp_path / "text_encoder")
    assert dtypes(MinimPipeline.from_pretrained(tmp_path)) == {torch.float32}
    draw(diffusers.DiffusionPipeline.from_pretrained(tmp_path))  # its text encoder stays in fp16, and that works


def test_a_swapped_scheduler_does_not_make_it_forget_its_schedule(pipeline, tmp_path):
    pipeline.scheduler = diffusers.PNDMScheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path)
    loaded = MinimPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="PNDMScheduler does not fit"):
        draw(loaded)
    loaded.scheduler = diffusers.DDIMScheduler.from_config(loaded.scheduler.config)
    draw(loaded)


def test_components_may_be_missing(make_pipeline, shared_pipeline):
    components = {**shared_pipeline.components, "unet": None, "vae": None, "scheduler": None}
    pipe = MinimPipeline(**components)
    prompt_embeds, negative_prompt_embeds = pipe.encode_prompt("OCT: edema", device=None)
    assert prompt_embeds.shape == negative_prompt_embeds.shape == (1, 48, 32)

    components = {**shared_pipeline.components, "text_encoder": None, "tokenizer": None}
    embeds = {"prompt": None, "prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
    pipe = MinimPipeline(**components, num_inference_steps=3, guidance_scale=2.0, guidance_rescale=0.5)
    assert differ(draw(pipe, **embeds), draw(shared_pipeline)) < 1e-5


def test_stable_diffusion_is_a_base_model(make_pipeline, tmp_path):
    """As in the folders of SD-1.x: PNDM, a safety checker, no modality tokens."""
    make_pipeline("sd1").save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index = {name: index[name] for name in (*MODELS, "tokenizer", "scheduler")}
    index["_class_name"] = "StableDiffusionPipeline"
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    index["image_encoder"] = [None, None]
    (tmp_path / "model_index.json").write_text(json.dumps(index))

    pipe = MinimPipeline.from_pretrained(tmp_path)
    assert pipe.config.modalities is None and not pipe.config.zero_terminal_snr
    images = draw(pipe, num_inference_steps=4, modality="breast_us")
    assert images.shape == (1, 64, 64, 3) and np.ptp(images, axis=-1).max() == 0
    positive, negative = pipe.encode_prompt("mass", modality="breast_us")
    assert torch.allclose(positive, pipe.encode_texts(["breast ultrasound, mass"], "cpu"))
    assert torch.allclose(negative, pipe.encode_texts([""], "cpu"))

    for name in ("HeunDiscrete", "DEISMultistep", "DDIM"):
        pipe.scheduler = getattr(diffusers, f"{name}Scheduler").from_config(pipe.scheduler.config)
        draw(pipe, num_inference_steps=3)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler does not fit this pipeline"):
        draw(pipe)
    with pytest.raises(ValueError, match="pass `modality=` .*MODALITIES"):
        draw(pipe, modality=None)


def test_lora_of_unet_and_text_encoder(make_pipeline, pipeline, tmp_path):
    before = draw(pipeline)
    for model, targets in ((pipeline.unet, ["to_q", "to_v"]), (pipeline.text_encoder, ["q_proj", "v_proj"])):
        model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False))
    trained = draw(pipeline)
    MinimPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(pipeline.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(pipeline.text_encoder),
    )

    fresh = make_pipeline()
    fresh.load_lora_weights(tmp_path)
    assert differ(trained, before) > 1e-3
    assert differ(draw(fresh), trained) < 1e-5
    assert differ(draw(fresh, cross_attention_kwargs={"scale": 0.0}), before) < 1e-5
    assert differ(draw(fresh), trained) < 1e-5
    fresh.unload_lora_weights()
    assert differ(draw(fresh), before) < 1e-5


def test_a_textual_inversion_is_saved_and_loaded_with_the_pipeline(make_pipeline, tmp_path):
    """The head knows fewer tokens than the pipeline has then, and does not read the new one."""
    pipe = make_pipeline(filtered=True)
    before = pipe.score(np.full((1, 64, 64, 3), 0.5), "edema", "oct").scores
    pipe.load_textual_inversion({"<drusen>": torch.randn(32)}, token="<drusen>")
    expected = pipe(**CALL | {"prompt": "<drusen> edema"})
    assert differ(expected.images, draw(pipe)) > 1e-4
    pipe.save_pretrained(tmp_path)
    for cls in (MinimPipeline, diffusers.DiffusionPipeline):
        loaded = cls.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        found = loaded(**CALL | {"prompt": "<drusen> edema"})
        assert differ(found.images, expected.images) < 1e-5 and found.scores == pytest.approx(
            expected.scores, abs=1e-4
        )
        assert loaded.score(np.full((1, 64, 64, 3), 0.5), "edema", "oct").scores == pytest.approx(before, abs=1e-4)


def test_from_pipe_keeps_what_the_model_says_and_components_tell_that_they_do_not(make_pipeline, caplog):
    pipe = make_pipeline(filtered=True, num_candidates=2)
    again = MinimPipeline.from_pipe(pipe)
    names = ("modalities", "findings", "num_inference_steps", "guidance_scale", "num_candidates", "zero_terminal_snr")
    assert {name: again.config[name] for name in names} == {name: pipe.config[name] for name in names}
    assert "without `modalities`" not in caplog.text
    MinimPipeline(**pipe.components)
    assert "without `modalities`, but its tokenizer knows <oct>" in caplog.text
    assert "`MinimPipeline.from_pipe(pipe)` keeps them" in caplog.text
    caplog.clear()
    MinimPipeline(**pipe.components, modalities=pipe.config.modalities)
    assert "without `modalities`" not in caplog.text


def test_from_pipe_of_stable_diffusion_needs_no_further_argument(make_pipeline):
    base = make_pipeline("sd1")
    parts = {name: part for name, part in base.components.items() if name != "filter_head"}
    absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    sd = diffusers.StableDiffusionPipeline(**parts, **absent)
    pipe = MinimPipeline.from_pipe(sd)
    assert pipe.filter_head is None and pipe.unet is sd.unet and pipe.config.modalities is None
    draw(pipe, num_inference_steps=2)
    head = make_pipeline(filtered=True)
    assert MinimPipeline.from_pipe(head).filter_head is head.filter_head
    assert MinimPipeline.from_pipe(head, filter_head=None).filter_head is None


def test_from_pipe_leaves_the_dtype_of_what_is_shared(make_pipeline):
    pipe = make_pipeline(filtered=True).to(dtype=torch.bfloat16)
    assert MinimPipeline.from_pipe(pipe).unet.dtype == pipe.unet.dtype == torch.bfloat16
    assert MinimPipeline.from_pipe(pipe, dtype=torch.float32).unet.dtype == torch.float32


def test_diffusers_auto_class_finds_the_class(pipeline_dir, shared_pipeline):
    from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING as TABLE

    auto = diffusers.AutoPipelineForText2Image
    del TABLE["minim"]
    with pytest.raises(ValueError, match="can't find a pipeline linked to MinimPipeline"):
        auto.from_pretrained(pipeline_dir)
    importlib.reload(importlib.import_module("minim_pipeline.auto_pipeline"))  # as where diffusers' table came first
    pipe = auto.from_pretrained(pipeline_dir)
    assert type(pipe) is MinimPipeline and pipe.config.num_inference_steps == 3
    assert differ(draw(pipe), draw(shared_pipeline)) < 1e-5
    assert type(auto.from_pipe(pipe)) is MinimPipeline


def test_diffusers_own_command_draws(pipeline_dir, tmp_path, monkeypatch):
    from minim_pipeline.diffusers_cli import main

    command = [
        "diffusers-cli",
        "run",
        "--model",
        str(pipeline_dir),
        "--output",
        str(tmp_path / "a.png"),
        "--seed",
        "1",
    ]
    monkeypatch.setattr(sys, "argv", [*command, "--pipeline-kwargs", '{"prompt": "OCT: edema"}'])
    main()
    assert list(tmp_path.glob("*.png"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("offload", [None, "enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_the_same_image_on_a_gpu(make_pipeline, shared_pipeline, offload):
    pipe = make_pipeline()
    getattr(pipe, offload)() if offload else pipe.to("cuda")
    for _ in range(2):
        assert differ(draw(pipe), draw(shared_pipeline)) < 1e-2


def test_importing_the_package_is_cheap():
    code = (
        "import sys, minim_pipeline; minim_pipeline.EMBEDDED_CHECKPOINT; minim_pipeline.resolve_modality('OCT');"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
