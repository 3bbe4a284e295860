"""Preference training in miniature: it moves towards what is rewarded, and goes on where it was killed."""

import copy
import json
import os
import shutil
import signal
from unittest.mock import Mock

import pytest
import torch
import train_preference
from accelerate import Accelerator
from conftest import write_csv
from diffusers import DDPMScheduler
from PIL import Image
from safetensors.torch import load_file

from minim_pipeline import FilterHead, MinimPipeline
from minim_pipeline.minim_filter import FilterHeadOutput
from minim_pipeline.minim_filter.fingerprints import pack
from minim_pipeline.training.config import parse
from minim_pipeline.training.preference import trainer
from minim_pipeline.training.preference.config import PreferenceConfig
from minim_pipeline.training.preference.rewards import are_copies, finding_reward, rate, spread
from minim_pipeline.training.preference.sampling import Samples, encode_prompts, sample, score
from minim_pipeline.training.preference.update import Objective, update


torch.set_num_threads(1)

PROMPTS = [
    {"Text": "Normal retina.", "modality": "oct", "finding": "normal"},
    {"Text": "Macular edema.", "modality": "oct", "finding": "diabetic macular edema"},
    {"Text": "Effusion.", "modality": "CXR", "finding": "effusion"},
]
SIZES = "--train_batch_size 4 --prompts_per_step 2 --images_per_prompt 4 --timesteps_per_image 1 --watch_images 1"


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


def test_what_is_rewarded_is_learned_as_far_as_the_anchor_lets_it(make_pipeline):
    """The head's rating of the U-Net's estimates rises above a run in the same noise that an anchor holds back."""
    rewards, distances = {}, {}
    for anchor, until in ((0.0, 1.0), (1e5, 1.0), (0.0, 0.25)):
        pipe = make_pipeline(filtered=True, num_inference_steps=2)
        names = ("in_channels", "sample_size", "latent_scale", "vocab_size", "pad_token_id", "layers_per_block")
        torch.manual_seed(0)
        same = {name: pipe.filter_head.config[name] for name in names}
        pipe.filter_head = FilterHead(**same, block_out_channels=(16, 16), norm_num_groups=4).eval()
        few = "--train_batch_size 8 --prompts_per_step 2 --images_per_prompt 4 --timesteps_per_image 2 --enough 6"
        config = parse(PreferenceConfig, ["--prompts", "x", "--output_dir", "x", *few.split()])
        config.anchor_weight, config.reward_until, config.drop_text = anchor, until, 0.0
        prompts = [{"Text": text, "modality": "oct"} for text in ("a", "b")]
        texts = encode_prompts(pipe, prompts)
        reference = copy.deepcopy(pipe.unet).requires_grad_(False)
        scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        objective = Objective(pipe.filter_head.requires_grad_(False), reference, scheduler, config)
        objective.losses = Mock(wraps=objective.losses)
        optimizer = torch.optim.AdamW(pipe.unet.parameters(), lr=2e-3, weight_decay=0.0)
        mine, far = rewards.setdefault((anchor, until), []), distances.setdefault((anchor, until), [])
        for step in range(8):
            drawn = sample(pipe, prompts, config, torch.Generator().manual_seed(0))
            assert drawn.prompt.tolist() in ([0] * 4 + [1] * 4, [1] * 4 + [0] * 4)
            score(pipe, drawn, prompts)
            pipe.unet.requires_grad_(True)
            told = update(pipe.unet, objective, Accelerator(cpu=True), optimizer, drawn, texts, step)
            mine.append(told["estimated_reward"])
            far.append(told["anchor"])
        levels = torch.cat([call.args[2] for call in objective.losses.call_args_list])
        assert 0.5 * until < levels.max() / scheduler.config.num_train_timesteps < until
    free, held, _ = (sum(told[-3:]) / 3 for told in rewards.values())
    assert free > held + 0.1, rewards
    free, held, _ = (told[-1] for told in distances.values())
    assert free > 3 * held, distances


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
    assert {"reward", "spread", "loss", "anchor", "diversity", "replay"} <= set(
        next(r for r in log if r["kind"] == "train")
    )
    assert (whole / "samples-4" / "oct.png").is_file()
    pipe = MinimPipeline.from_pretrained(whole / "pipeline")
    assert pipe.filter_head is not None and pipe.config.num_inference_steps == 2

    class Killed(Exception):
        pass

    cut = tmp_path / "cut"
    calls = []

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise Killed
        return update(*args, **kwargs)

    monkeypatch.setattr(trainer, "update", dies)
    with pytest.raises(Killed):
        train_preference.main([*arguments, *more, "--output_dir", str(cut)])
    monkeypatch.undo()
    with pytest.raises(ValueError, match="--seed was 0, now 1"):
        train_preference.main([*arguments, *more, "--output_dir", str(cut), "--seed", "1"])
    train_preference.main([*arguments, *more, "--output_dir", str(cut)])
    again = [json.loads(line) for line in (cut / "log.jsonl").read_text().splitlines()]
    told = ("step", "kind", "loss", "reward", "score", "replay")
    assert [{k: r.get(k) for k in told} for r in again] == [{k: r.get(k) for k in told} for r in log]


def test_it_stops_when_an_unseen_scorer_no_longer_gains(arguments, base, tmp_path, monkeypatch):
    scores = iter([0.5, 0.6, 0.4, 0.4, 0.4, 0.9])
    monkeypatch.setattr(trainer.Watch, "look", lambda *a: {"score": next(scores), "right": 0, "spread": 1})
    more = "--max_train_steps 9 --validation_steps 1 --patience 2 --learning_rate 1e-2 --guidance_scale 1.5".split()
    report = train_preference.main([*arguments, *more, "--output_dir", str(tmp_path)])
    assert (report["at_step"], report["steps"]) == (1, 3)
    best, before = unet_of(tmp_path / "best-1"), unet_of(base)
    assert any(not torch.equal(best[k], before[k]) for k in best)
    assert all(torch.equal(best[k], v) for k, v in unet_of(tmp_path / "pipeline").items())
    assert MinimPipeline.load_config(tmp_path / "pipeline")["guidance_scale"] == 1.5


def test_weights_of_the_best_outlive_a_kill_while_others_are_written(arguments, base, tmp_path, monkeypatch):
    """A better look is killed before its checkpoint; gone on with, it is worse: the earlier best is still there."""
    scores = {0: 0.5, 1: 0.6, 2: 0.7}

    def look(self, pipe, folder, batch_size):
        return {"score": scores[int(folder.name.split("-")[1])], "right": 0, "spread": 1}

    class Killed(Exception):
        pass

    save = trainer.save_weights

    def dies(pipe, lora, folder):
        if folder.name == "best-2":
            raise Killed
        save(pipe, lora, folder)

    monkeypatch.setattr(trainer.Watch, "look", look)
    run = "--max_train_steps 2 --validation_steps 1 --checkpointing_steps 1 --learning_rate 1e-2".split()
    run = [*arguments, *run, "--output_dir", str(tmp_path)]
    monkeypatch.setattr(trainer, "save_weights", dies)
    with pytest.raises(Killed):
        train_preference.main(run)
    monkeypatch.setattr(trainer, "save_weights", save)
    scores[2] = 0.1
    assert train_preference.main([*run, "--resume_from_checkpoint", "latest"])["at_step"] == 1
    assert [folder.name for folder in tmp_path.glob("best-*")] == ["best-1"]
    best = unet_of(tmp_path / "best-1")
    assert all(torch.equal(best[k], v) for k, v in unet_of(tmp_path / "pipeline").items())


def test_a_run_that_diverges_writes_nothing_of_it(arguments, tmp_path):
    run = "--max_train_steps 3 --validation_steps 9 --lr_warmup_steps 1 --learning_rate 1e20".split()
    with pytest.raises(ValueError, match="the training has diverged|are not finite"):
        train_preference.main([*arguments, *run, "--output_dir", str(tmp_path)])
    assert not (tmp_path / "pipeline").exists()
    assert all(t.isfinite().all() for file in tmp_path.rglob("*.safetensors") for t in load_file(file).values())


def test_sigterm_leaves_a_checkpoint_to_go_on_from(arguments, tmp_path, monkeypatch):
    run = [*arguments, *"--max_train_steps 3 --validation_steps 2 --learning_rate 1e-2".split()]
    train_preference.main([*run, "--output_dir", str(tmp_path / "whole")])

    def signalled(*given, **more):
        os.kill(os.getpid(), signal.SIGTERM)
        return update(*given, **more)

    again = ["--output_dir", str(tmp_path / "cut"), "--resume_from_checkpoint", "latest"]
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "update", signalled)
        for steps in (1, 2, 3):  # three times in a row, the second where a look is due, the third after the last step
            with pytest.raises(SystemExit, match="143"):
                train_preference.main([*run, *again])
            assert (tmp_path / "cut" / f"checkpoint-{steps}").is_dir()
    assert train_preference.main([*run, *again])["steps"] == 3
    whole, cut = (unet_of(tmp_path / name / "pipeline") for name in ("whole", "cut"))
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    assert train_preference.main([*run, *again])["steps"] == 3, "finished already"


def test_every_finding_is_drawn_equally_often(make_pipeline):
    pipe = make_pipeline(num_inference_steps=1)
    prompts = [{"Text": f"a {i}", "modality": "oct", "finding": "a"} for i in range(9)]
    prompts += [{"Text": "b", "modality": "oct", "finding": "b"}]
    few = "--prompts_per_step 8 --images_per_prompt 2 --train_batch_size 2".split()
    config = parse(PreferenceConfig, ["--prompts", "x", "--output_dir", "x", *few])
    drawn = sample(pipe, prompts, config, torch.Generator().manual_seed(0)).prompt.tolist()
    assert sum(i == 9 for i in drawn) == 8 and len(set(drawn)) == 5
    assert drawn[::2] == drawn[1::2], "the images of a prompt one after the other"


def test_images_that_grow_alike_are_never_the_best():
    best = trainer.BestLook()
    assert best.take_look(0.5, 1.0, 0, 0.95)
    assert not best.take_look(0.9, 0.9, 1, 0.95) and best.take_look(0.6, 0.96, 2, 0.95)


def test_ratings_teach_the_head_and_a_lora(base, tmp_path):
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(12):
        Image.fromarray((torch.rand(64, 64, 3, generator=generator) * 255).byte().numpy()).save(tmp_path / f"{i}.png")
        rows.append({"path": f"{i}.png", **PROMPTS[i % 2], "rating": 1 + i % 3, "rater": "ab"[i % 2]})
    ratings = write_csv(tmp_path / "ratings.csv", rows)
    run = ["--pretrained_model_name_or_path", str(base), *SIZES.split(), "--output_dir", str(tmp_path / "run")]
    run += ["--ratings", str(ratings)]
    more = "--max_train_steps 2 --validation_steps 1 --checkpointing_steps 1 --lora_rank 2 --learning_rate 1e-2"
    train_preference.main([*run, *more.split(), "--tuning_steps", "2", "--tuning_batch_size", "4", "--patience", "9"])
    assert list((tmp_path / "run").glob("best-*/pytorch_lora_weights*"))
    pipe = MinimPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert not any("lora" in name for name, _ in pipe.unet.named_parameters())
    learned = FilterHead.from_pretrained(tmp_path / "run" / "filter_head")
    assert all(torch.equal(a, b) for a, b in zip(learned.parameters(), pipe.filter_head.parameters(), strict=True))
    again = [*more.replace("steps 2", "steps 3", 1).split(), "--tuning_steps", "2", "--tuning_batch_size", "4"]
    report = train_preference.main([*run, *again, "--patience", "9", "--resume_from_checkpoint", "latest"])
    assert report["steps"] == 3, "the head that was tuned is read again"
    other = write_csv(tmp_path / "other.csv", [row | {"rating": 2} for row in rows])
    run[-1] = str(other)
    left_behind = ("log.jsonl", "finished.json")
    for left in (*(tmp_path / "run").glob("checkpoint-*"), *(tmp_path / "run" / name for name in left_behind)):
        shutil.rmtree(left) if left.is_dir() else left.unlink()  # killed before its first checkpoint
    with pytest.raises(ValueError, match="has learned from other ratings than"):
        train_preference.main([*run, *again, "--patience", "9"])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ([], "either --prompts"),
        (["--prompts", "p.csv", "--ratings", "r.csv"], "either --prompts"),
        (["--prompts", "p.csv", "--images_per_prompt", "1"], "at least 2, got 1"),
        (["--prompts", "p.csv", "--anchor_weight", "-1"], "--anchor_weight has to be at least 0, got -1"),
        (["--prompts", "p.csv", "--train_batch_size", "12"], r"multiple of --images_per_prompt \(8\).*got 12"),
        (["--prompts", "p.csv", "--guidance_scale", "-1"], "--guidance_scale has to be at least 0, got -1"),
        (["--prompts", "p.csv", "--reward_until", "2"], "--reward_until has to be above 0 and at most 1, got 2"),
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


def test_variety_is_not_contrast():
    group = torch.tensor([0, 0, 1, 1])
    latents = torch.randn(8, 8, 8, generator=torch.Generator().manual_seed(0)).repeat(4, 1, 1, 1)
    latents[1] *= 5
    assert spread(latents, group).abs().max() < 1e-6
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

    drawn = Samples(latents, torch.zeros(5, dtype=torch.long))
    figures = score(pipe, drawn, [{"Text": "a", "modality": "oct"}])
    assert drawn.counts.tolist() == [False] + [True] * 4, "a copy of a training image is not rewarded"
    assert figures["reward"].shape == figures["spread"].shape == (5,)
