"""Thresholds, and which candidate of each image comes back, and what is drawn again."""

import json
from types import SimpleNamespace

import pytest
import torch

from minim_pipeline import EMBEDDED_CHECKPOINT, resolve_modality
from minim_pipeline.minim_filter import FilterHeadOutput
from minim_pipeline.minim_filter.funnel import Batch, accepted_first
from minim_pipeline.minim_filter.seeds import draw_seeds, prepare_generators, redrawing_seed
from minim_pipeline.minim_filter.selection import RoundResult, Selection, Thresholds, judge


def test_thresholds_of_the_embedded_model_are_read_as_they_were_saved():
    config = json.loads((EMBEDDED_CHECKPOINT / "filter_head" / "config.json").read_text())
    thresholds = Thresholds.read(config["calibration"])
    assert thresholds["fundus"] == Thresholds(score=2.4345, finding=2.0, copy=39, ratings=281)
    assert {name: entry.entry() for name, entry in thresholds.items()} == config["calibration"]
    assert Thresholds.of(SimpleNamespace(**config), "cxr").copy == 58


@pytest.mark.parametrize("calibration", [None, {}, {"oct": {"score": 2.5, "finding": 2.0}}])
def test_a_modality_without_thresholds_has_those_of_the_middle(calibration):
    config = SimpleNamespace(calibration=calibration)
    assert Thresholds.of(config, "cxr") == Thresholds(score=2.0, finding=2.0, copy=-1, ratings=0)
    if calibration:
        assert Thresholds.of(config, "oct") == Thresholds(2.5, 2.0, copy=-1, ratings=0), "as older heads have them"


def test_a_least_realism_is_saved_where_there_is_one():
    assert set(Thresholds().entry()) == {"score", "finding", "copy", "ratings"}
    entry = Thresholds(2.5, realism=-1.5).entry()
    assert entry["realism"] == -1.5 and Thresholds.read({"oct": entry})["oct"].realism == -1.5


def test_accepted_ones_go_first_however_far_the_scores_lie_apart():
    scores, passed = torch.tensor([9.0, -40.0, 2.0, -3.0]), torch.tensor([False, True, False, True])
    assert accepted_first(scores, passed).argsort(descending=True).tolist() == [3, 1, 0, 2]


@pytest.mark.parametrize(
    ("realism", "finding", "reason"), [(-1.0, 3.0, "realism"), (0.5, 3.0, None), (-1.0, 1.5, "finding")]
)
def test_what_does_not_look_real_is_rejected_and_told(realism, finding, reason):
    calibration = {"oct": Thresholds(2.0, 2.0, ratings=20, realism=0.0).entry()}
    head = SimpleNamespace(config=SimpleNamespace(calibration=calibration), fingerprints=torch.zeros(0, 1))
    rated = FilterHeadOutput(torch.tensor([3.0]), torch.tensor([finding]), None, None, None, torch.zeros(1, 8))
    scores, passed, reasons = judge(head, rated, [resolve_modality("oct")])
    assert reasons == ["finding" if finding < 2 else None], "of a head that does not rate it nothing is asked"
    rated.realism = torch.tensor([realism])
    assert judge(head, rated, [resolve_modality("oct")])[0].equal(scores), "it is no part of the score"
    _, passed, reasons = judge(head, rated, [resolve_modality("oct")])
    assert reasons == [reason] and passed.tolist() == [reason is None]


def result(scores: list[float | None], accepted: list[bool | None], rejected=()) -> RoundResult:
    count = len(scores)
    return RoundResult(torch.rand(count, 3, 2, 2), [2 * i for i in range(count)], scores, accepted, list(rejected))


def test_of_the_rounds_the_better_image_stays():
    selection = Selection(3, filtering=True)
    assert selection.wanted == [0, 1, 2]
    selection.add(result([2.0, 1.5, 1.8], [True, False, False], [(1, "finding"), (2, None)]), list(range(6)), 2)
    assert selection.wanted == [1, 2] and selection.seeds == [0, 2, 4]
    # The second round is of images 1 and 2, filled up with image 2 again.
    second = result([1.4, 1.2], [False, True], [(0, "quality"), (2, "quality")])
    selection.add(second, [10, 11, 12, 13, 14, 15], 2)
    assert selection.wanted == [1] and selection.candidates == [2, 4, 4]
    assert selection.scores == [2.0, 1.5, 1.2], "one that is accepted goes before a better one that is not"
    assert selection.seeds == [0, 2, 12] and torch.equal(selection.images[2], second.images[1])
    assert [sum(counts.values()) for counts in selection.rejected] == [0, 2, 0]


def test_without_a_filter_one_round_is_enough():
    selection = Selection(2, filtering=False)
    selection.add(result([None, None], [None, None]), [7, 8, 9], 1)
    assert not selection.wanted and selection.seeds == [7, 9] and selection.rejected == [None, None]


@pytest.mark.parametrize("guided", [True, False])
def test_a_batch_is_cut_with_all_that_belongs_to_it(guided):
    latents, embeds, negative = torch.rand(4, 8, 2, 2), torch.rand(4, 5, 6), torch.rand(4, 5, 6)
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    both = torch.cat([negative, embeds]) if guided else embeds
    batch = Batch(latents, both, negative if guided else None, list(generators))
    batch.select(torch.tensor([1, 3]))
    assert torch.equal(batch.latents, latents[[1, 3]]) and batch.generator == generators[1::2]
    assert torch.equal(batch.prompt_embeds[-2:], embeds[[1, 3]]) and len(batch.prompt_embeds) == 2 + 2 * guided
    assert batch.negative_prompt_embeds is None or torch.equal(batch.prompt_embeds[:2], negative[[1, 3]])


def test_a_seed_is_told_only_if_it_draws_the_noise_again():
    fresh, used = torch.Generator().manual_seed(-1), torch.Generator().manual_seed(3)
    torch.rand(1, generator=used)
    assert redrawing_seed(fresh) == -1 and redrawing_seed(used) is None
    assert prepare_generators(2, [fresh, used])[1] == [-1, None]
    assert prepare_generators(2, fresh)[1] == [None, None], "one generator for two images"
    assert prepare_generators(1, fresh, latents=torch.zeros(1))[1] == [None]
    made, seeds = prepare_generators(2, seeds=[5, 6])
    assert seeds == [5, 6] and [g.initial_seed() for g in made] == [5, 6]


def test_seeds_of_candidates_come_from_the_generator_of_their_image():
    def generators():
        return [torch.Generator().manual_seed(i) for i in range(3)]

    both = draw_seeds([0, 2], 2, generators())
    assert both[2:] == draw_seeds([2], 2, generators()) and len(set(both)) == 4
