"""A round of self-improvement in miniature, with people's ratings and with a stand-in, killed and gone on with."""

import copy
import csv
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import stand_in
import torch
from conftest import small_classifiers, write_csv
from PIL import Image

from minim_pipeline import FilterHead, MinimPipeline, prompt_text, resolve_modality
from minim_pipeline.evaluation import classifier
from minim_pipeline.evaluation.classifier import make_resnet
from minim_pipeline.evaluation.judges import Judges
from minim_pipeline.evaluation.sampling import draw_latents
from minim_pipeline.evaluation.stand_in import StandIn
from minim_pipeline.minim_filter import FilterHeadOutput
from minim_pipeline.minim_filter.selection import Thresholds
from minim_pipeline.ratings import Rating, RatingStore, image_digest
from minim_pipeline.tokens import tokenize
from minim_pipeline.training.config import parse
from minim_pipeline.training.filter.tune import TuningOptions, tune
from minim_pipeline.training.preference.rewards import overall, rate
from minim_pipeline.training.self_improvement import rounds
from minim_pipeline.training.self_improvement.config import SelfImproveConfig


torch.set_num_threads(1)

FINDINGS = ["normal", "diabetic macular edema"]
CLASSES = [("oct", finding) for finding in FINDINGS]
PREFERENCE = (
    "--max_train_steps 2 --validation_steps 1 --checkpointing_steps 1 --train_batch_size 4 --prompts_per_step 2 "
    "--images_per_prompt 4 --timesteps_per_image 1 --watch_images 1 --learning_rate 1e-3 --patience 9"
)
SIZES = "--candidates 4 --tuning_steps 3 --tuning_batch_size 8 --calibration_images 6 --images_per_finding 4 --pairs 4"


@pytest.fixture(scope="module")
def world(make_pipeline, tmp_path_factory):
    """A pipeline, real images, phrasings, judges, and the arguments that name them."""
    folder = tmp_path_factory.mktemp("world")
    make_pipeline(filtered=True, findings={"oct": FINDINGS}, num_inference_steps=2).save_pretrained(folder / "model")
    generator, rows = torch.Generator().manual_seed(0), []
    for i in range(32):
        image = (torch.rand(8, 8, 3, generator=generator) * 255).byte().numpy()
        Image.fromarray(image).resize((64, 64), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
        split, part = ("val", "") if i >= 20 else ("train", "C")
        row = dict(path=f"{i}.png", Text=f"{FINDINGS[i % 2]}.", modality="OCT", finding=FINDINGS[i % 2], split=split)
        rows.append(row | {"part": part, "group": f"g{i}"})
    write_csv(folder / "data.csv", rows)
    texts = {finding: {"train": [finding, f"{finding} eye"], "new": [f"Shows {finding}"]} for finding in FINDINGS}
    (folder / "captions.json").write_text(json.dumps({"oct": texts}))
    torch.manual_seed(0)
    Judges({"cnn": make_resnet(2, 8)}, CLASSES, 32).save_pretrained(folder / "judges")
    return folder


@pytest.fixture(scope="module")
def rater(world):
    """A stand-in, trained for some steps."""
    few = "--classifier_steps 2 --realism_steps 2 --width 16 --min_train 1 --min_val 1 --images_per_caption 1"
    where = ["--train_data", str(world / "data.csv"), "--pretrained_model_name_or_path", str(world / "model")]
    with small_classifiers():
        report = stand_in.main([*where, *few.split(), "--output_dir", str(world / "stand_in")])
    assert 0 <= report["realism_unseen_halves"]["oct"]["auroc"] <= 1
    return world / "stand_in"


def test_a_stand_in_may_start_from_imagenet(world, tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "PRETRAINED", {"resolution": 32, "train_batch_size": 4})
    few = "--classifier_steps 1 --realism_steps 1 --min_train 1 --min_val 1 --images_per_caption 1"
    where = ["--train_data", str(world / "data.csv"), "--pretrained_model_name_or_path", str(world / "model")]
    kind = ["--architecture", "efficientnet-lite0", "--output_dir", str(tmp_path)]
    assert stand_in.main([*where, *few.split(), *kind])["findings_val"]["n"] == 12
    rater = StandIn.from_pretrained(tmp_path)
    assert [list(part.models) for part in (rater.findings, *rater.realism)] == [["efficientnet-lite0"]] * 3
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    assert set(rater.rate(images, ["oct", "oct"], FINDINGS)) <= {1, 2, 3}


@pytest.fixture(scope="module")
def arguments(world):
    named = ["--pretrained_model_name_or_path", str(world / "model"), "--captions", str(world / "captions.json")]
    named += ["--data", str(world / "data.csv"), "--judges", str(world / "judges")]
    return [*named, *SIZES.split(), "--preference", PREFERENCE]


def improve(call: list[str]) -> dict:
    return rounds.train(parse(SelfImproveConfig, call))


def test_a_round_waits_for_people_and_takes_each_of_their_ratings_once(arguments, tmp_path):
    folder = tmp_path / "round"
    run = [*arguments, "--output_dir", str(folder)]
    assert improve(run) == {"waiting_for": "ratings"}
    images = folder / "candidates"
    candidates = list(csv.DictReader(open(images / "data.csv")))
    assert len(candidates) == 16 and {row["finding"] for row in candidates} == set(FINDINGS)

    # As the rating page stores them: two raters, one of whom changes a word, and a picture of another round.
    store = RatingStore(tmp_path / "ratings.sqlite")
    for i, row in enumerate(candidates):
        for rater in ("ann", "bob"):
            digest = image_digest(images / row["path"])
            store.add(Rating(rater, row["path"], 1 + (i + (rater == "bob")) % 3, row["Text"], "oct", digest=digest))
    store.write_csv(tmp_path / "ratings.csv", {"generated": images})
    rows = list(csv.DictReader(open(tmp_path / "ratings.csv")))
    Image.new("RGB", (64, 64)).save(tmp_path / "other.png")
    rows += [rows[0] | {"rating": "3", "time": "2999"}, rows[0] | {"path": "other.png", "digest": ""}]
    # Of a round before: its picture is gone, and one of this round lies where it lay.
    rows += [
        rows[1] | {"rater": "cid", "digest": "0" * 16},
        rows[2] | {"rater": "cid", "path": "gone.png", "digest": ""},
    ]
    given = write_csv(tmp_path / "given.csv", rows)

    report = improve([*run, "--ratings", str(given)])
    taken = list(csv.DictReader(open(folder / "ratings.csv")))
    assert len(taken) == 32 and len({(row["rater"], row["path"]) for row in taken}) == 32
    assert next(row for row in taken if row["rater"] == rows[0]["rater"])["rating"] == "3", "the later word counts"
    assert report["ratings"]["raters"] == {"ann": 16, "bob": 16} and report["head"]["images"] == 16
    pipe = MinimPipeline.from_pretrained(folder / "pipeline")
    assert pipe.filter_head.config.calibration["oct"]["ratings"] == 16 * report["head"]["taken"]
    comparison = report["comparison"]
    assert comparison["n"] == 16 and comparison["accuracy"]["phrasings"]["new"]["n"] == 8
    low, high = comparison["accuracy"]["interval"]
    assert low <= comparison["accuracy"]["difference"] <= high
    assert "rated_3_by_stand_in" not in comparison
    assert set(comparison["copies"]["latents"]) == {"before", "after"}
    assert (folder / "comparison" / "sheet.png").is_file()
    assert report["minutes"]["all"] >= 0 and set(report["minutes"]) >= {"candidates", "preference", "comparison"}
    other = write_csv(tmp_path / "more.csv", rows[:1])
    with pytest.raises(ValueError, match="has taken its ratings from another file already"):
        improve([*run, "--ratings", str(other)])
    with pytest.raises(ValueError, match="holds a run with other arguments: --seed was 0, now 7"):
        improve([*run, "--ratings", str(given), "--seed", "7"])


def test_killed_at_any_point_a_round_goes_on_to_the_same_end(arguments, rater, tmp_path, monkeypatch):
    def arguments_of(name):
        return [*arguments, "--skip_memorisation", "--stand_in", str(rater), "--output_dir", str(tmp_path / name)]

    whole = improve(arguments_of("whole"))
    assert whole["ratings"]["raters"] == {"stand-in": 16}
    assert whole["comparison"]["rated_3_by_stand_in"]["n"] == 16

    class Killed(Exception):
        pass

    def dying(victim):
        def dies(*_):
            raise Killed

        return {**rounds.STAGES, victim: dies}

    for victim in ("ratings", "head", "pipeline", "comparison"):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(rounds, "STAGES", dying(victim))
            improve(arguments_of("cut"))
    again = improve(arguments_of("cut"))
    for name in ("ratings", "head", "thresholds"):
        assert again[name] == whole[name], name
    assert again["preference"]["best"]["score"] == whole["preference"]["best"]["score"]
    assert again["comparison"]["accuracy"] == whole["comparison"]["accuracy"]
    # A finished round is not done again.
    assert improve(arguments_of("cut")) == again


def test_a_new_threshold_counts_what_does_not_look_real(make_pipeline):
    pipe = make_pipeline(realism=True, findings={"oct": FINDINGS}, num_inference_steps=2)
    prompts = [{"Text": text, "finding": text} for text in FINDINGS]
    config = SimpleNamespace(calibration_images=16, first_seed=0, batch_size=8, acceptance=0.9)
    seeds = [5 * 10**8 + i for i in range(16)]
    asked = [prompts[i % len(prompts)]["Text"] for i in range(16)]
    drawn = draw_latents(pipe, asked, ["oct"] * 16, seeds, 8)
    realism = rate(pipe, drawn, asked, ["oct"] * 16).realism
    before = Thresholds(finding=1.0, realism=realism.median().item())
    least, accepted = rounds.find_threshold(config, pipe, "oct", prompts, before)
    assert 0.3 <= accepted <= 0.6, "half of them look too little real, whatever their score"
    pipe.filter_head.register_to_config(calibration={"oct": replace(before, score=least).entry()})
    output = pipe(asked, modality="oct", seeds=seeds, num_candidates=1)
    # Two images lie on the thresholds.
    assert sum(output.accepted) / 16 == pytest.approx(accepted, abs=2 / 16)


def test_overall_is_the_worse_of_both_grades():
    sure = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    rated = FilterHeadOutput(None, None, sure[[0, 1, 0]], sure[[0, 0, 2]], None, None)
    assert overall(rated).argmax(1).tolist() == [2, 1, 0]


def test_a_head_learns_what_raters_say_of_the_picture_and_keeps_the_finding(make_pipeline):
    pipe = make_pipeline(filtered=True)
    names = ("in_channels", "sample_size", "latent_scale", "vocab_size", "pad_token_id", "layers_per_block")
    torch.manual_seed(0)
    same = {name: pipe.filter_head.config[name] for name in names}
    pipe.filter_head = FilterHead(**same, block_out_channels=(16, 16), norm_num_groups=4, text_width=32)
    options = TuningOptions(tuning_steps=25, tuning_learning_rate=5e-3, tuning_batch_size=32)
    usual = options.tuning_anchor
    latents = torch.randn(60, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    latents[::2] *= 0.3  # what the raters like
    rows = [
        {"path": f"{i}", "Text": "cyst", "modality": "oct", "rating": "31"[i % 2], "rater": "ann"} for i in range(60)
    ]

    def moved(anchor):
        """How far the grades of quality and of the finding went; and the report."""
        options.tuning_anchor = anchor
        old = copy.deepcopy(pipe.filter_head).eval()
        head, report = tune(pipe, rows, latents, options)
        ids = tokenize(pipe.tokenizer, [prompt_text("cyst", resolve_modality("oct"), pipe.tokenizer)])
        ids = ids[:, : old.config.max_length].expand(60, -1)
        with torch.no_grad():
            was, now = (some(latents, latents, torch.zeros(60), ids) for some in (old, head))
        return (now.quality - was.quality).abs().mean(), (now.finding - was.finding).abs().mean(), report

    quality, finding, report = moved(1.0)
    assert report["taken"] and report["after"]["log_loss"] < report["before"]["log_loss"]
    assert report["after"]["auroc_good"] > 0.9
    assert finding < quality / 2, "what can be the picture's fault is not the finding's"
    assert finding < moved(0.0)[1] / 2
    _, least, report = moved(usual)
    assert report["taken"] and least < finding / 2, "by default, it hardly moves"
    with pytest.raises(ValueError, match="ratings of 4 images; at least 10"):
        tune(pipe, rows[:4], latents[:4], options)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (["--preference", "--anchor_weight -1"], "--anchor_weight has to be at least 0"),
        (["--data", "nowhere.csv"], "--data has to be a file, and 'nowhere.csv' is none"),
        (["--judges", "nowhere"], "--judges has to be a folder, and 'nowhere' is none"),
        (["--preference", "--replay nowhere.csv"], "--replay has to be a file, and 'nowhere.csv' is none"),
        (["--candidates", "0"], "--candidates has to be at least 1, got 0"),
        (["--acceptance", "2"], "--acceptance has to be above 0 and at most 1, got 2.0"),
        (["--kept_out", "1"], "--kept_out has to be between 0 and 1"),
    ],
)
def test_bad_arguments_are_told_before_any_work(arguments, change, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        improve([*arguments, *change, "--output_dir", str(tmp_path / "round")])
    assert not (tmp_path / "round").exists()


def test_ratings_of_other_images_only_are_refused(arguments, tmp_path):
    folder = tmp_path / "round"
    improve([*arguments, "--output_dir", str(folder)])
    Image.new("RGB", (64, 64)).save(tmp_path / "other.png")
    given = write_csv(tmp_path / "x.csv", [{"path": "other.png", "Text": "a", "modality": "OCT", "rating": 2}])
    with pytest.raises(ValueError, match="none of 1 ratings is of an image in"):
        improve([*arguments, "--output_dir", str(folder), "--ratings", str(given)])
    assert not (folder / "ratings.csv").exists()
