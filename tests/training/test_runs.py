"""A run that diverges, is stopped, cut off, finished, or short of room: what it leaves, and how it goes on."""

import argparse
import csv
import json
import os
import resource
import shutil
import signal
import warnings
from pathlib import Path

import pytest
import torch
import train_autoencoder
import train_text_to_image
from conftest import run_script as run
from PIL import Image
from safetensors.torch import load_file

from minim_pipeline.disk import save_model
from minim_pipeline.finite import FiniteLoss, check_weights
from minim_pipeline.locking import locked
from minim_pipeline.provenance import save_png
from minim_pipeline.training import autoencoder, checkpoints, rows
from minim_pipeline.training.schedule import Schedule
from minim_pipeline.training.unet import validation


torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Eight OCTs to train on; two OCTs, a chest X-ray and a breast ultrasound to validate on."""
    folder, rows = tmp_path_factory.mktemp("data"), []
    for i in range(12):
        grey = torch.rand(8, 8, generator=torch.Generator().manual_seed(i))
        Image.fromarray((grey * 255).byte().numpy()).resize((64, 64)).convert("RGB").save(folder / f"{i}.png")
        modality = {10: "CXR", 11: "BreastUS"}.get(i, "OCT")
        rows.append(dict(path=f"{i}.png", Text=f"Case {i}.", modality=modality, split="train" if i < 8 else "val"))
    with open(folder / "data.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder / "data.csv"


@pytest.fixture(scope="module")
def decoder_run(data) -> list:
    """Six steps of an autoencoder, with a checkpoint after every second."""
    sizes = ["--train_data", data, "--preset", "tiny", "--resolution", 64, "--crop", 32, "--train_batch_size", 2]
    return [*sizes, "--max_train_steps", 6, "--checkpointing_steps", 2, "--validation_steps", 2]


@pytest.fixture(scope="module")
def whole(decoder_run, tmp_path_factory) -> Path:
    """What `decoder_run` leaves."""
    output = tmp_path_factory.mktemp("whole")
    run(train_autoencoder, *decoder_run, "--output_dir", output)
    return output


@pytest.fixture(scope="module")
def unet_run(data, pipeline_dir) -> list:
    """Four steps from a pipeline that knows five modalities."""
    sizes = ["--pretrained_model_name_or_path", pipeline_dir, "--train_data", data, "--resolution", 64]
    sizes += ["--train_batch_size", 2, "--latent_variants", 1, "--caption_variants", 1, "--validation_samples", 1]
    return [
        *sizes,
        "--num_inference_steps",
        1,
        "--max_train_steps",
        4,
        "--lr_warmup_steps",
        1,
        "--learning_rate",
        1e-3,
    ]


def weights(output: Path, name: str = "vae") -> dict[str, torch.Tensor]:
    return load_file(output / name / "diffusion_pytorch_model.safetensors")


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def log_of(output: Path) -> list[tuple]:
    records = map(json.loads, (output / "log.jsonl").read_text().splitlines())
    return [(record["kind"], record["step"]) for record in records]


@pytest.mark.parametrize("more", [["--val_split", "none"], []])
def test_a_diverged_unet_is_told_and_nothing_is_written_of_it(unet_run, tmp_path, more):
    with pytest.raises(ValueError, match="training has diverged, and nothing is written of it"):
        run(train_text_to_image, *unet_run, "--learning_rate", 1e8, *more, "--output_dir", tmp_path)
    assert not (tmp_path / "pipeline").exists() and not (tmp_path / "finished.json").exists()
    for file in tmp_path.glob("*/**/*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values()), file


def test_a_diverged_autoencoder_is_told_and_nothing_is_written_of_it(decoder_run, tmp_path):
    with pytest.raises(ValueError, match="training has diverged"):
        run(train_autoencoder, *decoder_run, "--learning_rate", 1e18, "--lr_warmup_steps", 1, "--output_dir", tmp_path)
    assert not (tmp_path / "vae").exists()
    assert all(t.isfinite().all() for file in tmp_path.rglob("model.safetensors") for t in load_file(file).values())


def test_the_first_bad_loss_is_told_whenever_it_is_asked_for():
    losses = FiniteLoss()
    losses.add(torch.tensor(1.0), 1)
    for step, loss in ((2, float("nan")), (3, 2.0)):
        with pytest.raises(ValueError, match="The loss is nan at step 2"):
            losses.add(torch.tensor(loss), step)
    with pytest.raises(ValueError, match="The loss is nan at step 2"):
        losses.check()


def test_val_rows_that_cannot_be_judged_are_left_out_and_named(unet_run, tmp_path):
    """The base has learned chest X-rays, so their loss is told; breast ultrasound is known to nobody here."""
    with pytest.warns(UserWarning, match="no train rows of") as caught:
        run(train_text_to_image, *unet_run, "--output_dir", tmp_path)
    told = " ".join(str(warning.message) for warning in caught)
    assert "'breast_us' (1 val rows): val rows are left out" in told
    assert "'cxr' (1 val rows): copies of train images are not looked for" in told
    val = [r for r in map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines()) if r["kind"] == "val"]
    assert {"loss_oct", "loss_cxr", "memorised"} <= val[-1].keys() and "loss_breast_us" not in val[-1]
    assert (tmp_path / "pipeline" / "model_index.json").is_file()


def test_no_loss_is_told_where_none_was_measured(unet_run, tmp_path):
    run(train_text_to_image, *unet_run, "--output_dir", tmp_path, "--val_split", "none")
    last = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()][-1]
    assert last["kind"] == "best" and last["at_step"] == last["step"] and "loss" not in last


def test_a_validation_that_fails_costs_no_step(unet_run, tmp_path, monkeypatch):
    more = ["--validation_steps", 2, "--checkpointing_steps", 2]
    run(train_text_to_image, *unet_run, *more, "--output_dir", tmp_path / "whole")

    def fails(*arguments):
        raise RuntimeError("validation")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="validation"):
        patch.setattr(validation, "draw_samples", fails)
        run(train_text_to_image, *unet_run, *more, "--output_dir", tmp_path / "cut")
    assert [p.name for p in checkpoints.list_checkpoints(tmp_path / "cut")] == ["checkpoint-2"]
    run(train_text_to_image, *unet_run, *more, "--output_dir", tmp_path / "cut", "--resume_from_checkpoint", "latest")
    for name in ("best/unet", "pipeline/unet"):
        assert same(weights(tmp_path / "whole", name), weights(tmp_path / "cut", name))
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole"), "what was not validated is, before it goes on"


def test_sigterm_ends_the_step_and_leaves_a_checkpoint(whole, decoder_run, tmp_path, monkeypatch, capsys):
    calls, before = [], signal.getsignal(signal.SIGTERM)

    def signalled(*arguments):
        calls.append(os.kill(os.getpid(), signal.SIGTERM) if len(calls) == 2 else None)
        return draw_batch(*arguments)

    draw_batch = autoencoder.draw_batch
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(autoencoder, "draw_batch", signalled)
        run(train_autoencoder, *decoder_run, "--output_dir", tmp_path)
    assert ended.value.code == 143 and len(calls) == 3, "the step is finished, and no other begins"
    assert "Stopped by SIGTERM after step 3" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before
    assert (tmp_path / "checkpoint-3").is_dir() and not (tmp_path / "vae").exists()
    run(train_autoencoder, *decoder_run, "--output_dir", tmp_path, "--resume_from_checkpoint", "latest")
    assert same(weights(whole), weights(tmp_path))
    assert log_of(tmp_path) == log_of(whole)


def test_a_finished_run_is_left_alone(whole, decoder_run, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    for checkpoint in checkpoints.list_checkpoints(tmp_path / "run"):
        shutil.rmtree(checkpoint)
    made = (tmp_path / "run" / "vae" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    again = ["--output_dir", tmp_path / "run", "--resume_from_checkpoint", "latest"]
    run(train_autoencoder, *decoder_run, *again)
    assert "a finished run of 6 steps: there is nothing left to do" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--seed was 0, now 1"):
        run(train_autoencoder, *decoder_run, *again, "--seed", 1)
    with pytest.raises(ValueError, match="a finished run and no checkpoint to go on from"):
        run(train_autoencoder, *decoder_run, *again, "--max_train_steps", 8)
    assert (tmp_path / "run" / "vae" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns == made
    assert log_of(tmp_path / "run") == log_of(whole)


def test_two_runs_do_not_share_a_folder(decoder_run, tmp_path):
    with locked(tmp_path / "run"), pytest.raises(ValueError, match="another run is writing to .*run now"):
        run(train_autoencoder, *decoder_run, "--output_dir", tmp_path / "run", "--resume_from_checkpoint", "latest")
    assert not (tmp_path / "run").exists()


def test_a_finished_run_goes_on_if_more_is_asked_for(whole, decoder_run, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    again = ["--output_dir", tmp_path / "run", "--resume_from_checkpoint", "latest", "--max_train_steps", 8]
    run(train_autoencoder, *decoder_run, *again)
    assert json.loads((tmp_path / "run" / "finished.json").read_text())["step"] == 8
    assert [kind for kind, _ in log_of(tmp_path / "run")].count("final") == 1


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "custom_checkpoint_0.pkl"])
def test_of_a_broken_checkpoint_the_file_is_named_and_an_older_one_is_taken(
    whole, decoder_run, tmp_path, capsys, name
):
    shutil.copytree(whole, tmp_path / "run", ignore=shutil.ignore_patterns("vae", "finished.json", "checkpoint-6"))
    shutil.copytree(whole / "checkpoint-6", tmp_path / "run" / "checkpoint-5")  # as if killed after step 5
    file = tmp_path / "run" / "checkpoint-5" / name
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(ValueError, match=rf"checkpoint-5 is broken: {name}: .*Whole ones beside it: checkpoint-4\."):
        run(train_autoencoder, *decoder_run, "--output_dir", tmp_path / "x", "--resume_from_checkpoint", file.parent)
    run(train_autoencoder, *decoder_run, "--output_dir", tmp_path / "run", "--resume_from_checkpoint", "latest")
    told = capsys.readouterr().out
    assert f"{file.parent} ({name}: " in told and "goes on from" in told and "checkpoint-4, which is whole" in told
    assert same(weights(whole), weights(tmp_path / "run"))


def test_what_was_stopped_before_its_first_checkpoint_begins_anew_with_the_same_options_only(
    whole, decoder_run, tmp_path
):
    for name in ("arguments.json", "log.jsonl"):
        shutil.copy(whole / name, tmp_path / name)
    before = {name: (tmp_path / name).read_text() for name in ("arguments.json", "log.jsonl")}
    with pytest.raises(ValueError, match="is of a run with other arguments: --seed was 0, now 1"):
        run(train_autoencoder, *decoder_run, "--output_dir", tmp_path, "--seed", 1)
    assert before == {name: (tmp_path / name).read_text() for name in before}
    run(train_autoencoder, *decoder_run, "--output_dir", tmp_path)
    assert same(weights(whole), weights(tmp_path)) and log_of(tmp_path) == log_of(whole)


def test_where_every_checkpoint_is_broken_nothing_begins_anew(whole, decoder_run, tmp_path):
    shutil.copytree(whole, tmp_path / "run", ignore=shutil.ignore_patterns("vae", "finished.json"))
    for checkpoint in checkpoints.list_checkpoints(tmp_path / "run"):
        os.truncate(checkpoint / "optimizer.bin", 10)
    with pytest.raises(ValueError, match="No checkpoint is whole: .*checkpoint-6 .optimizer.bin"):
        run(train_autoencoder, *decoder_run, "--output_dir", tmp_path / "run", "--resume_from_checkpoint", "latest")


@pytest.fixture
def little_room():
    """No file may grow beyond 30 kB: as on a full disk, writing fails half-way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_called_so_and_nothing_half_written_stays(decoder_run, tmp_path, little_room):
    with pytest.raises(OSError, match=r"No room on the disk: [\d.]+ MB needed, [\d.]+ .B free: .*checkpoint-2'"):
        # So few images that they have room.
        run(train_autoencoder, *decoder_run, "--max_train_samples", 2, "--output_dir", tmp_path)
    assert not list(tmp_path.glob("*checkpoint*"))


def test_a_pipeline_that_does_not_fit_leaves_the_earlier_one(pipeline, tmp_path, little_room):
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "earlier").write_text("")
    with pytest.raises(OSError, match="No room on the disk: .* needed, .* free: .*pipeline'"):
        save_model(pipeline, tmp_path / "pipeline")
    assert [path.name for path in tmp_path.rglob("*")] == ["pipeline", "earlier"]


def test_pictures_and_tables_call_a_full_disk_so_too(tmp_path, little_room):
    noise = Image.fromarray((torch.rand(128, 128, 3) * 255).byte().numpy())
    with pytest.raises(OSError, match=r"No room on the disk: [\d.]+ MB free: .*0001\.png'"):
        save_png(noise, tmp_path / "0001.png", {"seed": 1})
    assert not list(tmp_path.iterdir())


def test_too_little_room_is_seen_before_anything_is_written(decoder_run, tmp_path, monkeypatch):
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 0))
    monkeypatch.setattr("accelerate.Accelerator.save_state", lambda *a: pytest.fail("written"))
    with pytest.raises(OSError, match="MB needed, 0.0 MB free"):
        run(train_autoencoder, *decoder_run, "--output_dir", tmp_path)


def test_a_pipeline_that_is_not_finite_is_not_written(pipeline, tmp_path):
    pipeline.text_encoder.get_input_embeddings().weight.data[3, 2] = torch.inf
    with pytest.raises(ValueError, match="Weights of text_encoder are not finite .*embedding"):
        save_model(pipeline, tmp_path / "pipeline")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="float16"):
        linear = torch.nn.Linear(2, 2)
        linear.weight.data.fill_(1e6)  # finite until it is stored in half precision
        check_weights(linear.half())


def test_more_time_is_more_time():
    schedule = Schedule(100, max_minutes=1)
    schedule.step, schedule.spent, schedule.by_time = 10, 60.0, 1.0
    for minutes, done in ((1, True), (2, False), (None, False)):
        again = Schedule(100, max_minutes=minutes)
        again.load_state_dict(schedule.state_dict())
        assert again.done == done


ROWS = [(9, "--split train of .*data.csv has 8"), (4, "the validation has 3")]


@pytest.mark.parametrize(("processes", "told"), ROWS)
def test_fewer_rows_than_processes_are_refused(unet_run, tmp_path, monkeypatch, processes, told):
    state = argparse.Namespace(num_processes=processes, is_main_process=True)
    monkeypatch.setattr(rows, "PartialState", lambda **_: state)
    with pytest.raises(ValueError, match=f"{told} rows for {processes} processes"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(train_text_to_image, *unet_run, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_of_more_processes_is_not_gone_on_with(whole, decoder_run, tmp_path):
    shutil.copytree(whole / "checkpoint-4", tmp_path / "checkpoint-4")
    shutil.copy(tmp_path / "checkpoint-4" / "random_states_0.pkl", tmp_path / "checkpoint-4" / "random_states_1.pkl")
    with pytest.raises(ValueError, match="checkpoint-4 is of a run of 2 processes, and now there are 1"):
        run(train_autoencoder, *decoder_run, "--output_dir", tmp_path, "--resume_from_checkpoint", "latest")


def test_a_resumed_log_survives_half_a_line(whole, decoder_run, tmp_path):
    shutil.copytree(whole, tmp_path / "run", ignore=shutil.ignore_patterns("vae", "finished.json", "checkpoint-6"))
    with open(tmp_path / "run" / "log.jsonl", "a") as file:
        file.write('{"kind": "val", "st')
    run(train_autoencoder, *decoder_run, "--output_dir", tmp_path / "run", "--resume_from_checkpoint", "latest")
    assert log_of(tmp_path / "run") == log_of(whole)
