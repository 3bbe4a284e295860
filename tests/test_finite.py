"""What is not finite is an error that says so: never a black picture, never weights in a folder."""

import numpy as np
import pytest
import torch

from minim_pipeline import cli
from minim_pipeline.evaluation.classifier import Recipe, make_resnet, train_classifier
from minim_pipeline.training.filter.tune import TuningOptions, tune


def spoil(network: torch.nn.Module, value: float = float("nan")) -> None:
    """As a training that has diverged leaves a network."""
    for parameter in network.parameters():
        parameter.data.fill_(value)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
@pytest.mark.parametrize("options", [{}, {"num_candidates": 2}, {"use_filter": False}, {"output_type": "latent"}])
def test_latents_that_are_not_finite_are_no_picture(make_pipeline, part, options):
    pipe = make_pipeline(filtered=True)
    spoil(getattr(pipe, part))
    with pytest.raises(ValueError, match=f"Latents are not finite for . of . images: the weights of `{part}`"):
        pipe("normal", modality="oct", **options)


def test_embeddings_that_are_not_finite_are_no_picture(pipeline):
    """Where there is no text encoder to blame."""
    embeds = torch.full((1, 48, 32), float("nan"))
    pipeline.text_encoder = None
    with pytest.raises(ValueError, match="finite"):
        pipeline(prompt_embeds=embeds, negative_prompt_embeds=embeds, modality="oct")


def test_pixels_that_are_not_finite_are_no_picture(pipeline):
    spoil(pipeline.vae.decoder, float("inf"))
    with pytest.raises(ValueError, match="Decoded pixels are not finite for 2 of 2 images: the weights of `vae`"):
        pipeline(["normal", "normal"], modality="oct")


def test_numbers_too_large_for_a_dtype_are_told_from_broken_weights(pipeline):
    """As of Stable Diffusion's autoencoder in half precision; here latents that are too large do it."""
    pipeline.vae.to(torch.bfloat16)
    pipeline.vae.config.force_upcast = False
    with pytest.raises(ValueError, match="not finite for 1 of 2 images: numbers grew too large for torch.bfloat16"):
        latents = torch.zeros(2, 8, 8, 8)
        latents[1] = torch.inf
        pipeline.decode_latents(latents, pipeline.resolve_prompts(None, ["oct", "oct"], 2)[1])


def test_images_to_score_are_finite(make_pipeline):
    pipe = make_pipeline(filtered=True)
    images = np.zeros((2, 64, 64, 3), dtype=np.float32)
    images[1, 3, 3] = np.nan
    with pytest.raises(ValueError, match=r"`images` have to be in \[0, 1\], got nan to nan"):
        pipe.score(images, "normal", "oct")


@pytest.mark.parametrize("more", [[], ["--no-filter"]])
def test_a_diverged_model_writes_no_picture(make_pipeline, tmp_path, capsys, more):
    pipe = make_pipeline(filtered=True)
    spoil(pipe.unet)
    pipe.save_pretrained(tmp_path / "model")
    call = ["generate", "--modality", "oct", "--prompt", "normal", "--num-images", "1", "--device", "cpu", *more]
    assert cli.main([*call, "--model", str(tmp_path / "model"), "--output-dir", str(tmp_path / "out")]) == 2
    assert "the weights of `unet` are not finite, as of a training that has diverged" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*.png")) and not (tmp_path / "out" / "data.csv").exists()


def test_a_classifier_that_diverges_is_told():
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    flags, labels = torch.zeros(4, dtype=torch.bool), torch.tensor([0, 1, 0, 1])
    recipe = Recipe(max_train_steps=8, train_batch_size=2, learning_rate=1e30, resolution=32)
    with pytest.raises(ValueError, match="The loss is .* at step .: the training has diverged"):
        train_classifier(make_resnet(2, 8), images, labels, flags, flags, recipe)


def test_a_filter_head_that_diverges_is_told(make_pipeline):
    rows = [{"path": str(i), "Text": "a", "modality": "oct", "rating": 1 + i % 3, "rater": "x"} for i in range(12)]
    options = TuningOptions(tuning_steps=6, tuning_batch_size=4, tuning_learning_rate=1e30)
    with pytest.raises(ValueError, match="The loss is .* at step .: the training has diverged"):
        tune(make_pipeline(filtered=True), rows, torch.randn(12, 8, 8, 8), options)
