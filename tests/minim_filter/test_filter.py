"""The filter in the pipeline: which candidates come back, with every scheduler, and that it can be switched off."""

import numpy as np
import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback

from minim_pipeline import MinimPipeline
from minim_pipeline.minim_filter.fingerprints import distances, pack
from minim_pipeline.minim_filter.funnel import Funnel, combine, plan_stages, select_state
from minim_pipeline.notices import warn_once
from minim_pipeline.schedules import ZERO_SNR_SCHEDULERS


torch.set_num_threads(1)

CALL = dict(prompt="normal", modality="oct", output_type="np")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def filtered(make_pipeline):
    return make_pipeline(filtered=True)


def thresholds(pipe, score: float, finding: float = 1.0, copy: int = -1) -> None:
    entry = {"score": score, "finding": finding, "copy": copy, "ratings": 20}
    calibration = dict.fromkeys(pipe.config.modalities, entry)
    pipe.filter_head.register_to_config(calibration=calibration)


def stages(pipe, *plan) -> None:
    pipe.filter_head.register_to_config(stages=plan)


def test_switched_off_it_leaves_the_image_as_it_was_bit_for_bit(filtered, make_pipeline):
    plain = make_pipeline()
    off = filtered(**CALL, num_images_per_prompt=2, generator=generator(), use_filter=False)
    assert np.array_equal(off.images, plain(**CALL, num_images_per_prompt=2, generator=generator()).images)
    assert off.scores == off.accepted == [None, None]
    on = filtered(**CALL, num_images_per_prompt=2, generator=generator())
    assert np.array_equal(on.images, off.images), "one candidate each: rated, and not changed"
    assert all(1 <= score <= 3 for score in on.scores) and on.accepted == [True, True] and on.candidates == [1, 1]


def ratings_of(pipe, monkeypatch) -> list:
    """What the head says from now on in each call: of the latents, then of the pictures."""
    seen, judge = [], pipe.judge
    monkeypatch.setattr(
        pipe, "judge", lambda rated, *rest, **more: (seen.append(rated), judge(rated, *rest, **more))[1]
    )
    return seen


def test_of_many_candidates_the_best_comes_back(filtered, monkeypatch):
    stages(filtered)  # all are sampled to the end
    out = filtered(**CALL, num_images_per_prompt=2, generator=generator(), num_candidates=4)
    assert out.candidates == [4, 4] and out.images.shape[0] == 2
    seeds, seen = filtered.draw_seeds([0, 1], 4, generator()), ratings_of(filtered, monkeypatch)
    every = filtered(**CALL, num_images_per_prompt=8, seeds=seeds)
    latents = combine(seen[0].quality, seen[0].finding).view(2, 4)
    for j, best in enumerate(latents.argmax(1).tolist()):
        assert out.seeds[j] == seeds[4 * j + best]
        assert out.scores[j] == pytest.approx(every.scores[4 * j + best], abs=1e-4)
    again = filtered(**CALL, num_images_per_prompt=2, seeds=out.seeds)
    np.testing.assert_allclose(again.images, out.images, atol=1e-4)
    assert again.scores == pytest.approx(out.scores, abs=1e-4)


@pytest.mark.parametrize("kind", ZERO_SNR_SCHEDULERS)
def test_candidates_dropped_on_the_way_leave_the_others_alone(filtered, kind):
    filtered.scheduler = kind.from_config(filtered.scheduler.config)
    stages(filtered, (20.0, 0.5), (1.0, 0.0))
    settings = dict(num_inference_steps=8, num_images_per_prompt=2)
    sizes = []

    def note(pipe, step, t, tensors):
        sizes.append(len(tensors["latents"]))
        return {}

    out = filtered(**CALL, **settings, generator=generator(), num_candidates=4, callback_on_step_end=note)
    assert len(sizes) == 8 and sizes[0] == 8 and sizes[-1] == 2 and 4 in sizes and sizes == sorted(sizes)[::-1]
    alone = filtered(**CALL, **settings, seeds=out.seeds)
    np.testing.assert_allclose(alone.images, out.images, atol=2e-3)


def test_an_image_is_the_same_in_any_batch(filtered):
    stages(filtered, (20.0, 0.5))
    settings = dict(num_candidates=3, num_inference_steps=4, modality="oct", output_type="np")
    both = filtered(["normal", "cyst"], **settings, generator=[generator(1), generator(2)])
    for j, prompt in enumerate(["normal", "cyst"]):
        one = filtered(prompt, **settings, generator=generator(j + 1))
        assert one.seeds == both.seeds[j : j + 1]
        np.testing.assert_allclose(one.images[0], both.images[j], atol=1e-4)


def test_what_falls_short_is_drawn_again_and_told_once(filtered, caplog):
    first = filtered(**CALL, num_images_per_prompt=3, num_candidates=2, generator=generator())
    thresholds(filtered, score=sorted(first.scores)[1] + 1e-4)
    calls = []

    def note(pipe, step, t, tensors):
        calls.append(step)
        return {}

    settings = dict(num_images_per_prompt=3, num_candidates=2, max_rounds=3, callback_on_step_end=note)
    out = filtered(**CALL, **settings, generator=generator())
    assert [count > 2 for count in out.candidates] == [score < max(first.scores) for score in first.scores]
    assert all(new >= old for new, old in zip(out.scores, first.scores)), "nothing is lost by drawing again"
    assert len(calls) == filtered.config.num_inference_steps, "callbacks see the first round only"
    again = filtered(**CALL, num_images_per_prompt=3, seeds=out.seeds)
    np.testing.assert_allclose(again.images, out.images, atol=1e-4)

    thresholds(filtered, score=3.1)
    caplog.clear()
    out = filtered(**CALL, num_images_per_prompt=2, num_candidates=2, max_rounds=2, generator=generator())
    assert out.accepted == [False, False] and out.candidates == [4, 4] and len(out.images) == 2
    assert sum("fall short" in message for message in caplog.messages) == 1


def test_an_accepted_candidate_goes_before_a_better_one_that_is_not(filtered, monkeypatch):
    stages(filtered)
    seeds, seen = filtered.draw_seeds([0], 6, generator()), ratings_of(filtered, monkeypatch)
    filtered(**CALL, num_images_per_prompt=6, seeds=seeds)
    finding, scores = seen[0].finding.tolist(), combine(seen[0].quality, seen[0].finding).tolist()
    best = int(np.argmax(scores))
    other = next(i for i in np.argsort(scores)[::-1].tolist() if finding[i] > finding[best])
    thresholds(filtered, score=1.0, finding=(finding[best] + finding[other]) / 2)
    out = filtered(**CALL, num_candidates=6, generator=generator())
    assert out.seeds != [seeds[best]]
    assert finding[seeds.index(out.seeds[0])] > finding[best]


def test_copies_of_training_images_do_not_come_back(filtered):
    stages(filtered)
    settings = dict(**CALL, num_images_per_prompt=2, num_candidates=3)
    first = filtered(**settings, generator=generator())
    assert first.rejected == [{"quality": 0, "finding": 0, "copy": 0}] * 2, "what is good but not best is not rejected"
    codes = []
    filtered.filter_head.register_forward_hook(lambda head, given, made: codes.append(made.code))
    filtered(**CALL, seeds=first.seeds[1:])
    head = filtered.filter_head
    head.set_fingerprints(head.code, pack(torch.cat(codes)))  # "the training image", its latents and its picture
    thresholds(filtered, score=1.0, copy=0)
    out = filtered(**settings, generator=generator())
    assert out.seeds[0] == first.seeds[0] and out.seeds[1] != first.seeds[1] and out.accepted == [True, True]
    assert [counts["copy"] for counts in out.rejected] == [0, 1]
    assert filtered(**settings, generator=generator(), reject_copies=False).seeds == first.seeds

    again = filtered(**CALL, seeds=first.seeds[1:])
    assert again.accepted == [False] and again.rejected == [{"quality": 0, "finding": 0, "copy": 1}]
    rated = filtered.score(again.images, "normal", "oct", reject_copies=False)
    assert rated.accepted == [True] and rated.reasons == [None]


def test_fingerprints_differ_by_as_many_bits_as_codes_do():
    code = torch.randn(5, 64)
    known = pack(code[:4])
    assert known.dtype == torch.uint8 and known.shape == (4, 8)
    changed = code.clone()
    changed[0, :7] *= -1
    changed[1, 60:] *= -1
    assert distances(changed, known)[:4].tolist() == [7, 4, 0, 0]
    nearest = min(int(((code[4] > 0) != (code[i] > 0)).sum()) for i in range(4))
    assert distances(code[4:], known).item() == nearest
    assert distances(code, known[:0]).tolist() == [64] * 5, "nothing is known: nothing is near"


def test_what_is_good_enough_is_not_dropped_for_what_is_better(filtered):
    stages(filtered)
    settings = dict(**CALL, num_images_per_prompt=4, num_candidates=3)
    first = filtered.draw_seeds(range(4), 3, generator())[::3]
    assert filtered(**settings, generator=generator()).seeds != first, "of some images another is rated better"
    filtered.filter_head.register_to_config(enough=(1.0, 1.0))
    assert filtered(**settings, generator=generator()).seeds == first, "of equals the first drawn"


def test_of_equals_that_comes_back_which_the_prompt_moved_most(filtered):
    stages(filtered)
    filtered.filter_head.register_to_config(enough=(1.0, 1.0), guidance_weight=1.0)
    moved = torch.zeros(12)

    def note(unet, given, made):
        if len(made[0]) == 24:  # a guided step
            untold, told = made[0].chunk(2)
            moved.add_((told - untold).square().mean((1, 2, 3)))

    settings = dict(**CALL, num_images_per_prompt=4, num_candidates=3, guidance_scale=3.0)
    hook = filtered.unet.register_forward_hook(note)
    seeds = filtered(**settings, generator=generator()).seeds
    hook.remove()
    drawn = filtered.draw_seeds(range(4), 3, generator())
    assert seeds == [drawn[3 * i + k] for i, k in enumerate(moved.view(4, 3).argmax(1).tolist())]
    first = filtered(**settings | {"guidance_scale": 1.0}, generator=generator()).seeds
    assert first == drawn[::3], "without guidance the first drawn"


@pytest.fixture
def realistic(make_pipeline):
    """A pipeline whose filter rates realism, too."""
    return make_pipeline(realism=True)


def test_of_equals_that_comes_back_which_looks_most_like_a_real_one(realistic, monkeypatch):
    stages(realistic)
    realistic.filter_head.register_to_config(enough=(1.0, 1.0), realism_weight=1.0)
    settings, seen = dict(**CALL, num_images_per_prompt=3, num_candidates=4), ratings_of(realistic, monkeypatch)
    out = realistic(**settings, generator=generator())
    drawn, realism = realistic.draw_seeds(range(3), 4, generator()), seen[0].realism.view(3, 4)
    assert out.seeds == [drawn[4 * i + k] for i, k in enumerate(realism.argmax(1).tolist())]
    assert out.seeds != drawn[::4]
    stages(realistic, (20.0, 0.5), (1.0, 0.0))
    realistic.filter_head.register_to_config(realism_weight=0.0)
    assert realistic(**settings, generator=generator()).seeds == drawn[::4], "of equals the first drawn"


def test_of_finished_candidates_that_comes_back_whose_picture_looks_real_enough(realistic):
    """Not that whose latents do: they were never those of a picture."""
    stages(realistic)
    seeds = realistic.draw_seeds([0], 6, generator())
    pictures = realistic("normal", "oct", num_images_per_prompt=6, seeds=seeds).images
    realism = realistic.score(pictures, "normal", "oct").realism
    second, best = sorted(range(6), key=realism.__getitem__)[-2:]
    least = (realism[second] + realism[best]) / 2
    entry = {"score": 1.0, "finding": 1.0, "ratings": 20, "realism": least}
    realistic.filter_head.register_to_config(calibration=dict.fromkeys(realistic.config.modalities, entry))
    out = realistic(**CALL, num_candidates=6, generator=generator())
    assert out.seeds == [seeds[best]] and out.accepted == [True]
    assert out.rejected[0]["realism"] == 5


def test_what_does_not_look_like_a_real_one_is_told(realistic, filtered):
    asked = dict(**CALL, num_images_per_prompt=4, seeds=[0, 1, 2, 3])
    rated = realistic.score(realistic(**asked).images, "normal", "oct")
    least = sorted(rated.realism)[2] - 1e-4
    entry = {"score": 1.0, "finding": 1.0, "ratings": 20, "realism": least}
    realistic.filter_head.register_to_config(calibration=dict.fromkeys(realistic.config.modalities, entry))
    out = realistic(**asked)
    assert out.accepted == [value >= least for value in rated.realism] and out.accepted.count(True) == 2
    assert out.scores == rated.scores, "it is no part of the score"
    assert [counts["realism"] for counts in out.rejected] == [not accepted for accepted in out.accepted]
    again = realistic.score(out.images, "normal", "oct")
    assert again.reasons == [None if accepted else "realism" for accepted in out.accepted]
    assert filtered.score(out.images, "normal", "oct").realism is None


@pytest.mark.parametrize("ratings", [0, 19, 20])
def test_who_has_not_been_rated_by_people_is_told_once(filtered, ratings, caplog):
    entry = {"score": 1.0, "finding": 1.0, "ratings": ratings}
    filtered.filter_head.register_to_config(calibration=dict.fromkeys(filtered.config.modalities, entry))
    warn_once.cache_clear()
    for seed in range(2):
        filtered(**CALL, seeds=[seed])
    told = [message for message in caplog.messages if "not calibrated by people" in message and "oct" in message]
    assert len(told) == (ratings < 20)


def test_every_candidate_left_out_has_a_reason(filtered):
    stages(filtered, (20.0, 0.5), (1.0, 0.0))
    settings = dict(**CALL, num_inference_steps=8, num_images_per_prompt=2, num_candidates=4)
    out = filtered(**settings, generator=generator())
    assert [sum(counts.values()) for counts in out.rejected] == [3, 3] and out.accepted == [True, True]
    thresholds(filtered, score=1.0, finding=3.0)
    out = filtered(**settings, max_rounds=2, generator=generator())
    assert out.accepted == [False, False] and out.candidates == [8, 8]
    assert all(sum(counts.values()) == 8 and counts["finding"] >= 2 for counts in out.rejected)


def test_any_images_can_be_scored(filtered):
    out = filtered("normal", "oct", num_images_per_prompt=2, seeds=[0, 1])
    rated = filtered.score(out.images, "normal", "oct")
    assert len(rated.scores) == 2 and all(isinstance(value, bool) for value in rated.accepted)
    for score, quality, finding in zip(rated.scores, rated.quality, rated.finding):
        assert score == pytest.approx(1 + (quality - 1) * (finding - 1) / 2, abs=1e-5)
    one = filtered.score(out.images[1].convert("L").resize((50, 70)), ["normal"], "oct")
    assert len(one.scores) == 1
    with pytest.raises(ValueError, match="1 entries for 2 images"):
        filtered.score(out.images, ["normal"], "oct")


@pytest.mark.parametrize(
    ("size", "output_type"), [({}, "pil"), ({"height": 96}, "np"), ({"height": 128, "width": 128}, "pt")], ids=str
)
def test_the_word_of_a_call_is_that_of_score(filtered, size, output_type):
    """Also of a size that the model has not learned, at which the head says of latents what it likes."""
    stages(filtered, (20.0, 0.5))
    settings = dict(num_images_per_prompt=4, num_candidates=2, max_rounds=2, **size, output_type=output_type)
    for copy in (-1, 8):  # of 8 bits
        thresholds(filtered, score=1.5, copy=copy)
        out = filtered("normal", "oct", **settings, generator=generator())
        rated = filtered.score(out.images, "normal", "oct")
        assert out.accepted == rated.accepted and out.scores == pytest.approx(rated.scores, abs=1e-5)
        asked = dict(filter_threshold=sorted(rated.scores)[1] - 1e-4, reject_copies=False)
        again = filtered("normal", "oct", **settings, **asked, generator=generator())
        assert again.accepted == filtered.score(again.images, "normal", "oct", **asked).accepted
        head, codes = filtered.filter_head, []
        hook = head.register_forward_hook(lambda head, given, made, codes=codes: codes.append(made.code))
        filtered.score(out.images, "normal", "oct")
        hook.remove()
        head.set_fingerprints(head.code, pack(codes[0][:1]))  # the first image is a copy from now on


def test_a_picture_that_score_rejects_is_never_accepted_whatever_its_latents_promised(filtered, monkeypatch):
    seen = ratings_of(filtered, monkeypatch)
    for seed in range(1, 30):  # one whose latents promise more than the picture holds
        seen.clear()
        filtered(**CALL, seeds=[seed])
        latents, picture = (combine(r.quality, r.finding).item() for r in seen)
        if latents > picture + 1e-3:
            break
    thresholds(filtered, score=(latents + picture) / 2)
    out = filtered(**CALL, seeds=[seed])
    assert out.accepted == [False] == filtered.score(out.images, "normal", "oct").accepted
    assert sum(out.rejected[0].values()) == 1


def test_rounds_begin_alike_whatever_a_callback_changed(filtered):
    """diffusers' own callback ends guidance: in its round, which is the first."""
    thresholds(filtered, score=3.1)
    batches = []
    filtered.unet.register_forward_pre_hook(lambda module, given: batches.append(len(given[0])))
    filtered.filter_head.register_to_config(stages=())
    settings = dict(num_candidates=2, max_rounds=3, num_inference_steps=3, guidance_scale=3.0)
    out = filtered(**CALL, **settings, callback_on_step_end=SDCFGCutoffCallback(None, 0), generator=generator())
    assert batches == [4, 2, 2] + [4, 4, 4] * 2, "guided are all steps of rounds 2 and 3"
    assert out.candidates == [6] and filtered.guidance_scale == 3.0


@pytest.mark.parametrize("prompts", [["normal"], ["normal", "cyst"]], ids=["one", "two"])
def test_diffusers_own_callback_ends_guidance_of_candidates_too(filtered, prompts):
    """It keeps the last prompt's embeddings alone, which would be those of all."""
    stages(filtered, (20.0, 0.5), (1.0, 0.0))
    settings = dict(modality="oct", num_candidates=4, num_inference_steps=6, guidance_scale=3.0, output_type="np")
    cut = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
    out = filtered(prompts, **settings, generator=generator(), callback_on_step_end=cut)
    alone = filtered(prompts, **settings | {"num_candidates": 1}, seeds=out.seeds, guidance_interval=(0.0, 1 / 6))
    np.testing.assert_allclose(alone.images, out.images, atol=2e-3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt_embeds": torch.zeros(3, 48, 32)}, r"`prompt_embeds` of shape \(3, 48, 32\) for 2 candidates"),
        ({"latents": torch.zeros(1, 8, 8, 8)}, r"`latents` of shape \(1, 8, 8, 8\), \(2, 8, 8, 8\) is needed"),
        (None, "has to return a dict, got None"),
    ],
)
def test_a_callback_that_gives_back_something_else_is_told(filtered, given, message):
    with pytest.raises(ValueError, match=message):
        filtered(**CALL, num_candidates=2, callback_on_step_end=lambda *_: given)


def test_latents_and_embeddings_bypass_the_filter(filtered):
    assert filtered("normal", "oct", seeds=[0], output_type="latent").scores == [None]
    embeds = filtered.encode_prompt("normal", modality="oct", do_classifier_free_guidance=False)[0]
    negative = filtered.encode_prompt("normal", modality="oct")[1]
    out = filtered(prompt_embeds=embeds, negative_prompt_embeds=negative, modality="oct", seeds=[0])
    assert out.scores == [None] and out.candidates == [1]


def test_a_call_may_have_a_threshold_of_its_own(filtered):
    scores = filtered(**CALL, num_images_per_prompt=4, seeds=list(range(4))).scores
    middle = sorted(scores)[2]
    out = filtered(**CALL, num_images_per_prompt=4, seeds=list(range(4)), filter_threshold=middle - 1e-4)
    assert out.accepted == [score >= middle - 1e-4 for score in scores] and out.accepted.count(True) == 2


def test_an_interrupted_call_draws_no_further_round(filtered):
    thresholds(filtered, score=3.1)

    def stop(pipe, step, t, tensors):
        pipe._interrupt = True
        return {}

    out = filtered(**CALL, num_candidates=2, max_rounds=3, generator=generator(), callback_on_step_end=stop)
    assert out.candidates == [2] and len(out.images) == 1


BAD = [
    (dict(filter_threshold=4), "score from 1 to 3, got 4"),
    (dict(seeds=[1], num_candidates=2), "`seeds` says which"),
    (dict(seeds=[1], max_rounds=2), "`seeds` says which"),
    (dict(num_candidates=2, use_filter=False), "use_filter=False"),
    (dict(num_candidates=2, output_type="latent"), "bypasses"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_what_the_filter_cannot_do_is_told(filtered, arguments, message):
    with pytest.raises(ValueError, match=message):
        filtered(**{**CALL, **arguments})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"in_channels": 4}, "4 latent channels, the pipeline has 8"),
        ({"latent_scale": 0.18215}, "0.18215 latent scale, the pipeline has 1.0"),
        ({"vocab_size": 7000}, "7000 tokens, the pipeline has"),
    ],
)
def test_a_head_that_does_not_fit_is_told_at_load(filtered, config, message):
    filtered.filter_head.register_to_config(**config)
    with pytest.raises(ValueError, match=message):
        MinimPipeline(**filtered.components)


def test_it_is_saved_and_loaded_with_the_pipeline(filtered, tmp_path):
    filtered.save_pretrained(tmp_path)
    loaded = MinimPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    settings = dict(**CALL, num_candidates=2, num_inference_steps=2)
    expected = filtered(**settings, generator=generator())
    found = loaded(**settings, generator=generator())
    assert np.array_equal(found.images, expected.images) and found.scores == pytest.approx(expected.scores, abs=1e-5)
    assert '"minim_filter"' in (tmp_path / "model_index.json").read_text()
    assert MinimPipeline.from_pretrained(tmp_path, filter_head=None).filter_head is None
    for dtype in (torch.float16, torch.bfloat16):
        assert loaded.to(dtype).filter_head.dtype == torch.float32


def test_only_what_is_of_the_batch_is_cut():
    class Scheduler:
        def __init__(self):
            self.model_outputs = [None, torch.arange(12.0).view(3, 4)]
            self.timesteps, self.sigmas, self.timestep_list = torch.arange(3), torch.zeros(3), [torch.tensor(3)]

    scheduler = Scheduler()
    select_state(scheduler, torch.tensor([2, 0]), torch.Size([3, 4]))
    assert scheduler.model_outputs[0] is None and scheduler.model_outputs[1][:, 0].tolist() == [8, 0]
    assert len(scheduler.timesteps) == len(scheduler.sigmas) == 3


def test_every_image_keeps_its_own_best():
    funnel = Funnel(None, None, torch.tensor([0, 0, 0, 1, 1, 1]), [])
    assert funnel.keep(torch.tensor([1.0, 3, 2, 1, 1, 1]), 2).tolist() == [1, 2, 3, 4], "of equals the earlier"
    assert funnel.keep(torch.tensor([1.0, 2, 1, 5]), 1).tolist() == [1, 3] and funnel.alive.tolist() == [2, 4]
    assert plan_stages([(2.6, 0.0), (4, 0.5)], 4) == [(4.0, 2), (2.6, 1)]
    assert combine(torch.tensor([3.0, 3, 1]), torch.tensor([3.0, 2, 3])).tolist() == [3, 2, 1]


def test_a_compiled_network_always_sees_the_same_batches(filtered):
    """A new batch size would be compiled anew, so rounds for fewer images are filled up."""
    thresholds(filtered, score=3.1)
    stages(filtered, (20.0, 0.5))
    settings = dict(**CALL, num_images_per_prompt=3, num_candidates=2, max_rounds=2, num_inference_steps=3)
    expected = filtered(**settings, generator=generator())
    thresholds(filtered, score=sorted(expected.scores)[1])
    plain = filtered(**settings, generator=generator())
    sizes = []
    hook = filtered.unet.conv_in.register_forward_hook(lambda module, given, made: sizes.append(len(made)))
    filtered.unet.compile()
    with torch.compiler.set_stance("force_eager"):  # the batches matter here, not what the compiler makes of them
        compiled = filtered(**settings, generator=generator())
    hook.remove()
    assert len(sizes) == 6 and sizes[:3] == sizes[3:], "the second round's batches are those of the first"
    assert compiled.seeds == plain.seeds and compiled.candidates == plain.candidates
