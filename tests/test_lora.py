"""LoRAs of diffusers and PEFT, and files that are none for this model."""

import json
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from minim_pipeline import MinimPipeline
from minim_pipeline.tokens import modality_tokens


CALL = {"prompt": "edema", "modality": "oct", "seeds": [0], "output_type": "np"}


def differ(a, b) -> float:
    return float(np.abs(a - b).max())


def config(*targets: str, **settings) -> LoraConfig:
    return LoraConfig(
        **{"r": 2, "lora_alpha": 6, "target_modules": list(targets), "init_lora_weights": False} | settings
    )


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"alpha_pattern": {".*q.*": 9}}], ids=str)
def test_pefts_own_adapter_draws_as_it_did_in_training(make_pipeline, tmp_path, part, settings):
    torch.manual_seed(0)
    trained, targets = make_pipeline(), {"unet": ("to_q", "to_v"), "text_encoder": ("q_proj", "v_proj")}[part]
    before = trained(**CALL).images
    adapted = get_peft_model(getattr(trained, part), config(*targets, **settings))
    adapted.save_pretrained(tmp_path)
    expected = trained(**CALL).images
    assert differ(expected, before) > 1e-3
    for source in (tmp_path, str(tmp_path / "adapter_model.safetensors")):
        fresh = make_pipeline()
        fresh.load_lora_weights(source)
        assert differ(fresh(**CALL).images, expected) < 1e-5
    fresh.unload_lora_weights()
    assert differ(fresh(**CALL).images, before) < 1e-5


def test_pefts_adapter_without_its_config_or_of_another_kind_is_refused(pipeline, tmp_path):
    get_peft_model(pipeline.unet, config("to_q")).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"peft_type": "IA3"}))
    with pytest.raises(ValueError, match="peft_type='IA3'"):
        pipeline.load_lora_weights(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="adapter_config.json that was saved beside"):
        pipeline.load_lora_weights(tmp_path)
    with pytest.raises(ValueError, match="adapter_config.json"):
        pipeline.load_lora_weights(load_file(tmp_path / "adapter_model.safetensors"))


FLUX = "transformer.single_transformer_blocks.0.attn.to_q.lora_{}.weight"
OTHER_UNET = "unet.down_blocks.7.attentions.0.transformer_blocks.0.attn1.to_q.lora_{}.weight"
UNNAMED = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_{}.weight"
KOHYA = "lora_unet_down_blocks_7_attentions_0_transformer_blocks_0_attn1_to_q.lora_{}.weight"


@pytest.mark.parametrize("pattern", [FLUX, OTHER_UNET, UNNAMED, KOHYA], ids=["flux", "unet", "unnamed", "kohya"])
@pytest.mark.parametrize("as_file", [True, False], ids=["file", "dict"])
def test_a_file_that_fits_nothing_is_an_error_and_changes_nothing(make_pipeline, tmp_path, pattern, as_file):
    pipe = make_pipeline()
    before = pipe(**CALL).images
    names = ("down", "up") if pattern is KOHYA else ("A", "B")
    weights = {pattern.format(names[0]): torch.ones(2, 32), pattern.format(names[1]): torch.ones(32, 2)}
    save_file(weights, tmp_path / "strange.safetensors")
    with pytest.raises(ValueError, match="fits this pipeline's U-Net or text encoder: it holds [12] weights such as"):
        pipe.load_lora_weights(tmp_path / "strange.safetensors" if as_file else weights)
    assert differ(pipe(**CALL).images, before) == 0 and not pipe.get_list_adapters()


def trained_lora(pipe, folder, **arguments) -> None:
    pipe.unet.add_adapter(config("to_q"))
    MinimPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(pipe.unet), **arguments)


def test_weights_that_have_no_place_are_told(make_pipeline, tmp_path, caplog):
    trained_lora(make_pipeline(), tmp_path)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    make_pipeline().load_lora_weights(tmp_path)
    assert "no place" not in caplog.text
    weights = load_file(path)
    save_file(weights | {FLUX.format("A"): torch.ones(2, 32), FLUX.format("B"): torch.ones(32, 2)}, path)
    make_pipeline().load_lora_weights(tmp_path)
    total = len(weights) + 2
    assert f"2 of {total} weights of '{tmp_path}' have no place in this pipeline" in caplog.text


def test_modality_tokens_that_the_base_lacks_are_told(make_pipeline, tmp_path, caplog):
    pipe = make_pipeline()
    tokens = modality_tokens(pipe.tokenizer)
    assert tokens == ["<oct>", "<fundus>", "<cxr>", "<chest_ct>", "<brain_mri>"]
    trained_lora(pipe, tmp_path, modality_tokens=tokens)
    fresh = make_pipeline()
    fresh.load_lora_weights(tmp_path)
    assert "modality tokens" not in caplog.text
    (tmp_path / "renamed").mkdir()
    shutil.copy(tmp_path / "pytorch_lora_weights.safetensors", tmp_path / "renamed" / "mine.safetensors")
    for source in (tmp_path, tmp_path / "pytorch_lora_weights.safetensors", tmp_path / "renamed"):
        caplog.clear()
        base = make_pipeline()
        # A base of the same shapes that was never taught the tokens
        base.tokenizer = make_pipeline("sd1").tokenizer
        base.load_lora_weights(source)
        assert "was trained with the modality tokens <oct>, <fundus>, <cxr>" in caplog.text
