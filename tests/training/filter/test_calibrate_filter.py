"""Calibration: thresholds, when candidates are dropped, and what the funnel would do with candidates drawn before."""

import csv
import json

import calibrate_filter
import pytest
import torch
from PIL import Image

from minim_pipeline import FilterHead
from minim_pipeline.evaluation.classifier import make_resnet
from minim_pipeline.evaluation.judges import Judges
from minim_pipeline.minim_filter.funnel import plan_stages
from minim_pipeline.training.filter.calibration import plan_prompts
from minim_pipeline.training.filter.candidates import Candidates, choose_stages, draw_candidates, follow, threshold
from minim_pipeline.training.filter.copies import copy_limit, fingerprints, fit_code, poses, veto_report


torch.set_num_threads(1)

KNOWN = ("score", "finding", "copy", "ratings")  # of each modality, whatever the head rates


@pytest.mark.parametrize("guidance_weight", [0.0, 2.0])
def test_the_funnel_gives_back_what_following_its_ratings_says(make_pipeline, guidance_weight):
    pipe = make_pipeline(filtered=True)
    pipe.register_to_config(num_inference_steps=6, guidance_scale=3.0, guidance_interval=[0.0, 0.6])
    pipe.filter_head.register_to_config(stages=((20.0, 0.5), (1.0, 0.0)), guidance_weight=guidance_weight)
    prompts, modalities = ["normal", "cyst", "edema"], ["oct", "cxr", "oct"]
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    seeds = pipe.draw_seeds([0, 1, 2], 4, generators)
    drawn = draw_candidates(
        pipe, [p for p in prompts for _ in range(4)], [m for m in modalities for _ in range(4)], seeds, batch_size=5
    )
    assert drawn.images.shape == (12, 3, 64, 64) and drawn.score.shape == (12, 7) and drawn.levels[-1] == 0
    guided = (drawn.guidance > 0).any(0)
    assert guided.tolist() == [True] * 4 + [False] * 2, "0.6 of six steps"
    score = drawn.score.view(3, 4, -1)
    ranks = drawn.rank(pipe.filter_head).view_as(score)
    chosen, samples = follow(ranks, drawn.levels, guided, plan_stages(pipe.filter_head.config.stages, 4))

    sizes = []
    hook = pipe.unet.register_forward_hook(lambda unet, given, made: sizes.append(len(made[0])))
    out = pipe(prompts, modalities, num_candidates=4, generator=[torch.Generator().manual_seed(i) for i in range(3)])
    hook.remove()
    assert out.seeds == [seeds[4 * i + k] for i, k in enumerate(chosen.tolist())]
    assert out.scores == pytest.approx([score[i, k, -1].item() for i, k in enumerate(chosen)], abs=1e-3)
    assert sum(sizes) == 3 * samples, "and it costs what it says"


def test_candidates_are_followed_by_their_realism_too(make_pipeline):
    pipe = make_pipeline(realism=True)
    pipe.register_to_config(num_inference_steps=6)
    pipe.filter_head.register_to_config(stages=((20.0, 0.5), (1.0, 0.0)), realism_weight=5.0)
    seeds = pipe.draw_seeds([0, 1], 4, torch.Generator().manual_seed(0))
    drawn = draw_candidates(pipe, ["normal"] * 8, ["oct"] * 8, seeds, batch_size=5)
    assert drawn.realism.shape == drawn.score.shape == (8, 7)
    ranks, guided = drawn.rank(pipe.filter_head).view(2, 4, -1), (drawn.guidance > 0).any(0)
    chosen, _ = follow(ranks, drawn.levels, guided, plan_stages(pipe.filter_head.config.stages, 4))
    settings = dict(num_images_per_prompt=2, num_candidates=4, generator=torch.Generator().manual_seed(0))
    out = pipe("normal", "oct", **settings)
    assert out.seeds == [seeds[4 * i + k] for i, k in enumerate(chosen.tolist())]


def test_thresholds_accept_as_much_as_asked_for_but_none_below_the_floor():
    score = finding = torch.linspace(1, 3, 101)
    least = threshold(score, finding, 1.0, 0.7)
    assert (score >= least).double().mean().item() == pytest.approx(0.7, abs=0.01)
    least = threshold(score, finding, 2.5, 0.7)
    accepted = (score >= least) & (finding >= 2.5)
    assert accepted.sum() == (finding >= 2.5).sum(), "the floor decides where it leaves fewer"
    right = score > 2.2
    least = threshold(score, finding, 1.0, 0.7, right, precision=0.9)
    share = right[score >= least].double().mean()
    lower = right[score >= least - 0.03].double().mean()
    assert share >= 0.9 > lower, "the lowest that keeps the precision"
    with pytest.raises(ValueError, match=r"precision of 0.9 with 20 images; the most is 0\.0"):
        threshold(score, finding, 1.0, 0.7, torch.zeros(101, dtype=torch.bool), precision=0.9)


def test_stages_are_where_ratings_foretell_and_within_the_cost():
    torch.manual_seed(0)
    steps, final = 16, torch.rand(400)
    levels = torch.tensor([1e9, 31.7, 13.8, 8.1, 5.4, 3.9, 2.9, 2.2, 1.8, 1.4, 1.1, 0.9, 0.7, 0.6, 0.4, 0.3, 0.0])
    # Before the third step ratings say nothing, from then on everything.
    quality = torch.cat([torch.rand(400, 2), final[:, None].expand(400, steps - 1)], 1) * 2 + 1
    guidance = torch.ones(400, steps) * (torch.arange(steps) < 10)
    empty = torch.empty(0)
    drawn = Candidates(quality, torch.full_like(quality, 3.0), guidance, levels, empty, empty)
    head = FilterHead(enough=(3.0, 3.0))
    stages, plans = choose_stages(drawn, 4, most_cost=2.0, head=head)
    assert stages == [(pytest.approx(20.92, abs=0.01), 0.0)], "all but one are dropped at the third step"
    best = max(plan["gain"] for plan in plans if plan["cost"] <= 2.0)
    assert best == 1.0 and all(plan["gain"] < 0.9 for plan in plans if plan["cost"] < 1.5)
    with pytest.raises(ValueError, match="at most 1.0"):
        choose_stages(drawn, 4, most_cost=1.0, head=head)


def test_the_limit_for_copies_lets_few_strangers_pass():
    strangers = torch.tensor([3, 9] + [20] * 198)
    assert copy_limit(strangers, 0.01) == 19
    assert copy_limit(strangers, 0.005) == 8
    assert copy_limit(torch.zeros(10), 0.01) == -1, "nothing can be told apart"


def test_a_code_of_images_that_hardly_differ_fits_half_precision():
    features = 1 + 1e-7 * torch.randn(6, 3, 16, generator=torch.Generator().manual_seed(0))
    code = fit_code(features, bits=16)
    assert all(parameter.isfinite().all() for parameter in code.parameters())
    assert code.weight.abs().max() > 1


def test_the_code_knows_versions_of_an_image_again_though_they_differ_much():
    """What differs between versions lies in other directions than what differs between images."""
    torch.manual_seed(0)
    images, noise = torch.randn(200, 1, 8), 0.5 * torch.randn(200, 5, 24)
    features = torch.cat([images.expand(-1, 5, -1), noise], 2)  # [200, 5, 32]
    code = fit_code(features[:100], bits=64, directions=8)
    known = fingerprints(code, features[:, 0])
    modalities = ["oct"] * 100 + ["cxr"] * 100
    strangers = torch.cat([torch.randn(200, 8), 0.5 * torch.randn(200, 24)], 1)
    planted = {"another version": features[100:, 1]}
    limits, report = veto_report(code, known, strangers, modalities, planted, ["oct"] * 50 + ["cxr"] * 50, 0.01)
    assert set(limits) == {"oct", "cxr"} and report["false_alarms_val"] <= 0.01
    assert report["missed"]["another version"] <= 0.05, "of images that the code was not fitted on"
    assert report["bytes"] == 200 * 8


def test_poses_are_the_image_mirrored_and_shifted_along_the_diagonals():
    image = (torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 255).byte()
    whole, mirrored, *shifted = poses(image)[0]
    assert torch.equal(whole, image[0]) and torch.equal(mirrored, image[0].flip(-1))
    for pose, (down, right) in zip(shifted, ((-4, -4), (-4, 4), (4, -4), (4, 4)), strict=True):
        inside = pose.roll((-down, -right), (1, 2))[:, 4:-4, 4:-4]
        assert torch.equal(inside, image[0, :, 4:-4, 4:-4])
        assert pose.shape == image.shape[1:]


def test_every_finding_is_asked_for_alike_and_every_candidate_has_a_seed():
    rows = [{"modality": "OCT", "finding": f, "Text": f"{f} {i}"} for f, n in (("a", 5), ("b", 1)) for i in range(n)]
    planned = plan_prompts(rows, count=6, candidates=2, seed=3)
    assert [row["finding"] for row in planned] == ["a", "a", "b", "b"] * 3
    assert len({row["seed"] for row in planned}) == 12


@pytest.fixture
def data(tmp_path):
    rows, generator = [], torch.Generator().manual_seed(0)
    for i in range(16):
        image = (torch.rand(8, 8, 3, generator=generator) * 255).byte().numpy()
        Image.fromarray(image).resize((64, 64), Image.Resampling.BICUBIC).save(tmp_path / f"{i}.png")
        modality, finding = (("oct", "a"), ("oct", "b"), ("cxr", "a"), ("cxr", "unknown"))[i % 4]
        row = {"path": f"{i}.png", "Text": f"{finding} {i}", "modality": modality, "finding": finding}
        rows.append(row | {"split": "val" if i >= 12 else "train", "part": "ABC"[i // 4 % 3]})
    with open(tmp_path / "data.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return tmp_path / "data.csv"


def calibration_options(pipe, data, folder) -> list[str]:
    """A small calibration of the head of `pipe`, from a folder to its `out`."""
    pipe.register_to_config(num_inference_steps=3, findings={"oct": ["a", "b"], "cxr": ["a"]})
    pipe.save_pretrained(folder / "model")
    options = ["--filter_head", folder / "model/filter_head", "--pretrained_model_name_or_path", folder / "model"]
    options += ["--train_data", data, "--part", "all", "--prompts_per_modality", 6, "--candidates", 2]
    options += ["--output_dir", folder / "out", "--finding_floor", 1, "--most_cost", 2, "--copy_false_alarms", 0.5]
    options += ["--code_bits", 16, "--code_versions", 2, "--min_train", 3, "--min_val", 1]
    return [str(option) for option in options]


def test_as_many_real_images_look_real_as_asked_for(make_pipeline, data, tmp_path):
    options = calibration_options(make_pipeline(realism=True), data, tmp_path)
    report = calibrate_filter.main([*options, "--real_acceptance", "0.5"])
    assert set(report["realism"]) == {"oct", "cxr"}
    for name, figures in report["realism"].items():
        assert figures["through_autoencoder"] >= 0.5 and 0 <= figures["as_they_are"] <= 1
        assert report["generated"][name]["accepted"] <= figures["generated"] + 1e-4
    head = FilterHead.from_pretrained(tmp_path / "out/filter_head")
    assert all(set(entry) == {*KNOWN, "realism"} for entry in head.config.calibration.values())
    calibrate_filter.main([*options, "--real_acceptance", "1"])
    every = FilterHead.from_pretrained(tmp_path / "out/filter_head").config.calibration
    assert every["oct"]["realism"] < head.config.calibration["oct"]["realism"]


def test_a_calibrated_head_knows_thresholds_and_training_images(make_pipeline, data, tmp_path):
    options = calibration_options(make_pipeline(filtered=True), data, tmp_path)
    report = calibrate_filter.main(options)
    for figures in report["generated"].values():
        assert figures["accepted"] >= 0.65, "what has the same score is accepted together"
    head = FilterHead.from_pretrained(tmp_path / "out/filter_head")
    assert len(head.fingerprints) == 12 * 6 and head.config.code_size == 16
    assert report["copies"]["missed"]["mirrored"] == 0
    assert set(head.config.calibration) == set(report["generated"])
    assert all(set(entry) == {"score", "finding", "copy", "ratings"} for entry in head.config.calibration.values())
    assert json.loads((tmp_path / "out/report.json").read_text())["stages"]
    for name in ("acceptance.png", "noise.png"):
        assert (tmp_path / "out" / name).stat().st_size > 5000
    torch.manual_seed(0)
    Judges({"cnn": make_resnet(2, 8)}, [("oct", "a"), ("oct", "b")], 32).save_pretrained(tmp_path / "teacher")
    report = calibrate_filter.main([*options, "--teacher", str(tmp_path / "teacher")])
    assert 0 <= report["generated"]["oct"]["right_of_accepted"] <= 1
    assert "right" not in report["generated"]["cxr"], "of which these classifiers know nothing"
    with pytest.raises(ValueError, match="--precision needs --teacher"):
        calibrate_filter.main([*options, "--precision", "0.9"])
