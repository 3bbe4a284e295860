"""The parts of the U-Net's training: texts that are encoded once, noise levels, depth, and what is measured of it."""

import importlib.util
import json

import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, forget_accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from minim_pipeline.tokens import tokenize
from minim_pipeline.training import memory
from minim_pipeline.training.config import parse
from minim_pipeline.training.denoising import Denoise, noise_scheduler, validation_errors
from minim_pipeline.training.pipeline import ModelOptions, build_pipeline
from minim_pipeline.training.run import Run
from minim_pipeline.training.unet import texts as texts_module
from minim_pipeline.training.unet.batches import shares_of
from minim_pipeline.training.unet.texts import Texts


CPU = torch.device("cpu")
CAPTIONS = ["<oct> edema", "<oct> normal", "<cxr> effusion", "<cxr> effusion"]


@pytest.fixture
def accelerator():
    forget_accelerator()
    return Accelerator(cpu=True)


def texts_of(pipe) -> Texts:
    """Two rows with two captions each; those of the second are alike."""
    ids = tokenize(pipe.tokenizer, [*CAPTIONS, "<oct>", "<cxr>", ""])
    return Texts(ids, torch.arange(4).view(2, 2), torch.tensor([4, 5]), CPU)


def test_each_text_lies_in_memory_once_and_rows_get_theirs(shared_pipeline):
    texts = texts_of(shared_pipeline)
    assert len(texts.table) == 6, "three captions, two tokens, nothing"
    index, variant = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 1, 0, 1, 0])
    chance = torch.tensor([0.9, 0.9, 0.9, 0.1, 0.01])
    drawn = texts.draw(index, variant, chance, drop_text=0.1, drop_all=0.05)
    wanted = ["<oct> edema", "<oct> normal", "<cxr> effusion", "<cxr>", ""]
    assert torch.equal(drawn, tokenize(shared_pipeline.tokenizer, wanted))


def test_what_is_encoded_before_is_what_a_step_would_encode(shared_pipeline, accelerator):
    texts, index, variant = texts_of(shared_pipeline), torch.tensor([0, 1]), torch.tensor([1, 0])
    model = Denoise(shared_pipeline.unet, shared_pipeline.text_encoder)
    noisy, timesteps = torch.randn(2, 8, 8, 8), torch.tensor([10, 900])
    ids = texts.draw(index, variant, torch.ones(2), 0.1, 0.05)
    texts.encode(shared_pipeline.text_encoder, accelerator, torch.float32)
    states = texts.draw(index, variant, torch.ones(2), 0.1, 0.05)
    assert states.shape == (2, 48, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(noisy, timesteps, states), model(noisy, timesteps, ids))


def test_texts_that_memory_has_no_room_for_stay_token_ids(shared_pipeline, accelerator, monkeypatch):
    texts = texts_of(shared_pipeline)
    asked = []
    monkeypatch.setattr(texts_module, "fits", lambda nbytes, device: asked.append(nbytes))
    texts.encode(shared_pipeline.text_encoder, accelerator, torch.bfloat16)
    assert asked == [6 * 48 * 32 * 2] and not texts.table.is_floating_point()


def test_a_quarter_of_memory_may_be_taken(monkeypatch):
    monkeypatch.setattr(memory.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 100}.get)
    assert memory.fits(102_399, CPU) and not memory.fits(102_400, CPU)


def test_validation_errors_are_the_same_each_time_and_of_all_noise_levels(shared_pipeline):
    scheduler = noise_scheduler(shared_pipeline.scheduler.config, CPU)
    latents = torch.randn(30, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    ids = tokenize(shared_pipeline.tokenizer, ["edema"] * 30)
    model = Denoise(shared_pipeline.unet, shared_pipeline.text_encoder)
    (errors, steps), (again, _) = (validation_errors(model, scheduler, latents, ids, seed=3) for _ in range(2))
    assert torch.equal(errors, again) and errors.shape == (30,)
    assert torch.equal((steps // 100).bincount(), torch.full((10,), 3))


def test_findings_are_drawn_as_alike_as_is_asked():
    rows = [{"modality": "oct", "finding": "edema"}] * 64 + [{"modality": "oct", "finding": "drusen"}] * 4
    rows += [{"modality": "cxr", "finding": "edema"}] * 4  # another finding of this name
    for balance, wanted in ((0, (64, 4, 4)), (0.5, (8, 2, 2)), (1, (1, 1, 1))):
        shares = shares_of(rows, balance)
        found = torch.stack([part.sum() for part in shares.split((64, 4, 4))])
        torch.testing.assert_close(found / found.sum(), torch.tensor(wanted) / sum(wanted))


def test_depth_and_dropout_of_a_new_unet_are_options(shared_pipeline, tmp_path):
    shared_pipeline.save_pretrained(tmp_path)
    parts = {"preset": "tiny", "vae": str(tmp_path / "vae"), "text_encoder": str(tmp_path)}

    def unet(**more):
        return build_pipeline(ModelOptions(**parts, **more), 64, ["oct"], {}).pipe.unet

    plain, deep = unet(), unet(layers_per_block=2, dropout=0.25)
    assert (plain.config.layers_per_block, plain.config.dropout) == (1, 0.0)
    assert (deep.config.layers_per_block, deep.config.dropout) == (2, 0.25)
    assert deep.num_parameters() > 1.3 * plain.num_parameters()
    with pytest.raises(ValueError, match="--layers_per_block and --dropout belong to --preset"):
        ModelOptions(pretrained_model_name_or_path="x", dropout=0.0)


@pytest.fixture
def bench():
    forget_accelerator()
    spec = importlib.util.spec_from_file_location("bench_training", ROOT / "bench" / "bench_training.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TINY = "--preset tiny --resolution 64 --train_batch_size 2 --images 4 --caption_variants 2".split()


def test_benchmark_of_training_runs(bench, capsys):
    result = bench.main([*TINY, "--steps", "2"])
    assert json.loads(capsys.readouterr().out) == result
    assert result["texts_encoded_before"] and min(result["images_per_second"].values()) > 0 and result["ratio"] > 0


class Reads(TorchDispatchMode):
    """Notes what has to wait for a GPU: numbers that the host reads, and shapes that depend on values."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(name in str(function) for name in ("_local_scalar_dense", "nonzero", "unique")):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


def test_a_step_reads_no_number_that_a_gpu_would_have_to_finish_first(bench, tmp_path, monkeypatch):
    more = ["--noise_sampling", "log-normal", "--output_dir", str(tmp_path / "run")]
    config = parse(bench.BenchConfig, [*TINY, *more], defaults=bench.DEFAULTS)
    with Run.open(config, "test") as run:
        trainee = build_pipeline(config, config.resolution, ["cxr"], {"cxr": []})
        trainer = bench.Trainer(config, run, trainee, bench.random_batches(config, run, trainee))
        # A CPU's Adam does read, a fused one does not.
        monkeypatch.setattr(trainer.optimizer, "step", lambda: None)
        with Reads() as reads:
            trainer.step()
    assert not reads.found


def test_what_is_read_ahead_is_the_batch_of_the_next_step(bench, tmp_path):
    """From disk, as from memory; with the source of what else is random in it."""
    more = ["--output_dir", str(tmp_path / "run"), "--gradient_accumulation_steps", "2"]
    config = parse(bench.BenchConfig, [*TINY, *more], defaults=bench.DEFAULTS)
    with Run.open(config, "test", gradient_accumulation_steps=2) as run:
        trainee = build_pipeline(config, config.resolution, ["cxr"], {"cxr": []})
        trainer = bench.Trainer(config, run, trainee, bench.random_batches(config, run, trainee))
        from_memory = trainer.draw(2)
        trainer.batches = bench.batches_on_disk(config, run, trainer.batches)
        assert trainer.batches.latents.on_disk
        ahead = trainer.draw(2)
        run.schedule.step += 1
        for generator, latents, text in (from_memory, ahead):
            own = trainer.next_batch(0)
            assert latents.equal(own[1]) and text.equal(own[2])
            assert torch.rand(3, generator=generator).equal(torch.rand(3, generator=own[0]))
