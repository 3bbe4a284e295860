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
from minim_pipeline.evaluation.judges import Judges
from minim_pipeline.minim_filter import FilterHead
from minim_pipeline.training.captions import phrase
from minim_pipeline.training.filter import rubric
from minim_pipeline.training.filter.data import Pool
from minim_pipeline.training.filter.estimates import draw_trajectories
from minim_pipeline.training.filter.lessons import Captions, look_alike
from minim_pipeline.training.filter.report import auroc, folds_by_group, other_findings, quality_report


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


def test_every_kind_of_every_modality_is_drawn_alike():
    kind, modality = torch.tensor([0] * 6 + [1] * 2 + [2] * 2), torch.tensor([0] * 5 + [1] + [0, 1, 0, 1])
    weights = Pool(kind, kind, kind, kind, kind, modality).weights()
    shares = [weights[(kind == k) & (modality == m)].sum().item() for k in (0, 1, 2) for m in (0, 1)]
    whole, damaged = 1 - rubric.DAMAGED_SHARE, rubric.DAMAGED_SHARE
    assert shares == pytest.approx([whole, whole, damaged, damaged, whole, whole])


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
