"""The filter's trainer in miniature, its rubric, and what it makes of captions and grades."""

import csv
import json

import pytest
import torch
import train_filter
from conftest import MODALITIES, run_script, write_csv
from PIL import Image
from safetensors.torch import load_file

from minim_pipeline.evaluation.classifier import make_resnet
from minim_pipeline.evaluation.judges import Judges, families_of
from minim_pipeline.minim_filter import FilterHead
from minim_pipeline.training.captions import phrase
from minim_pipeline.training.filter import rubric
from minim_pipeline.training.filter.config import FilterConfig
from minim_pipeline.training.filter.data import Pool
from minim_pipeline.training.filter.estimates import draw_trajectories
from minim_pipeline.training.filter.heads import extend_head, new_head
from minim_pipeline.training.filter.lessons import Captions, Lessons, look_alike
from minim_pipeline.training.filter.realism import Counterparts, decode, realism_report, through_autoencoder
from minim_pipeline.training.filter.report import auroc, folds_by_group, other_findings, quality_report, rate
from minim_pipeline.training.log import read_log


torch.set_num_threads(1)

CLASSES = [("fundus", "glaucoma"), ("fundus", "normal"), ("oct", "diabetic macular edema"), ("oct", "normal")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eight images of each of two findings of two modalities, and grades of some of them."""
    folder, rows = tmp_path_factory.mktemp("data"), []
    generator = torch.Generator().manual_seed(0)
    for i in range(32):
        modality, finding = CLASSES[i % 4]
        image = (torch.rand(8, 8, 3, generator=generator) * 255).byte().numpy()
        Image.fromarray(image).resize((64, 64), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
        split, part = ("val", "") if i >= 24 else ("train", "AAB"[i // 4 % 3])
        row = dict(path=f"{i}.png", Text=f"{finding.capitalize()}.", modality=modality, finding=finding, split=split)
        rows.append(row | {"part": part, "group": f"g{i // 2}"})
    graded = [{**row, "rating": 1 + i % 3, "source": "camera"} for i, row in enumerate(rows[:12])]
    write_csv(folder / "ratings.csv", graded)
    return write_csv(folder / "data.csv", rows)


@pytest.fixture(scope="module")
def arguments(data, make_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_pipeline(findings=None).save_pretrained(folder / "pipeline")
    torch.manual_seed(0)
    Judges({"cnn": make_resnet(4, 8)}, CLASSES, 32).save_pretrained(folder / "teacher")
    sizes = "--resolution 64 --min_train 1 --caption_variants 2 --latent_variants 2 --drawn_images 8 "
    sizes += "--draw_batch_size 4 --trajectory_steps 2 --train_batch_size 6 --block_out_channels 8 16 "
    sizes += "--max_train_steps 4 --validation_steps 4 --checkpointing_steps 2 --rating_steps 1 --folds 2"
    models = ["--pretrained_model_name_or_path", str(folder / "pipeline"), "--teacher", str(folder / "teacher")]
    return ["--train_data", str(data), *models, *sizes.split()]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_run_writes_a_head_and_says_how_well_it_rates(arguments, data, tmp_path, precision):
    graded = ["--ratings", str(data.with_name("ratings.csv")), "--mixed_precision", precision]
    report = run_script(train_filter, *arguments, *graded, "--output_dir", str(tmp_path))
    assert report["n"] == 16, "part B is left to the judges"
    assert set(report["finding_val"]) == {"0.0", "1.0", "2.6", "4.0"}
    assert 0 <= report["finding_val"]["1.0"]["auroc"] <= 1 and report["finding_val"]["1.0"]["n"] == 8
    assert report["quality_cross_validated"]["all"]["n"] == 12
    assert json.loads((tmp_path / "report.json").read_text())["steps"] == 4
    head = FilterHead.from_pretrained(tmp_path / "filter_head").eval()
    assert (
        load_file(tmp_path / "filter_head" / "diffusion_pytorch_model.safetensors")["stem.weight"].dtype == torch.half
    )
    latents, ids = torch.randn(2, 8, 8, 8), torch.ones(2, 48, dtype=torch.long)
    assert head(latents, latents, torch.zeros(2), ids).quality.isfinite().all()


def test_a_run_goes_on_as_if_unbroken(arguments, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    report = run_script(train_filter, *arguments, "--output_dir", str(whole))
    resumed = ["--resume_from_checkpoint", str(whole / "checkpoint-2")]
    run_script(train_filter, *arguments, "--output_dir", str(broken), *resumed)
    first, second = (
        load_file(folder / "filter_head" / "diffusion_pytorch_model.safetensors") for folder in (whole, broken)
    )
    assert first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)
    (whole / "materials.safetensors").unlink()
    assert run_script(train_filter, *arguments, "--output_dir", str(whole)) == report, "there is nothing left to do"
    assert not (whole / "materials.safetensors").exists()


def test_realism_is_told_by_noise_level_and_modality(arguments, tmp_path):
    asked = ["--realism_loss_weight", "0.5", "--output_dir", str(tmp_path)]
    report = run_script(train_filter, *arguments, *asked)
    figures = report["realism_val"]
    assert set(figures) == {"0.0", "1.0", "2.6", "4.0"} and figures["0.0"]["n"] == 8
    assert all(
        0 <= found["auroc"] <= 1 and set(found["modalities"]) == {"oct", "fundus"} for found in figures.values()
    )
    log = [record for record in read_log(tmp_path) if record["kind"] == "val"]
    assert {"auroc_realism_0.0", "auroc_realism_4.0", "auroc_realism_oct"} <= log[-1].keys()
    further = ["--pretrained_filter_head", str(tmp_path / "filter_head"), "--output_dir", str(tmp_path / "further")]
    assert "realism_val" in run_script(train_filter, *arguments, *further), "it is learned on"


def test_what_differs_is_learned_as_a_log_ratio_that_shrinks_with_noise(make_pipeline):
    """Latents of unit variance whose means differ by 0.2 in each number."""
    pipe, classes = make_pipeline(), [("oct", "normal")]
    real, generated = torch.randn(2, 64, 8, 8, 8, generator=torch.Generator().manual_seed(0)) + 0.1
    generated -= 0.2
    label = torch.zeros(128, dtype=torch.long)
    both = Counterparts(torch.cat([real, generated]).half(), torch.arange(128) < 64, label, label)
    rows = [{"Text": "normal", "modality": "oct", "finding": "normal"}] * 32
    captions = Captions(rows, classes, phrase(rows, {}, pipe.tokenizer, 1, 0))
    ones = torch.ones(4, dtype=torch.long)
    pool = Pool(torch.zeros(4, 8, 8, 8), ones, ones[:, None].float(), ones > 0, ones * 0, ones * 0)
    options = {"train_data": "", "output_dir": "", "teacher": "", "code_weight": 0.0}
    lessons = Lessons(FilterConfig(**options), pipe, captions, pool, None, both)
    torch.manual_seed(0)
    head = new_head(pipe, (8, 16), rates_realism=True)
    optimizer = torch.optim.AdamW(head.parameters(), 3e-3)
    for step in range(60):
        g = torch.Generator().manual_seed(step)
        lessons.losses(head, lessons.from_counterparts(both, 32, g), g)["realism"].backward()
        optimizer.step()
        optimizer.zero_grad()
    fresh = torch.randn(2, 32, 8, 8, 8, generator=torch.Generator().manual_seed(1)) + 0.1
    report = realism_report(head.eval(), lessons.estimates, rows, fresh[0], fresh[1] - 0.2, 0)
    assert report["0.0"]["auroc"] > 0.95 and report["0.0"]["modalities"] == {"oct": report["0.0"]["auroc"]}
    ratios = [rate(head, x, "realism").mean() for x in (fresh[0], fresh[1] - 0.2)]
    assert ratios[0] > 0.5 and ratios[1] < -0.5
    assert report["0.0"]["auroc"] >= report["4.0"]["auroc"] > 0.5


def test_a_new_head_rates_realism_only_if_asked_to(arguments, tmp_path):
    report = run_script(train_filter, *arguments, "--output_dir", str(tmp_path))
    assert "realism_val" not in report and not (tmp_path / "realism.safetensors").exists()
    assert not FilterHead.from_pretrained(tmp_path / "filter_head").config.rates_realism
    further = ["--pretrained_filter_head", str(tmp_path / "filter_head"), "--output_dir", str(tmp_path / "further")]
    assert "realism_val" not in run_script(train_filter, *arguments, *further), "its config stays"


def test_a_part_for_realism_that_nothing_would_learn_from_is_refused(arguments, tmp_path):
    with pytest.raises(ValueError, match="--realism_part C does nothing without --realism_loss_weight"):
        run_script(train_filter, *arguments, "--realism_part", "C", "--output_dir", str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_real_images_of_part_c_are_learned_from_and_those_of_the_judges_are_not(arguments, data, tmp_path):
    rows = [row | {"part": "C"} if row["path"] == "9.png" else row for row in csv.DictReader(open(data))]
    parts = write_csv(data.with_name("parts.csv"), rows)
    counts = []
    for i, part in enumerate(["C", "none"]):
        more = ["--train_data", str(parts), "--realism_loss_weight", "0.5"]
        more += ["--realism_part", part, "--output_dir", str(tmp_path / str(i))]
        run_script(train_filter, *arguments, *more)
        counts.append(int(load_file(tmp_path / str(i) / "realism.safetensors")["real"].sum()))
    assert counts == [17 * 2, 16 * 2], "two versions of each"


def test_both_sides_of_every_modality_are_drawn_alike():
    real = torch.tensor([True] * 6 + [False] * 2 + [True, True])
    modality = torch.tensor([0] * 5 + [1] + [0, 1] + [2, 2])
    weights = Counterparts(torch.zeros(10), real, modality, modality).weights()
    shares = [weights[(real == side) & (modality == m)].sum().item() for m in (0, 1) for side in (True, False)]
    assert shares == pytest.approx([1] * 4)
    assert weights[-2:].tolist() == [0, 0], "of the third nothing was drawn"


def test_real_images_go_the_way_of_generated_ones(pipeline):
    """A generator that draws what the autoencoder's posterior holds could not be told from them."""
    rows = [{"modality": name} for name in ("oct", "fundus")]
    images = (torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 255).byte()
    pictures = through_autoencoder(pipeline, rows, images, bf16=False, seed=3)
    assert pictures.dtype == torch.uint8 and pictures.shape == images.shape
    posterior = pipeline.vae.encode(images.float() / 127.5 - 1).latent_dist
    latents = posterior.sample(torch.Generator().manual_seed(3)).half()
    assert pictures.equal(decode(pipeline, latents, ["oct", "fundus"], bf16=False))
    assert pictures[0, 0].equal(pictures[0, 1]), "grey, as it is delivered"


def test_a_head_has_two_widths(arguments):
    with pytest.raises(ValueError, match=r"--block_out_channels has to be two numbers, got \[8\]"):
        run_script(train_filter, *arguments, "--block_out_channels", "8", "--output_dir", "none")


def test_a_run_that_diverges_writes_no_head(arguments, tmp_path):
    with pytest.raises(ValueError, match="the training has diverged"):
        run_script(train_filter, *arguments, "--learning_rate", "1e30", "--output_dir", str(tmp_path))
    assert not (tmp_path / "filter_head").exists() and not (tmp_path / "report.json").exists()


def test_grades_that_make_it_diverge_write_no_head(arguments, data, tmp_path):
    """The further steps with people's grades are looked at, too."""
    graded = ["--ratings", str(data.with_name("ratings.csv")), "--rating_steps", "4", "--val_split", "none"]
    with pytest.raises(ValueError, match="the training has diverged"):
        run_script(train_filter, *arguments, *graded, "--rating_learning_rate", "1e30", "--output_dir", str(tmp_path))
    assert not (tmp_path / "filter_head").exists()


def test_val_rows_that_tell_nothing_apart_are_said(arguments, data, tmp_path):
    """One finding of one modality: its caption is wrong for no image. The run goes on without a validation."""
    rows = list(csv.DictReader(open(data)))
    rows = [row for row in rows if row["split"] == "train" or row["finding"] == "glaucoma"]
    few = write_csv(data.with_name("few.csv"), rows)
    with pytest.warns(UserWarning, match="val rows of one finding a modality only"):
        report = run_script(train_filter, *arguments, "--train_data", str(few), "--output_dir", str(tmp_path))
    assert report["steps"] == 4 and "finding_val" not in report


def test_bad_ratings_are_told_before_any_work(arguments, data, tmp_path):
    rows = list(csv.DictReader(open(data.with_name("ratings.csv"))))
    rows[3]["rating"] = "4"
    bad = write_csv(data.with_name("bad.csv"), rows)
    with pytest.raises(ValueError, match="row 4 .*rating has to be 1, 2 or 3, got '4'"):
        run_script(train_filter, *arguments, "--ratings", str(bad), "--output_dir", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_ratings_of_other_parts_alone_are_told_before_any_work(arguments, data, tmp_path):
    rows = [row | {"part": "C"} for row in csv.DictReader(open(data.with_name("ratings.csv")))]
    other = write_csv(data.with_name("other.csv"), rows)
    with pytest.raises(ValueError, match="no ratings of part 'A' to learn from; its parts are 'C'"):
        run_script(train_filter, *arguments, "--ratings", str(other), "--output_dir", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_trajectories_hold_what_the_sampler_held(pipeline):
    rows = [{"Text": "normal", "modality": name} for name in MODALITIES[:3]]
    drawn = draw_trajectories(pipeline, rows, rubric.Sampler(6, 2.0, 3, 1.0), [5, 6, 7], batch_size=2, keep=3)
    assert drawn.noisy.shape == drawn.clean.shape == (3, 3, 8, 8, 8) and drawn.images.shape == (3, 3, 64, 64)
    assert (drawn.angle.diff(dim=1) < 0).all(), "from noise to image"
    again = pipeline(
        "normal", modality="fundus", seeds=[6], num_inference_steps=6, guidance_scale=2.0, output_type="latent"
    )
    torch.testing.assert_close(drawn.final[1], again.images[0].half(), atol=1e-2, rtol=1e-2)
    assert not pipeline.unet._forward_hooks


@pytest.mark.parametrize("kind", rubric.DAMAGES, ids=lambda kind: kind.name)
def test_every_damage_grows_with_its_strength(kind):
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(24, 3, 8, 8, generator=generator)
    images = torch.nn.functional.interpolate(coarse, size=64, mode="bicubic").clamp(0, 1)
    errors = []
    for strength in (0.2, 1.0):
        made = kind.apply(images, torch.full((24,), strength), torch.Generator().manual_seed(1)).clamp(0, 1)
        assert made.shape == images.shape and made.isfinite().all()
        errors.append((made - images).square().mean().item())
    assert 0 < errors[0] < errors[1]


def test_damaged_images_say_what_was_done():
    images = torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    known = {kind.name for kind in rubric.DAMAGES}
    mild, once = rubric.damage(images, 2, torch.Generator().manual_seed(0))
    assert set(once) <= known and mild.min() >= 0 and mild.max() <= 1
    _, twice = rubric.damage(images, 1, torch.Generator().manual_seed(0))
    assert any(" and " in name for name in twice) and {part for n in twice for part in n.split(" and ")} <= known


@pytest.fixture(scope="module")
def captions(make_pipeline):
    rows = [{"Text": f"{finding}", "modality": modality, "finding": finding} for modality, finding in CLASSES * 2]
    return Captions(rows, CLASSES, phrase(rows, {}, make_pipeline().tokenizer, 1, 0))


def test_captions_are_asked_in_the_shares_of_the_rubric(captions):
    shown = torch.full((4000,), 2)
    asked = captions.ask(shown, torch.Generator().manual_seed(0))
    share = torch.bincount(asked, minlength=4) / 4000
    assert share[2].item() == pytest.approx(rubric.CAPTION_SHARES["right"], abs=0.03)
    assert share[3].item() == pytest.approx(rubric.CAPTION_SHARES["finding"], abs=0.03)
    assert share[:2].sum().item() == pytest.approx(rubric.CAPTION_SHARES["modality"], abs=0.03)
    ids = captions.of_classes(torch.tensor([2, 2]), torch.Generator().manual_seed(0))
    assert ids.equal(captions.ids[[2, 2], 0]), "both rows of the class say the same"


def test_grades_of_findings_follow_what_is_shown():
    classes = [("oct", "normal"), ("oct", "no diabetic macular edema"), ("oct", "diabetic macular edema")]
    made = Captions.__new__(Captions)
    made.alike = torch.tensor([[look_alike(a, b) for b in classes] for a in classes], dtype=torch.float32)
    shows = torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [1.0, 0, 0], [0.25, 0, 0.75]])
    grades = made.grades(shows, torch.tensor([0, 1, 2, 2]))
    expected = [[0, 0, 1], [0, 1, 0], [1, 0, 0], [0.25, 0, 0.75]]
    torch.testing.assert_close(grades, torch.tensor(expected, dtype=torch.float32))


def test_findings_of_one_family_of_the_data_look_alike():
    rows = [{"modality": "oct", "finding": f, "family": "macular degeneration"} for f in ("drusen", "neovascular")]
    drusen, neovascular = ("oct", "drusen"), ("oct", "neovascular")
    assert look_alike(drusen, neovascular, families_of(rows)) and not look_alike(drusen, neovascular)
    assert not look_alike(drusen, drusen, families_of(rows)), "what is the same is not merely alike"


def test_every_kind_of_every_modality_is_drawn_alike():
    kind, modality = torch.tensor([0] * 6 + [1] * 2 + [2] * 2), torch.tensor([0] * 5 + [1] + [0, 1, 0, 1])
    weights = Pool(kind, kind, kind, kind, kind, modality).weights()
    shares = [weights[(kind == k) & (modality == m)].sum().item() for k in (0, 1, 2) for m in (0, 1)]
    whole, damaged = 1 - rubric.DAMAGED_SHARE, rubric.DAMAGED_SHARE
    assert shares == pytest.approx([whole, whole, damaged, damaged, whole, whole])


def test_a_head_that_is_trained_on_keeps_its_realism_and_loses_the_threshold(make_pipeline):
    pipe = make_pipeline(realism=True)
    base = pipe.filter_head
    entry = {"score": 1.5, "finding": 1.2, "copy": 3, "ratings": 7, "realism": -0.5}
    base.register_to_config(calibration={"oct": entry})
    head = extend_head(base, pipe)
    assert head.realism[0].weight.equal(base.realism[0].weight)
    assert head.config.calibration["oct"] == {"score": 1.5, "finding": 1.2, "copy": -1, "ratings": 7}


def test_wrong_captions_are_of_the_same_modality_and_another_finding():
    rows = [{"modality": m, "finding": f} for m, f in [*CLASSES, ("cxr", "normal")]]
    assert other_findings(rows, 0) == [1, 0, 3, 2, -1]


def test_folds_keep_groups_together_and_figures_are_right():
    rows = [{"group": f"g{i // 3}", "rating": 1 + i % 3, "source": "ab"[i % 2]} for i in range(30)]
    folds = folds_by_group(rows, 5, 0)
    assert all(len({folds[j] for j in range(i, i + 3)}) == 1 for i in range(0, 30, 3)) and set(folds) == set(range(5))
    grades = torch.tensor([float(row["rating"]) for row in rows])
    assert quality_report(rows, grades)["all"] == {"n": 30, "3_against_1_and_2": 1.0, "3_against_2": 1.0}
    assert auroc(torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([0, 0, 1, 1])) == 0.75
