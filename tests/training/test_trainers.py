"""Both trainers end to end, in miniature: what they write loads, and a run that was stopped ends as if it had not."""

import csv
import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
import train_autoencoder
import train_text_to_image
from conftest import run_script as run
from PIL import Image
from safetensors.torch import load_file

from minim_pipeline.data.image_loading import load_images
from minim_pipeline.training import denoising, latents
from minim_pipeline.training.autoencoder import AutoencoderConfig
from minim_pipeline.training.rows import read_splits


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A CSV with a dozen images of 64 px of two modalities: stripes of two widths, with noise."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for i in range(14):
        generator = torch.Generator().manual_seed(i)
        wave = (torch.arange(64) / (4 + 4 * (i % 2))).sin()[None].expand(64, 64)
        grey = ((wave + 0.2 * torch.randn(64, 64, generator=generator)) * 60 + 128).clamp(0, 255).byte()
        Image.fromarray(grey.numpy()).convert("RGB").save(folder / f"{i}.png")
        modality, text, finding = (
            ("OCT", "Diabetic macular edema, left eye.", "diabetic macular edema"),
            ("BrainMRI", "Glioma.", "glioma"),
        )[i % 2]
        split = "train" if i < 10 else "val"
        rows.append(dict(path=f"{i}.png", Text=text, modality=modality, finding=finding, split=split))
    with open(folder / "data.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder / "data.csv"


@pytest.fixture(scope="module")
def autoencoder_arguments(data):
    return [
        *("--train_data", data, "--preset", "tiny", "--resolution", 64, "--crop", 32, "--train_batch_size", 4),
        *("--max_train_steps", 16, "--checkpointing_steps", 8, "--validation_steps", 8, "--lr_warmup_steps", 2),
        *("--learning_rate", 5e-3, "--ema_decay", 0.5, "--sharpen_from", 0.4),
    ]


@pytest.fixture(scope="module")
def autoencoder(autoencoder_arguments, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("autoencoder")
    run(train_autoencoder, *autoencoder_arguments, "--output_dir", output)
    return output


@pytest.fixture(scope="module")
def unet_arguments(data, autoencoder, make_pipeline, tmp_path_factory):
    text = tmp_path_factory.mktemp("text")
    pipe = make_pipeline()
    pipe.text_encoder.save_pretrained(text / "text_encoder")
    pipe.tokenizer.save_pretrained(text / "tokenizer")
    return [
        *("--preset", "tiny", "--vae", autoencoder / "vae", "--text_encoder", text, *unet_sizes(data)),
        *("--max_train_steps", 6, "--checkpointing_steps", 3, "--validation_steps", 3),
        *("--noise_sampling", "log-normal", "--snr_gamma", 0),
    ]


def unet_sizes(data) -> list:
    return [
        *("--train_data", data, "--resolution", 64, "--train_batch_size", 4, "--lr_warmup_steps", 1),
        *("--latent_variants", 3, "--caption_variants", 3, "--validation_samples", 1, "--num_inference_steps", 2),
        *("--learning_rate", 1e-3),
    ]


@pytest.fixture(scope="module")
def unet(unet_arguments, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("unet")
    run(train_text_to_image, *unet_arguments, "--output_dir", output)
    return output


def records(output: Path, kind: str) -> list[dict]:
    lines = (output / "log.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def same_weights(a: Path, b: Path) -> bool:
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_autoencoder_learns_and_gives_unit_latents(autoencoder, data):
    from diffusers import AutoencoderKL

    figures = records(autoencoder, "val")
    assert figures[-1]["psnr"] > figures[0]["psnr"]
    assert {"psnr_oct", "energy_oct", "psnr_brain_mri", "energy_brain_mri"} <= figures[-1].keys()

    vae = AutoencoderKL.from_pretrained(autoencoder / "vae")
    assert vae.config.scaling_factor == 1.0
    rows, _ = read_splits(AutoencoderConfig(train_data=str(data), output_dir=""))
    images = load_images(rows, data, 64, trim=False).float() / 127.5 - 1
    with torch.no_grad():
        drawn = vae.encode(images).latent_dist.sample(torch.Generator().manual_seed(0))  # [N, 4, 8, 8]
    assert drawn.mean((0, 2, 3)).abs().max() < 0.2
    assert (drawn.std((0, 2, 3)) - 1).abs().max() < 0.2


def test_normalised_latents_leave_images_alone(autoencoder):
    final, last = records(autoencoder, "final")[0], records(autoencoder, "val")[-1]
    assert final["psnr"] == pytest.approx(last["psnr"], abs=0.01)


def test_decoder_alone_learns_detail_for_the_same_latents(autoencoder, data, tmp_path):
    for name, sharpening in (("sharp", 0.8), ("plain", 0)):
        options = ["--train_data", data, "--output_dir", tmp_path / name, "--sharpening", sharpening]
        options += ["--pretrained_model_name_or_path", autoencoder, "--freeze_encoder", "--sharpen_from", 0]
        options += ["--resolution", 64, "--crop", 64, "--train_batch_size", 4, "--max_train_steps", 40]
        options += ["--learning_rate", 5e-3, "--lr_warmup_steps", 2, "--ema_decay", 0.5]
        run(train_autoencoder, *options)
    sharp, plain, before = (
        load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
        for folder in (tmp_path / "sharp", tmp_path / "plain", autoencoder)
    )
    for key, value in before.items():
        if key.startswith(("encoder.", "quant_conv.")):
            assert torch.equal(sharp[key], value) and torch.equal(plain[key], value)
    sharp, plain = (records(tmp_path / name, "final")[0] for name in ("sharp", "plain"))
    assert sharp["energy_oct"] > plain["energy_oct"] and sharp["energy_brain_mri"] > plain["energy_brain_mri"]


def test_autoencoder_resumes_as_if_unbroken(autoencoder, autoencoder_arguments, tmp_path):
    run(
        train_autoencoder,
        *(*autoencoder_arguments, "--output_dir", tmp_path),
        *("--resume_from_checkpoint", autoencoder / "checkpoint-8"),
    )
    weights = "vae/diffusion_pytorch_model.safetensors"
    assert same_weights(autoencoder / weights, tmp_path / weights)


def test_unet_run_writes_a_pipeline_with_its_defaults(unet):
    from minim_pipeline import MinimPipeline

    pipe = MinimPipeline.from_pretrained(unet / "pipeline")
    assert set(pipe.config.modalities) == {"oct", "brain_mri"}
    assert pipe.config.findings["brain_mri"] == ["glioma"]
    assert pipe.config.num_inference_steps == 2
    out = pipe("glioma", modality="brain_mri", seeds=[0], output_type="np")
    assert out.images.shape == (1, 64, 64, 3)
    assert (unet / "samples-6" / "oct.png").is_file()
    last = records(unet, "val")[-1]
    assert "memorised" in last and {"error_t0", "error_t900"} <= last.keys(), "of the lowest and highest timesteps"


def test_unet_resumes_as_if_unbroken(unet, unet_arguments, tmp_path):
    run(
        train_text_to_image,
        *(*unet_arguments, "--output_dir", tmp_path, "--resume_from_checkpoint", unet / "checkpoint-3"),
    )
    weights = "best/unet/diffusion_pytorch_model.safetensors"
    assert same_weights(unet / weights, tmp_path / weights)


def test_the_same_command_goes_on_with_the_best_so_far(unet, unet_arguments, tmp_path):
    """A run that goes on knows the best loss so far, and the same command finds nothing to do at its end."""
    shutil.copytree(unet, tmp_path / "run", ignore=shutil.ignore_patterns("pipeline", "finished.json", "checkpoint-6"))
    run(train_text_to_image, *unet_arguments, "--output_dir", tmp_path / "run")
    best = records(tmp_path / "run", "best")[-1]
    assert best["loss"] == min(r["loss"] for r in records(unet, "val"))
    assert best["at_step"] == records(unet, "best")[0]["at_step"]
    made = (tmp_path / "run" / "pipeline" / "model_index.json").stat().st_mtime_ns
    run(train_text_to_image, *unet_arguments, "--output_dir", tmp_path / "run")
    assert (tmp_path / "run" / "pipeline" / "model_index.json").stat().st_mtime_ns == made


def test_a_run_goes_on_only_with_its_own_arguments(unet, unet_arguments, tmp_path):
    with pytest.raises(ValueError, match="--seed was 0, now 5"):
        run(
            train_text_to_image,
            *(*unet_arguments, "--output_dir", tmp_path, "--seed", 5),
            *("--resume_from_checkpoint", unet / "checkpoint-3"),
        )


@pytest.mark.slow
def test_two_machines_train_together(nursery, unet, unet_arguments, tmp_path):
    """In the environment that `accelerate launch --num_machines 2` gives; they encode what one process encodes."""
    arguments = [train_text_to_image.__file__, *unet_arguments, "--max_train_steps", 3]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    machines = []
    for rank in range(2):
        environment = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": str(rank)}
        environment |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        machines.append(nursery.start(*arguments, "--output_dir", tmp_path / "two", **environment))
    for machine in machines:
        assert machine.wait() == 0, machine.said()[-2000:]
    name = "latents-train-0-of-1.safetensors"  # so few images are one file
    assert same_weights(tmp_path / "two" / name, unet / name)
    assert (tmp_path / "two" / "pipeline" / "model_index.json").is_file()


def test_best_weights_are_kept_and_not_the_last(unet, unet_arguments, tmp_path):
    """With a learning rate that destroys the model, the first validation stays the best."""
    run(train_text_to_image, *unet_arguments, "--output_dir", tmp_path, "--learning_rate", 1.0, "--ema_decay", 0.0)
    best, vals = records(tmp_path, "best")[0], records(tmp_path, "val")
    assert best["loss"] == min(v["loss"] for v in vals)


@pytest.mark.parametrize("extra", [[], ["--lora_rank", 2], ["--train_text_encoder", "--snr_gamma", 0]])
def test_from_stable_diffusion(make_pipeline, data, tmp_path, extra, caplog):
    """The reference's own use, on random weights of SD-1.x in miniature: tokens are added, old words stay."""
    from minim_pipeline import MinimPipeline

    base = make_pipeline("sd1")
    base.save_pretrained(tmp_path / "sd")
    arguments = [*unet_sizes(data), "--max_train_steps", 2, *extra]
    run(
        train_text_to_image,
        *("--pretrained_model_name_or_path", tmp_path / "sd", *arguments, "--output_dir", tmp_path / "out"),
        *("--gradient_accumulation_steps", 2, "--gradient_checkpointing"),
        *("--text_encoder_learning_rate", 1e-2),
    )
    pipe = MinimPipeline.from_pretrained(tmp_path / "out" / "pipeline")
    assert pipe.unet.config.sample_size == 8 and pipe.config.guidance_scale == base.config.guidance_scale
    if "--lora_rank" in extra:
        old, new = base.unet.state_dict(), pipe.unet.state_dict()
        assert old.keys() == new.keys() and all(torch.equal(old[k], new[k]) for k in old)
        pipe.load_lora_weights(tmp_path / "out" / "best")
        assert pipe.get_active_adapters() and "modality tokens" not in caplog.text
        base.load_lora_weights(tmp_path / "out" / "best")
        assert "was trained with the modality tokens <oct>" in caplog.text
    assert pipe.scheduler.config.prediction_type == "epsilon"
    token = pipe.tokenizer.convert_tokens_to_ids("<oct>")
    assert pipe.text_encoder.config.eos_token_id == pipe.tokenizer.eos_token_id
    old, new = (p.text_encoder.get_input_embeddings().weight for p in (base, pipe))
    assert torch.equal(old, new[: len(old)]) == ("--train_text_encoder" not in extra)
    assert token >= len(old) and new[token].abs().sum() > 0
    assert pipe("macular edema", modality="oct", num_inference_steps=2).images


def test_flips_only_where_they_leave_the_caption_true(data, autoencoder, monkeypatch):
    """An image whose caption names a side is never mirrored, one that may be is, sometimes."""
    x = torch.linspace(0, 1, 64).expand(2, 3, 64, 64)
    may = torch.tensor([False, True])
    mirrored = torch.zeros(2)
    for seed in range(12):
        y = latents.augment(x, may, 2, torch.Generator().manual_seed(seed))
        mirrored += (y[:, 0, 32, 8] > y[:, 0, 32, 56]).float()
    assert mirrored[0] == 0 and 0 < mirrored[1] < 12


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights_fall_with_the_noise_but_never_to_nothing(prediction_type):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(
        prediction_type=prediction_type, rescale_betas_zero_snr=prediction_type == "v_prediction"
    )
    weights = denoising.loss_weights(scheduler, torch.arange(1000), gamma=5.0)
    assert weights[-1] == 1 and weights[0] < 0.02
    assert (weights.diff() >= -1e-6).all()


def test_memorised_share_finds_copies():
    moments = torch.stack([torch.randn(20, 1, 4, 8, 8), torch.zeros(20, 1, 4, 8, 8)], 2).half()
    train = latents.Latents(moments, 1.0, 0.0)
    names = ["oct"] * 20
    copies = train[:3] + 0.05 * torch.randn(3, 4, 8, 8)
    others = torch.randn(1, 4, 8, 8)
    samples = {"oct": torch.cat([copies, others])}
    share = latents.memorised_share(samples, torch.randn(10, 4, 8, 8), names[:10], train, names)
    assert share in (0.75, 1.0)  # a sample that is new may still fall under the nearest 1 % of 10


BASE = ["--pretrained_model_name_or_path", "x"]


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (train_autoencoder, ["--max_train_steps", "0"], "--max_train_steps has to be at least 1, got 0"),
        (train_autoencoder, ["--resolution", "100"], "multiple of 8, got 100"),
        (train_autoencoder, ["--crop", "48"], "--crop has to be a multiple of 32"),
        (train_autoencoder, ["--freeze_encoder"], "needs --pretrained_model_name_or_path"),
        (train_autoencoder, ["--sharpening", "1"], "has to be in \\[0, 1\\)"),
        (train_text_to_image, [], "either --pretrained_model_name_or_path or --preset"),
        (train_text_to_image, ["--preset", "tiny"], "needs --vae and --text_encoder"),
        (train_text_to_image, ["--pretrained_model_name_or_path", "x", "--vae", "y"], "belong to --preset"),
        (train_text_to_image, [*BASE, "--drop_text", "0.9", "--drop_all", "0.2"], "are more than 1 together"),
        (train_text_to_image, [*BASE, "--noise_median", "0"], "--noise_median has to be above 0, got 0"),
        (train_text_to_image, [*BASE, "--guidance_interval", "0.5"], r"two shares of the steps, got \[0.5\]"),
        (train_autoencoder, ["--split", "val"], "both 'val'"),
    ],
)
def test_bad_arguments_are_told_before_any_work(module, arguments, message):
    with pytest.raises(ValueError, match=message):
        module.main(["--train_data", "none.csv", "--output_dir", "none", *arguments])


def test_missing_images_are_told_before_training(data, tmp_path):
    text = data.read_text().replace("3.png", "lost.png")
    broken = data.with_name("broken.csv")
    broken.write_text(text)
    with pytest.raises(ValueError, match="lost.png"):
        run(train_autoencoder, "--train_data", broken, "--output_dir", tmp_path / "out", "--preset", "tiny")
    assert not (tmp_path / "out").exists()


def test_the_same_command_goes_on_and_another_overwrites_nothing(autoencoder, autoencoder_arguments, capsys):
    before = {path: path.stat().st_mtime_ns for path in autoencoder.rglob("*") if path.is_file()}
    run(train_autoencoder, *autoencoder_arguments, "--output_dir", autoencoder)
    assert "there is nothing left to do" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--learning_rate was .*, now 0.5"):
        run(train_autoencoder, *autoencoder_arguments, "--output_dir", autoencoder, "--learning_rate", "0.5")
    assert before == {path: path.stat().st_mtime_ns for path in autoencoder.rglob("*") if path.is_file()}


def test_log_normal_noise_levels_are_those_asked_for():
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True)
    uniform = torch.randint(1000, (40_000,), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    drawn = denoising.log_normal_timesteps(scheduler, uniform, 0.8, 0.5, generator)
    alpha = scheduler.alphas_cumprod[drawn]
    levels = ((1 - alpha) / alpha.clamp(min=1e-12)).sqrt()
    assert 0.75 < levels.median() < 0.88
    inner = ((levels / 0.8).log().abs() < 0.5).float().mean()
    assert 0.6 < inner < 0.69, "68 % within a deviation, but for the tenth that is drawn as before"
    assert drawn.max() == 999, "pure noise is learned, too"
