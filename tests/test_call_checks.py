"""What the arguments of a call and of `score` may be: said before any work, with what was given and is allowed."""

import math

import numpy as np
import PIL.Image
import pytest
import torch

from minim_pipeline.call_checks import to_pictures


NAN, INF = math.nan, math.inf
EMBEDS = torch.zeros(1, 48, 32)
# By argument values that it must not take, and what the message says is allowed.
COUNT = "has to be a positive integer"
WRONG = {
    "prompt": ([3, NAN, True, ["a", None], ("a",), b"a"], "string or a list of strings"),
    "modality": ([3, NAN, True, ["oct", "cxr"], [None], ""], "modality"),
    "height": ([NAN, INF, -64, True, "64", 64.0, [64]], "positive multiple of 8"),
    "width": ([NAN, INF, -64, True, "64", 64.0, [64]], "positive multiple of 8"),
    "num_inference_steps": ([NAN, INF, -1, True, "3", 2.5], COUNT),
    "num_images_per_prompt": ([NAN, INF, 0, True, "3", None, 1.0], COUNT),
    "num_candidates": ([NAN, INF, 0, True, "3", 1.5], COUNT),
    "max_rounds": ([NAN, INF, 0, True, "3", None], COUNT),
    "timesteps": ([[], [NAN], [10, 20], [1000], [-1], 10, "10", [True], [None]], "from 0 to 999 in descending order"),
    "guidance_scale": ([NAN, INF, -1, True, "3", [3.0]], "a number from 0 on"),
    "guidance_rescale": ([NAN, INF, -0.1, 1.1, True, "0"], "a number from 0 to 1"),
    "guidance_interval": ([0.5, NAN, (0.0, NAN), ("0", "1"), (0, True), "01", (0, 0.5, 1)], "ascending order"),
    "eta": ([NAN, INF, -0.1, 1.1, True, None, "0"], "a number from 0 to 1"),
    "negative_prompt": ([3, 0, NAN, True, False, {}, [None], [3]], "string or a list of strings"),
    "generator": ([3, NAN, "0", True, [3], (torch.Generator(),)], "torch.Generator"),
    "latents": (
        [NAN, "0", np.zeros((1, 8, 8, 8)), torch.zeros(8, 8, 8), torch.full((1, 8, 8, 8), NAN)]
        + [torch.zeros(1, 8, 8, 8, dtype=torch.int64), torch.full((1, 8, 8, 8), INF)],
        "tensor of floats|is needed|finite",
    ),
    "negative_prompt_embeds": (
        [NAN, "a", torch.zeros(48, 32), torch.zeros(2, 48, 32), torch.zeros(1, 48, 31), EMBEDS * NAN],
        "tensor of floats|is needed|finite",
    ),
    "output_type": ([NAN, None, True, ["pil"], "PIL"], "one of 'pil', 'np', 'pt', 'latent'"),
    "return_dict": ([None, 1, "yes", NAN], "True or False"),
    "cross_attention_kwargs": ([3, "scale", [0.5], {"scale": NAN}, {"scale": "1"}, {"scale": None}], "dict|a number"),
    "clip_skip": ([NAN, INF, -1, 3, True, "1", 1.0], "0 to 2"),
    "callback_on_step_end": ([3, "print", True, NAN], "None or a function"),
    "callback_on_step_end_tensor_inputs": (["latents", 3, [None], NAN], "a list of some of|may name"),
    "use_filter": ([1, "no", NAN], "True or False"),
    "filter_threshold": ([NAN, INF, 0, 3.5, True, "2"], "a score from 1 to 3"),
    "reject_copies": ([None, 0, "no", NAN], "True or False"),
    "seeds": ([NAN, 1, "1", [NAN], [True], [None], [1.0], torch.tensor([1]), {1}], "one seed for each|64 bits"),
}
CASES = [(name, value, allowed) for name, (values, allowed) in WRONG.items() for value in values]


@pytest.fixture(scope="module")
def filtered(make_pipeline):
    return make_pipeline(filtered=True)


@pytest.fixture
def idle(filtered):
    """A pipeline whose networks must not be used."""

    def refuse(module, given):
        raise AssertionError("work was done before the arguments were checked")

    parts = (filtered.unet, filtered.text_encoder, filtered.vae, filtered.filter_head)
    hooks = [part.register_forward_pre_hook(refuse) for part in parts]
    yield filtered
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(("name", "value", "allowed"), CASES, ids=lambda part: str(part)[:24])
def test_every_argument_of_the_call_is_checked(idle, name, value, allowed):
    with pytest.raises(ValueError, match=allowed) as caught:
        idle(**{"prompt": "edema", "modality": "oct", name: value})
    if isinstance(value, (int, float, str)):
        assert repr(value) in str(caught.value), "the message says what was given"


@pytest.mark.parametrize(
    "value", [NAN, "a", torch.zeros(48, 32), torch.zeros(1, 48, 31), EMBEDS.long(), EMBEDS * NAN, EMBEDS + INF]
)
def test_embeddings_are_checked(idle, value):
    with pytest.raises(ValueError, match="`prompt_embeds` has"):
        idle(modality="oct", prompt_embeds=value)


def test_noise_levels_are_checked(make_pipeline):
    from diffusers import EulerDiscreteScheduler

    pipe = make_pipeline()
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    for sigmas in ([], [NAN], [1.0, 2.0], [INF, 1.0], [-1.0], 3.0, "1", [True]):
        with pytest.raises(ValueError, match="`sigmas` has to be a list of numbers from 0 on in descending order"):
            pipe("edema", "oct", sigmas=sigmas)


def test_numbers_saved_with_the_model_are_checked_as_those_of_the_call(make_pipeline):
    for name, value in (("num_inference_steps", 0), ("guidance_scale", NAN), ("num_candidates", -1)):
        pipe = make_pipeline(filtered=True, **{name: value})
        with pytest.raises(ValueError, match=f"`{name}` has to be"):
            pipe("edema", "oct")


GREY = PIL.Image.new("L", (64, 64), 90)
BAD_SCORES = [
    ({"images": value}, "`images` have to be")
    for value in (
        *(None, NAN, "a.png", [], 3, [None], np.zeros((0, 8, 8, 3)), np.zeros((8, 8)), np.zeros((1, 8, 8, 4))),
        *(np.full((1, 8, 8, 3), NAN), np.full((1, 8, 8, 3), 1.5), torch.full((1, 3, 8, 8), -1.0)),
        *(np.zeros((1, 8, 8, 3), np.uint8), torch.zeros(1, 3, 8, 8, dtype=torch.int64), torch.zeros(1, 8, 8, 3)),
    )
]
BAD_SCORES += [({"prompt": value}, "string or a list of strings") for value in (None, NAN, 3, True, [3], ("a",))]
BAD_SCORES += [({"prompt": ""}, "empty"), ({"prompt": ["a", "b"]}, "2 entries for 1 images")]
BAD_SCORES += [({"modality": value}, "odality") for value in (None, NAN, 3, True, "PET", ["oct", "oct"])]
BAD_SCORES += [({"filter_threshold": value}, "from 1 to 3") for value in (NAN, INF, 0, True, "2")]
BAD_SCORES += [({"reject_copies": value}, "True or False") for value in (None, 1, "no")]


@pytest.mark.parametrize(("arguments", "message"), BAD_SCORES, ids=lambda part: str(part)[:24])
def test_every_argument_of_score_is_checked(idle, arguments, message):
    with pytest.raises(ValueError, match=message):
        idle.score(**{"images": GREY, "prompt": "edema", "modality": "oct", **arguments})


def test_an_image_is_rated_the_same_in_whatever_form_it_is_given(filtered):
    array = np.random.default_rng(0).random((1, 40, 72, 3), dtype=np.float32)
    pictures = to_pictures(array)
    assert pictures[0].size == (72, 40) and pictures[0].mode == "RGB"
    tensor = torch.from_numpy(array).permute(0, 3, 1, 2)
    forms = (array, array[0], [array[0]], tensor, tensor[0], pictures, pictures[0])
    scores = [filtered.score(form, "edema", "oct").scores for form in forms]
    assert all(len(score) == 1 and score == scores[0] for score in scores)
