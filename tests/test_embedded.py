"""The model that ships with the package: what a user sees of it, offline."""

import json

import numpy as np
import pytest
import torch

from minim_pipeline import EMBEDDED_CHECKPOINT, MODALITIES, MinimPipeline


TRAINED = ["oct", "fundus", "cxr", "chest_ct", "brain_mri", "breast_us"]
whole = pytest.mark.skipif(
    not (EMBEDDED_CHECKPOINT / "model_index.json").is_file(), reason="the U-Net is not part of this version"
)


def test_it_is_small_and_holds_no_pickles():
    files = [path for path in EMBEDDED_CHECKPOINT.rglob("*") if path.is_file()]
    head = sum(path.stat().st_size for path in files if path.parent.name == "filter_head")
    assert sum(path.stat().st_size for path in files) - head <= 75e6 and 0 < head <= 4e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}


def test_the_tokenizer_spells_any_word_and_knows_the_modalities():
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED_CHECKPOINT / "tokenizer")
    for modality in MODALITIES.values():
        ids = tokenizer(f"{modality.token} x", add_special_tokens=False).input_ids
        assert len(ids) == 2 and ids[0] == tokenizer.convert_tokens_to_ids(modality.token)
    text = "q-zebra xylophone 7 µm"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids).replace(" ", "") == text.replace(
        " ", ""
    )


def test_the_text_encoder_tells_denial_from_affirmation():
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED_CHECKPOINT / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(EMBEDDED_CHECKPOINT / "text_encoder")
    texts = [
        "no diabetic macular edema",
        "macula free of edema",
        "diabetic macular edema",
        "cystoid macular edema, DME",
    ]
    inputs = tokenizer([f"<oct> {text}" for text in texts], padding="max_length", max_length=48, return_tensors="pt")
    with torch.no_grad():
        pooled = torch.nn.functional.normalize(encoder(inputs.input_ids).last_hidden_state.mean(1), dim=1)
    near = pooled @ pooled.T
    assert min(near[0, 1], near[2, 3]) > max(near[0, 2], near[0, 3], near[1, 2], near[1, 3])


def test_the_autoencoder_gives_an_image_back():
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(EMBEDDED_CHECKPOINT / "vae")
    assert vae.dtype == torch.float32 and vae.config.scaling_factor == 1.0
    y, x = np.mgrid[-1:1:256j, -1:1:256j]
    disc = np.clip(1.5 - 2 * np.hypot(x, y), 0, 1) * (0.7 + 0.3 * np.sin(20 * x)) * 2 - 1
    image = torch.tensor(disc, dtype=torch.float32).expand(1, 3, -1, -1)
    with torch.no_grad():
        back = vae.decode(vae.encode(image).latent_dist.mode()).sample
    psnr = -10 * torch.log10(((back - image) / 2).square().mean())
    assert psnr > 30


@whole
def test_it_draws_what_it_was_trained_on():
    from minim_pipeline import MinimPipeline

    pipe = MinimPipeline.from_pretrained(EMBEDDED_CHECKPOINT)
    assert {p.dtype for c in (pipe.unet, pipe.vae, pipe.text_encoder) for p in c.parameters()} == {torch.float32}
    assert sorted(pipe.config.modalities) == sorted(TRAINED)
    prompts = [pipe.config.findings[m][0] for m in TRAINED]
    images = pipe(prompts, modality=TRAINED, seeds=list(range(6)), num_inference_steps=2, output_type="np").images
    assert images.shape == (6, 256, 256, 3)
    for image, name in zip(images, TRAINED):
        assert (np.ptp(image, axis=-1).max() == 0) == MODALITIES[name].grey
        assert image.std() > 0.05
    alone = pipe(prompts[1], modality="fundus", seeds=[1], num_inference_steps=2, output_type="np").images
    assert np.abs(alone[0] - images[1]).max() < 1e-3


@whole
def test_what_it_learned_is_told():
    index = json.loads((EMBEDDED_CHECKPOINT / "model_index.json").read_text())
    assert sorted(index["findings"]) == sorted(TRAINED)
    assert "/" not in json.dumps({k: v for k, v in index.items() if k != "findings"})


def test_the_filter_takes_neither_noise_nor_a_flat_picture_and_knows_its_thresholds():
    pipe = MinimPipeline.from_pretrained(EMBEDDED_CHECKPOINT)
    assert pipe.config.num_candidates == 4 and len(pipe.filter_head.fingerprints) > 6000
    assert set(pipe.filter_head.config.calibration) == set(pipe.config.modalities)
    noise = torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    noise[1] = 0.5
    rated = pipe.score(noise, ["glioma", "normal"], ["brain_mri", "oct"])
    assert rated.accepted == [False, False] and all(reason in ("quality", "finding") for reason in rated.reasons)
