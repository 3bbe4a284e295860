"""One call at a time, whichever thread makes it, and copies that draw beside each other."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from minim_pipeline import MinimPipeline


CALL = {"modality": "oct", "output_type": "np", "num_inference_steps": 4}


def at_once(*tasks) -> list:
    """What the functions give when threads begin them together."""
    barrier = threading.Barrier(len(tasks))

    def begin(task):
        barrier.wait()
        return task()

    with ThreadPoolExecutor(len(tasks)) as pool:
        return [future.result(timeout=120) for future in [pool.submit(begin, task) for task in tasks]]


@pytest.fixture
def filtered(make_pipeline):
    return make_pipeline(filtered=True)


@pytest.mark.parametrize("sibling", [False, True], ids=["one", "from_pipe"])
def test_calls_from_two_threads_give_each_its_own_images(filtered, sibling):
    other = MinimPipeline.from_pipe(filtered) if sibling else filtered
    other.set_progress_bar_config(disable=True)
    alone = [pipe(text, seeds=[s], **CALL) for pipe, text, s in ((filtered, "edema", 1), (other, "a long scar", 2))]
    for _ in range(3):
        first, second = at_once(
            lambda: filtered("edema", seeds=[1], **CALL), lambda: other("a long scar", seeds=[2], **CALL)
        )
        np.testing.assert_array_equal(first.images, alone[0].images)
        np.testing.assert_array_equal(second.images, alone[1].images)
        assert (first.seeds, second.seeds) == ([1], [2])


def test_a_call_does_not_begin_while_another_is_at_work(filtered):
    """What makes the images right, whatever the threads' luck: nothing of one call lies between steps of another."""
    steps, begun = [], threading.Event()

    def note(name):
        def callback(pipe, step, t, tensors):
            steps.append(name)
            begun.set()
            return {}

        return callback

    def second():
        begun.wait(60)
        filtered("b", seeds=[2], callback_on_step_end=note("b"), **CALL)

    thread = threading.Thread(target=second)
    thread.start()
    filtered("a", seeds=[1], callback_on_step_end=note("a"), **CALL)
    thread.join(60)
    assert steps == ["a"] * 4 + ["b"] * 4


def test_score_and_encode_prompt_wait_too(filtered):
    picture = np.full((1, 64, 64, 3), 0.5, np.float32)
    alone = filtered.score(picture, "edema", "oct").scores
    embeds = filtered.encode_prompt("edema", modality="oct")[0]
    for task in (
        lambda: filtered.score(picture, "edema", "oct").scores == alone,
        lambda: torch.equal(filtered.encode_prompt("edema", modality="oct")[0], embeds),
    ):
        done, waited = threading.Event(), []

        def callback(pipe, step, t, tensors, task=task, done=done, waited=waited):
            if step == 0:
                thread = threading.Thread(target=lambda: (waited.append(task()), done.set()))
                thread.start()
            # Long enough for it to be over, if it did not wait.
            waited.append(done.wait(0.3))
            return {}

        filtered("edema", seeds=[1], callback_on_step_end=callback, **CALL)
        assert done.wait(60) and waited == [False] * 4 + [True]


def test_a_call_inside_of_a_call_is_refused_and_leaves_the_pipeline_usable(filtered):
    other = MinimPipeline.from_pipe(filtered)
    expected = filtered("edema", seeds=[1], **CALL).images
    for inner in (filtered, other):
        with pytest.raises(RuntimeError, match="inside of its own call.*deepcopy"):
            filtered("edema", seeds=[1], callback_on_step_end=lambda *_, inner=inner: inner("b", "oct"), **CALL)
        np.testing.assert_array_equal(filtered("edema", seeds=[1], **CALL).images, expected)
    scores = []

    def rate(pipe, step, t, tensors):
        scores.append(pipe.score(np.zeros((1, 64, 64, 3), np.float32), "edema", "oct"))
        return {}

    found = filtered("edema", seeds=[1], callback_on_step_end=rate, **CALL).images
    np.testing.assert_array_equal(found, expected)
    assert len(scores) == 4, "to rate an image on the way is fine"


def test_copies_draw_beside_each_other(filtered):
    expected = filtered("edema", seeds=[1], **CALL).images
    other = copy.deepcopy(filtered)
    inside = []

    def callback(pipe, step, t, tensors):
        if step == 1:
            inside.append(other("edema", seeds=[1], **CALL).images)
        return {}

    found = filtered("edema", seeds=[1], callback_on_step_end=callback, **CALL).images
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(inside[0], expected)
    again = pickle.loads(pickle.dumps(filtered))
    np.testing.assert_array_equal(again("edema", seeds=[1], **CALL).images, expected)
