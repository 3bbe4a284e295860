"""The embedded model draws what it has always drawn for the same seeds, from the package and from its one file.

`same_bits.json` holds what was drawn when it was written. Its means, deviations and single values are compared on any
machine, its hashes where processor and torch are those of then: elsewhere the last bits of fp32 are others.
To write it anew after a change that is meant to draw otherwise: `python tests/test_same_bits.py`.
"""

import hashlib
import json
from pathlib import Path

import pytest
import torch


STORED = Path(__file__).with_name("same_bits.json")
CHECKPOINT = Path(__file__).parent.parent / "minim_pipeline" / "checkpoints" / "minim-256"
PROMPTS = ["diabetic macular edema", "right-sided pleural effusion", "glioma"]
MODALITIES = ["oct", "cxr", "brain_mri"]
SINGLE_VALUES = 16  # stored of each image

# A process of its own, in which the package cannot be imported.
WITHOUT_PACKAGE = """
import sys
sys.modules["minim_pipeline"] = None
sys.path.insert(0, sys.argv[1])
import torch
from diffusers import DiffusionPipeline
from test_same_bits import draw
folder = sys.argv[2]
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
assert not type(pipe).__module__.startswith("minim_pipeline")
torch.save(draw(pipe.to(torch.float32)), sys.argv[3])
"""


def draw(pipe) -> dict[str, dict]:
    """By name of the way of drawing, the fields of what comes back."""
    torch.set_num_threads(1)
    pipe.set_progress_bar_config(disable=True)
    ways = {
        "unguided": {"guidance_scale": 1.0, "seeds": [11, 12, 13], "output_type": "latent"},
        "guided": {
            "guidance_scale": 3.0,
            "guidance_rescale": 0.5,
            "guidance_interval": (0.0, 0.6),
            "negative_prompt": "blurred",
            "generator": torch.Generator().manual_seed(5),
            "output_type": "latent",
        },
        "filtered": {
            "generator": torch.Generator().manual_seed(5),
            "num_inference_steps": 3,
            "num_candidates": 2,
            "max_rounds": 2,
            "filter_threshold": 2.0,
            "output_type": "pt",
        },
    }
    drawn = {}
    for name, options in ways.items():
        output = pipe(PROMPTS, modality=MODALITIES, **{"num_inference_steps": 4} | options)
        drawn[name] = dict(output)
    return drawn


def summary(images: torch.Tensor) -> dict:
    """What is stored of latents or pixels (N, C, h, w): a hash, and figures of each image."""
    rounded = (images.float() * 100).round().to(torch.int16)
    flat = images.float().flatten(1)
    places = torch.linspace(0, flat.shape[1] - 1, SINGLE_VALUES).long()
    return {
        "hash": hashlib.sha256(rounded.numpy().tobytes()).hexdigest(),
        "mean": rounded_list(flat.mean(1)),
        "std": rounded_list(flat.std(1)),
        "values": [rounded_list(values) for values in flat[:, places]],
    }


def rounded_list(values: torch.Tensor) -> list[float]:
    return [round(value, 5) for value in values.tolist()]


def machine() -> str:
    """What the last bits of fp32 hang on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {processor}"


def record(drawn: dict[str, dict]) -> dict:
    """What is stored of it all."""
    ways = {name: dict(fields) | {"images": summary(fields["images"])} for name, fields in drawn.items()}
    return {"machine": machine(), "ways": ways}


@pytest.fixture(scope="module")
def drawn() -> dict[str, dict]:
    from minim_pipeline import MinimPipeline

    return draw(MinimPipeline.from_pretrained(CHECKPOINT))


@pytest.mark.parametrize("way", ["unguided", "guided", "filtered"])
def test_it_draws_what_it_has_always_drawn(drawn, way):
    stored = json.loads(STORED.read_text())
    before, now = stored["ways"][way], record(drawn)["ways"][way]
    for figure in ("mean", "std", "values"):
        torch.testing.assert_close(
            torch.tensor(now["images"][figure]), torch.tensor(before["images"][figure]), atol=1e-3, rtol=0
        )
    if stored["machine"] == machine():
        assert now["images"]["hash"] == before["images"]["hash"]
    for field in ("seeds", "candidates", "accepted", "rejected"):
        assert now[field] == before[field], field
    assert now["scores"] == pytest.approx(before["scores"], abs=1e-3)


def test_the_filter_has_had_something_to_do(drawn):
    """Or the second round, and the choice, would not be of what is compared."""
    output = drawn["filtered"]
    assert {2, 4} == set(output["candidates"]) and any(output["accepted"])
    assert any(sum(counts.values()) for counts in output["rejected"])


def test_the_file_without_the_package_draws_the_same_bits(drawn, nursery, tmp_path):
    from minim_pipeline.standalone import COMPONENT_FILE, PIPELINE_FILE, source_code

    folder = tmp_path / "minim"
    for path in CHECKPOINT.rglob("*"):
        if path.is_file():
            place = folder / path.relative_to(CHECKPOINT)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(path)
    for name in (PIPELINE_FILE, COMPONENT_FILE):
        (folder / name).write_text(source_code(), encoding="utf-8")
    done = nursery.run("-c", WITHOUT_PACKAGE, Path(__file__).parent, folder, tmp_path / "out.pt")
    assert done.returncode == 0, done.stderr
    for way, fields in torch.load(tmp_path / "out.pt", weights_only=True).items():
        for field, value in fields.items():
            expected = drawn[way][field]
            assert torch.equal(value, expected) if torch.is_tensor(value) else value == expected, (way, field)


if __name__ == "__main__":
    from minim_pipeline import MinimPipeline

    STORED.write_text(json.dumps(record(draw(MinimPipeline.from_pretrained(CHECKPOINT))), indent=1) + "\n")
