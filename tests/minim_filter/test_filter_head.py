"""The filter head: ratings of latents that do not depend on dtype, batch or scheduler; and the estimates it reads."""

import json
import math

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler

from minim_pipeline.minim_filter import FilterHead
from minim_pipeline.minim_filter.estimate import estimate_clean, noise_angles


torch.set_num_threads(1)


def make_head(**more) -> FilterHead:
    torch.manual_seed(0)
    sizes = dict(block_out_channels=(8, 16), layers_per_block=1, text_width=8, feature_size=12, norm_num_groups=4)
    made = FilterHead(in_channels=4, sample_size=8, vocab_size=50, max_length=6, pad_token_id=9, **sizes, **more)
    for parameter in made.parameters():  # some weights start at 0
        torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


@pytest.fixture(scope="module")
def head() -> FilterHead:
    return make_head()


@pytest.fixture(scope="module")
def realist() -> FilterHead:
    """A head that rates realism, too."""
    return make_head(rates_realism=True)


def inputs(count: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "noisy": torch.randn(count, 4, 8, 8, generator=generator),
        "clean": torch.randn(count, 4, 8, 8, generator=generator),
        "angle": torch.linspace(0, math.pi / 2, count),
        "input_ids": torch.tensor([[1, 20, 21, 2, 9, 9]]).repeat(count, 1),
    }


@torch.no_grad()
def test_ratings_are_expectations_of_three_grades(head):
    output = head(**inputs())
    for rating, probabilities in ((output.quality, output.quality_probs), (output.finding, output.finding_probs)):
        assert probabilities.shape == (5, 3) and (probabilities >= 0).all()
        torch.testing.assert_close(probabilities.sum(1), torch.ones(5))
        torch.testing.assert_close(rating, probabilities @ torch.tensor([1.0, 2.0, 3.0]))
    assert output.features.shape == (5, 12)
    assert head(**inputs(), return_dict=False)[0].equal(output.quality)


@torch.no_grad()
def test_a_rating_is_the_same_in_any_batch_and_whatever_stands_in_the_padding(head):
    whole = head(**inputs())
    one = head(**{name: tensor[3:4] for name, tensor in inputs().items()})
    torch.testing.assert_close(one.quality, whole.quality[3:4])
    text = head.encode_text(inputs()["input_ids"])
    torch.testing.assert_close(head(**{**inputs(), "input_ids": None}, text=text).finding, whole.finding)
    with pytest.raises(ValueError, match="input_ids"):
        head(**{**inputs(), "input_ids": None})
    shorter = head.encode_text(torch.tensor([[1, 20, 21, 2]]))
    torch.testing.assert_close(shorter, text[:1])
    assert not torch.allclose(head.encode_text(torch.tensor([[1, 20, 22, 2, 9, 9]])), text[:1])


@torch.no_grad()
def test_only_the_finding_depends_on_the_words(head):
    other = inputs() | {"input_ids": torch.tensor([[1, 30, 31, 2, 9, 9]]).repeat(5, 1)}
    assert head(**other).quality.equal(head(**inputs()).quality)
    assert not torch.allclose(head(**other).finding, head(**inputs()).finding)


@torch.no_grad()
def test_ratings_do_not_follow_the_dtype_of_the_pipeline(head, tmp_path):
    head.save_pretrained(tmp_path)
    expected = head(**inputs())
    for dtype in (torch.float16, torch.bfloat16):
        loaded = FilterHead.from_pretrained(tmp_path, dtype=dtype).eval()
        assert loaded.to(dtype).dtype == torch.float32
        torch.testing.assert_close(loaded(**inputs()).quality, expected.quality)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(head(**inputs()).finding, expected.finding)


@torch.no_grad()
def test_heads_that_were_saved_before_realism_rate_as_they_did_bit_for_bit(head, tmp_path):
    head.save_pretrained(tmp_path)
    expected = FilterHead.from_pretrained(tmp_path).eval()(**inputs())
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["rates_realism"], config["realism_weight"]
    path.write_text(json.dumps(config))
    old = FilterHead.from_pretrained(tmp_path).eval()
    assert not any(name.startswith("realism") for name in old.state_dict())
    rated = old(**inputs())
    assert rated.realism is None and len(rated.to_tuple()) == 6
    assert all(a.equal(b) for a, b in zip(rated.to_tuple(), expected.to_tuple(), strict=True))
    realist = make_head(rates_realism=True)
    realist.load_state_dict({**realist.state_dict(), **head.state_dict()})
    both = realist(**inputs()), head(**inputs())
    assert both[0].quality.equal(both[1].quality) and both[0].finding.equal(both[1].finding)


@torch.no_grad()
def test_realism_is_a_log_ratio_of_the_image_alone_in_fp32(realist, tmp_path):
    expected = realist(**inputs()).realism
    assert expected.shape == (5,) and expected.dtype == torch.float32 and expected.std() > 0
    other = inputs() | {"input_ids": torch.tensor([[1, 30, 31, 2, 9, 9]]).repeat(5, 1)}
    assert realist(**other).realism.equal(expected), "the words do not count"
    realist.save_pretrained(tmp_path)
    loaded = FilterHead.from_pretrained(tmp_path, dtype=torch.float16).eval()
    torch.testing.assert_close(loaded.to(torch.float16)(**inputs()).realism, expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(realist(**inputs()).realism, expected)


def test_the_embedded_size_is_small_beside_the_embedded_unet():
    from diffusers import UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    from minim_pipeline import EMBEDDED_CHECKPOINT

    full, unet = FilterHead().eval(), UNet2DConditionModel.from_pretrained(EMBEDDED_CHECKPOINT, subfolder="unet")
    assert 2 * sum(p.numel() for p in full.parameters()) <= 4e6, "bytes in fp16"
    latents, angle = torch.zeros(1, 8, 32, 32), torch.zeros(1)
    flops = []
    for call in (
        lambda: full(latents, latents, angle, torch.zeros(1, 48, dtype=torch.long)),
        lambda: unet(latents, torch.tensor([500]), torch.zeros(1, 48, 256)),
    ):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call()
        flops.append(counter.get_total_flops())
    assert flops[0] <= 0.05 * flops[1]


ZERO_SNR = dict(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")


@pytest.mark.parametrize(
    "kind", [DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler]
)
def test_the_estimate_is_the_clean_image_whatever_the_scheduler(kind):
    scheduler = kind(**ZERO_SNR)
    scheduler.set_timesteps(8)
    clean, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps[1:]:
        angle = noise_angles(scheduler.alphas_cumprod, t.reshape(1))
        alpha, sigma = angle.cos(), angle.sin()
        # Euler's latents are not scaled down as noise is added; the U-Net's input is.
        latents = clean * alpha + noise * sigma
        if kind is EulerDiscreteScheduler:
            latents = clean + noise * (sigma / alpha)
        seen = scheduler.scale_model_input(latents, t)
        scheduler._step_index = None
        velocity = alpha * noise - sigma * clean
        torch.testing.assert_close(estimate_clean(seen, velocity, angle, "v_prediction"), clean, atol=1e-3, rtol=1e-3)


def test_estimates_of_the_other_predictions():
    clean, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    angle = torch.tensor([0.1, 0.7, 1.4])
    noisy = angle.cos()[:, None, None, None] * clean + angle.sin()[:, None, None, None] * noise
    torch.testing.assert_close(estimate_clean(noisy, noise, angle, "epsilon"), clean, atol=1e-4, rtol=1e-4)
    assert estimate_clean(noisy, clean, angle, "sample").equal(clean)
    with pytest.raises(ValueError, match="'flow'"):
        estimate_clean(noisy, noise, angle, "flow")


def test_angles_run_from_image_to_noise():
    alphas = DDIMScheduler(**ZERO_SNR).alphas_cumprod
    angles = noise_angles(alphas, torch.tensor([0, 499.5, 999]))
    assert angles[0] < 0.05 and angles[2] == pytest.approx(math.pi / 2, abs=1e-3)
    torch.testing.assert_close(angles[1], noise_angles(alphas, torch.tensor([499, 500])).mean())
