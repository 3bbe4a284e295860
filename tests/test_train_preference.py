"""Preference training in miniature: it moves towards what is rewarded, and goes on where it was killed."""

import csv
import json

import pytest
import torch
import train_preference
from PIL import Image
from rewards import advantage, are_copies, centred, finding_reward, optimality, rate, rating_reward, spread
from safetensors.torch import load_file

from minim_pipeline import MinimPipeline
from minim_pipeline.minim_filter import FilterHeadOutput
from minim_pipeline.minim_filter.fingerprints import pack


torch.set_num_threads(1)

PROMPTS = [
    {"Text": "Normal retina.", "modality": "oct", "finding": "normal"},
    {"Text": "Macular edema.", "modality": "oct", "finding": "diabetic macular edema"},
    {"Text": "Effusion.", "modality": "CXR", "finding": "effusion"},
]
SIZES = "--train_batch_size 4 --prompts_per_step 2 --images_per_prompt 4 --timesteps_per_image 1 --watch_images 1"


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def base(make_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "pipeline"
    make_pipeline(filtered=True, num_inference_steps=2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def arguments(base, tmp_path_factory):
    prompts = write_csv(tmp_path_factory.mktemp("prompts") / "prompts.csv", PROMPTS)
    return ["--pretrained_model_name_or_path", str(base), "--prompts", str(prompts), *SIZES.split()]


def unet_of(folder):
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def test_what_is_rewarded_is_learned(make_pipeline):
    """With a reward for small latents, the sampler's become smaller."""
    pipe = make_pipeline(num_inference_steps=2)
    pipe.unet.requires_grad_(True)
    args = train_preference.parse_args(["--prompts", "x", "--output_dir", "x", "--train_batch_size", "16"])
    args.images_per_prompt, args.timesteps_per_image, args.anchor_weight = 16, 2, 0.0
    import copy

    from accelerate import Accelerator
    from diffusers import DDPMScheduler

    trained = pipe.unet
    policies = train_preference.Policies(trained, copy.deepcopy(trained), copy.deepcopy(trained))
    pipe.unet = policies.old
    optimizer = torch.optim.AdamW(trained.parameters(), lr=3e-3, weight_decay=0.0)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    texts = tuple(
        torch.cat([pipe.encode_texts([t], "cpu") for t in some]).detach() for some in (["<oct> a"], ["<oct>"])
    )
    prompts, means = [{"Text": "a", "modality": "oct"}], []
    for step in range(12):
        g = torch.Generator().manual_seed(step)
        drawn = train_preference.sample(pipe, prompts, args, g)
        dark = -drawn.latents.mean((1, 2, 3))
        means.append(-dark.mean().item())
        drawn.reward = centred(dark, drawn.prompt) / dark.std()
        train_preference.update(policies, Accelerator(cpu=True), optimizer, scheduler, drawn, texts, args, step)
        policies.follow(trained, 0.0)
    assert sum(means[-3:]) / 3 < sum(means[:3]) / 3 - 0.02, means


def real_images(folder):
    """Four images and their CSV, for replay."""
    generator, rows = torch.Generator().manual_seed(0), []
    for i in range(4):
        Image.fromarray((torch.rand(64, 64, 3, generator=generator) * 255).byte().numpy()).save(folder / f"r{i}.png")
        rows.append({"path": f"r{i}.png", **PROMPTS[i % 2], "split": "train"})
    return write_csv(folder / "real.csv", rows)


def test_a_run_writes_a_pipeline_and_goes_on_where_it_was_killed(arguments, base, tmp_path, monkeypatch):
    replay = ["--replay", str(real_images(tmp_path)), "--latent_variants", "2", "--caption_variants", "2"]
    arguments = [*arguments, *replay, "--num_inference_steps", "3"]
    more = "--max_train_steps 4 --validation_steps 2 --checkpointing_steps 1 --learning_rate 1e-2 --patience 9".split()
    whole = tmp_path / "whole"
    train_preference.main([*arguments, *more, "--output_dir", str(whole)])
    log = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in log if r["kind"] == "val"] == [0, 2, 4]
    assert {"reward", "spread", "loss", "anchor"} <= set(next(r for r in log if r["kind"] == "train"))
    assert (whole / "samples-4" / "oct.png").is_file()
    pipe = MinimPipeline.from_pretrained(whole / "pipeline")
    assert pipe.filter_head is not None and pipe.config.num_inference_steps == 2

    class Killed(Exception):
        pass

    cut = tmp_path / "cut"
    update, calls = train_preference.update, []

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise Killed
        return update(*args, **kwargs)

    monkeypatch.setattr(train_preference, "update", dies)
    with pytest.raises(Killed):
        train_preference.main([*arguments, *more, "--output_dir", str(cut)])
    monkeypatch.undo()
    with pytest.raises(ValueError, match="holds an earlier run"):
        train_preference.main([*arguments, *more, "--output_dir", str(cut)])
    train_preference.main([*arguments, *more, "--output_dir", str(cut), "--resume_from_checkpoint", "latest"])
    again = [json.loads(line) for line in (cut / "log.jsonl").read_text().splitlines()]
    told = ("step", "kind", "loss", "reward", "score", "replay")
    assert [{k: r.get(k) for k in told} for r in again] == [{k: r.get(k) for k in told} for r in log]


def test_it_stops_when_an_unseen_scorer_no_longer_gains(arguments, base, tmp_path, monkeypatch):
    scores = iter([0.5, 0.6, 0.4, 0.4, 0.4, 0.9])
    monkeypatch.setattr(train_preference.Watch, "look", lambda *a: {"score": next(scores), "right": 0, "spread": 1})
    more = "--max_train_steps 9 --validation_steps 1 --patience 2 --learning_rate 1e-2".split()
    report = train_preference.main([*arguments, *more, "--output_dir", str(tmp_path)])
    assert (report["at_step"], report["steps"]) == (1, 3)
    best, before = unet_of(tmp_path / "best"), unet_of(base)
    assert any(not torch.equal(best[k], before[k]) for k in best)
    assert all(torch.equal(best[k], v) for k, v in unet_of(tmp_path / "pipeline").items())


def test_images_that_grow_alike_are_never_the_best():
    best = train_preference.Best()
    assert best.take(0.5, 1.0, 0, 0.95)
    assert not best.take(0.9, 0.9, 1, 0.95) and best.take(0.6, 0.96, 2, 0.95)


def test_ratings_alone_train_a_lora(base, tmp_path):
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(6):
        Image.fromarray((torch.rand(64, 64, 3, generator=generator) * 255).byte().numpy()).save(tmp_path / f"{i}.png")
        rows.append({"path": f"{i}.png", **PROMPTS[i % 2], "rating": 1 + i % 3, "rater": "ab"[i % 2]})
    ratings = write_csv(tmp_path / "ratings.csv", rows)
    common = ["--pretrained_model_name_or_path", str(base), *SIZES.split(), "--output_dir", str(tmp_path / "run")]
    more = "--max_train_steps 2 --validation_steps 2 --lora_rank 2 --learning_rate 1e-2".split()
    train_preference.main([*common, *more, "--ratings", str(ratings)])
    assert list((tmp_path / "run" / "best").glob("pytorch_lora_weights*"))
    pipe = MinimPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert not any("lora" in name for name, _ in pipe.unet.named_parameters())
    alike = write_csv(tmp_path / "alike.csv", [row | {"rating": 2} for row in rows])
    with pytest.raises(ValueError, match="all 6 ratings are alike"):
        train_preference.main([*common[:-1], str(tmp_path / "other"), "--ratings", str(alike)])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ([], "either --prompts"),
        (["--prompts", "p.csv", "--ratings", "r.csv"], "either --prompts"),
        (["--prompts", "p.csv", "--images_per_prompt", "1"], "at least 2, got 1"),
        (["--prompts", "p.csv", "--beta", "0"], "--beta has to be above 0"),
        (["--prompts", "p.csv", "--drop_text", "2"], "--drop_text has to be between 0 and 1, got 2"),
    ],
)
def test_bad_arguments_are_told_before_any_work(change, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        train_preference.main([*change, "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_pipeline_without_a_filter_and_bad_prompts_are_refused(arguments, base, make_pipeline, tmp_path):
    make_pipeline().save_pretrained(tmp_path / "plain")
    run = ["--output_dir", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="has no filter head to reward with"):
        train_preference.main([*arguments, "--pretrained_model_name_or_path", str(tmp_path / "plain"), *run])
    bad = write_csv(tmp_path / "bad.csv", [{"Text": "A mass.", "modality": "breast_us"}])
    with pytest.raises(ValueError, match="row 2|line 2.*breast_us"):
        train_preference.main([*arguments, "--prompts", str(bad), *run])


def test_rewards(make_pipeline):
    group = torch.tensor([0, 0, 1, 1])
    assert centred(torch.tensor([1.0, 3.0, 10.0, 10.0]), group).tolist() == [-1, 1, 0, 0]
    uneven = advantage(torch.tensor([0.0, 2.0, 0.0, 20.0]), group)
    assert uneven[:2].tolist() == pytest.approx([-0.563, 0.563], abs=0.001) and uneven[2:].tolist() == [-1, 1]
    assert advantage(torch.tensor([5.0, 5.0, 0.0, 2.0]), group).tolist() == [0, 0, -1, 1]
    assert optimality(torch.tensor([-9.0, 0.0, 1.0]), 2.0).tolist() == [0, 0.5, 0.75]
    assert rating_reward([1, 2, 2, 3], ["low", "low", "high", "high"]).tolist() == [1.5, 2.5, 1.5, 2.5]
    latents = torch.zeros(4, 8, 8, 8)
    latents[:] = torch.randn(8, 8, 8, generator=torch.Generator().manual_seed(0))
    latents[1] *= 5
    assert spread(latents, group).abs().max() < 1e-6, "more contrast is not more variety"
    latents[1] = latents[1].flip(-1)
    assert spread(latents, group)[0] == spread(latents, group)[1] > 0.1 and spread(latents, group)[2:].sum() < 1e-6
    assert spread(latents, torch.arange(4)).tolist() == [0] * 4, "an image that is alone"


def test_the_reward_is_of_finding_and_usable_quality(make_pipeline):
    probabilities = torch.tensor([[0.0, 0.5, 0.5], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    rated = FilterHeadOutput(None, None, probabilities[[0, 1, 1, 2]], probabilities[[1, 1, 0, 1]], None, None)
    assert finding_reward(rated).tolist() == [6, 6, 0, -6], "better than usable does not count"

    pipe = make_pipeline(filtered=True)
    latents = torch.randn(5, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    texts, kinds = ["a", "b", "c", "d", "e"], ["oct"] * 5
    rated = rate(pipe, latents, texts, kinds, batch_size=2)
    assert torch.allclose(rated.finding, rate(pipe, latents, texts, kinds).finding, atol=1e-5)
    assert not are_copies(pipe, rated, kinds).any()
    pipe.filter_head.fingerprints = pack(rated.code[:1])
    pipe.filter_head.register_to_config(calibration={"oct": {"score": 1.0, "finding": 1.0, "copy": 0}})
    assert are_copies(pipe, rated, kinds).tolist() == [True, False, False, False, False]

    prompts = [{"Text": "a", "modality": "oct"}]
    args = train_preference.parse_args(["--prompts", "x", "--output_dir", "x"])
    drawn = train_preference.Samples(latents, torch.zeros(5, dtype=torch.long))
    train_preference.score(pipe, drawn, prompts, args)
    assert drawn.reward[0] == -args.bound == drawn.reward.min(), "nothing is worse than a copy"
