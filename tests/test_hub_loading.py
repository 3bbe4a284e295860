"""A published pipeline in all ways of loading, each in a fresh process, with the package and without it."""

import json
from pathlib import Path

import pytest
from fresh import Nursery
from hub_server import Hub, Repository, environment


# What every process begins with; `draw` tells what a pipeline draws, bit for bit.
HEAD = """
import hashlib, json, sys
if not json.loads(sys.argv[1]):
    sys.modules["minim_pipeline"] = None  # as if it were not installed
import torch
from diffusers import DiffusionPipeline

def draw(pipe, **options):
    pipe.set_progress_bar_config(disable=True)
    call = dict(prompt="edema", modality="oct", num_inference_steps=3, output_type="np") | options
    if pipe.filter_head is not None:
        call |= {"num_candidates": 2}
    output = pipe(generator=torch.Generator().manual_seed(0), **call)
    return hashlib.sha256(output.images.tobytes()).hexdigest()[:16], output.scores

def origin(thing):
    return type(thing).__module__.split(".")[0]

FOLDER, OTHER = sys.argv[2:]
told = {}
"""
REMOTE = 'custom_pipeline="org/minim", trust_remote_code=True'
OTHER = 'custom_pipeline="org/other", trust_remote_code=True'


@pytest.fixture(scope="module")
def saved(make_pipeline, tmp_path_factory) -> Path:
    """A saved pipeline with a filter head and an fp16 variant."""
    from minim_pipeline.publishing.staging import save_half

    folder = tmp_path_factory.mktemp("saved") / "minim"
    make_pipeline(filtered=True).save_pretrained(folder)
    for path in folder.glob("*/*.safetensors"):
        if path.parent.name != "filter_head":
            save_half(path, path.with_name(f"{path.stem}.fp16.safetensors"))
    return folder


@pytest.fixture(scope="module")
def hub(saved):
    """`org/minim`, its first version `v1` without a filter head, and `org/other`, whose code draws otherwise."""
    started = Hub()
    files = {path.relative_to(saved).as_posix(): path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    index = json.loads(files["model_index.json"])
    plain = {path: data for path, data in files.items() if not path.startswith("filter_head/")}
    plain["model_index.json"] = json.dumps(index | {"filter_head": [None, None]}).encode()
    ours = Repository()
    ours.commit(plain, "v1")
    ours.commit(files)
    started.repositories["models/org/minim"] = ours

    other = dict(files)
    line = 'return f"{modality.token} {prompt}"'
    for path in ("pipeline.py", "filter_head/minim_filter.py"):
        code = files[path].decode()
        assert line in code
        code = code.replace('VERSION = "', 'VERSION = "other_').replace(
            line, line.replace("{prompt}", "{prompt}, other")
        )
        other[path] = code.encode()
    assert other["pipeline.py"] != files["pipeline.py"]
    started.repositories["models/org/other"] = Repository()
    started.repositories["models/org/other"].commit(other)
    yield started
    started.close()


def run(nursery: Nursery, code: str, package: bool, folder: Path | str = "", other: Path | str = "") -> dict:
    """What a fresh process that runs `code` put into `told`."""
    done = nursery.run("-c", HEAD + code + "\nprint(json.dumps(told))", json.dumps(package), folder, other)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    return told | {"stderr": done.stderr}


@pytest.fixture(scope="module")
def stable_diffusion(make_pipeline, tmp_path_factory) -> Path:
    """A folder as of SD-1.x in miniature; what the package makes of it is to be saved beside it, in `ours`."""
    folder = tmp_path_factory.mktemp("sd") / "sd1"
    make_pipeline("sd1").save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index = {name: index[name] for name in ("vae", "text_encoder", "unet", "tokenizer", "scheduler")}
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionPipeline"}))
    (folder / "pipeline.py").unlink()
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def online(hub, home):
    """Starts processes that reach the Hub."""
    started = Nursery(environment(hub, home))
    yield started
    started.close()


@pytest.fixture(scope="module")
def offline(hub, home):
    """Starts processes that know where the Hub is, and are to do without it."""
    started = Nursery(environment(hub, home) | {"HF_HUB_OFFLINE": "1"})
    yield started
    started.close()


@pytest.fixture(scope="module")
def packaged(online, saved, stable_diffusion) -> dict:
    """What the package draws, loaded in its ways; leaves the repository in the cache."""
    code = """
from minim_pipeline import FilterHead, MinimPipeline
told["folder"] = draw(MinimPipeline.from_pretrained(FOLDER))
told["class"] = draw(MinimPipeline.from_pretrained("org/minim"))
pipe = DiffusionPipeline.from_pretrained("org/minim")
told["diffusers"], told["type"] = draw(pipe), type(pipe) is MinimPipeline
told["head left out"] = draw(MinimPipeline.from_pretrained("org/minim", filter_head=None))
told["head left out by diffusers"] = draw(DiffusionPipeline.from_pretrained("org/minim", filter_head=None))
told["first version"] = draw(MinimPipeline.from_pretrained("org/minim", revision="v1"))
told["device_map"] = draw(MinimPipeline.from_pretrained("org/minim", device_map="cpu"))
half = MinimPipeline.from_pretrained("org/minim", variant="fp16", dtype=torch.float16)
told["fp16"] = [str(half.unet.dtype), str(half.text_encoder.dtype), str(half.filter_head.dtype)]
told["fp16 loaded as fp32"] = str(MinimPipeline.from_pretrained("org/minim", variant="fp16").unet.dtype)
from diffusers import AutoencoderKL, AutoModel, DPMSolverMultistepScheduler
from transformers import CLIPTextModel, CLIPTokenizer
parts = {"unet": AutoModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel, "tokenizer": CLIPTokenizer}
parts = {name: c.from_pretrained("org/minim", subfolder=name) for name, c in parts.items()}
parts["scheduler"] = DPMSolverMultistepScheduler.from_pretrained("org/minim", subfolder="scheduler")
parts["filter_head"] = FilterHead.from_pretrained("org/minim", subfolder="filter_head")
told["from parts"] = draw(MinimPipeline.from_pretrained("org/minim", **parts))
base = MinimPipeline.from_pretrained(f"{OTHER}/sd1")
told["base"] = draw(base)
base.save_pretrained(f"{OTHER}/ours")
"""
    return run(online, code, True, saved, stable_diffusion.parent)


def test_all_ways_of_the_package_draw_the_same(packaged):
    for way in ("class", "diffusers", "device_map", "from parts"):
        assert packaged[way] == packaged["folder"], way
    assert packaged["type"] and packaged["folder"][1][0] is not None
    assert packaged["first version"] == packaged["head left out"] == packaged["head left out by diffusers"]
    assert packaged["head left out"] != packaged["class"]
    assert packaged["fp16"] == ["torch.float16", "torch.float16", "torch.float32"]
    assert packaged["fp16 loaded as fp32"] == "torch.float32"
    assert "trust_remote_code" not in packaged["stderr"]


def test_the_package_loads_offline_from_the_cache(hub, offline, packaged):
    code = """
from minim_pipeline import MinimPipeline
told["class"] = draw(MinimPipeline.from_pretrained("org/minim"))
told["local_files_only"] = draw(DiffusionPipeline.from_pretrained("org/minim", local_files_only=True))
told["first version"] = draw(MinimPipeline.from_pretrained("org/minim", revision="v1"))
"""
    before = len(hub.requests)
    told = run(offline, code, True)
    assert told["class"] == told["local_files_only"] == packaged["class"]
    assert told["first version"] == packaged["first version"]
    assert len(hub.requests) == before


@pytest.fixture(scope="module")
def unpackaged(online, saved, stable_diffusion, packaged) -> dict:
    """What the repository's own code draws; saves the pipeline again, beside the folder it was saved in first."""
    code = f"""
try:
    DiffusionPipeline.from_pretrained("org/minim", custom_pipeline="org/minim")
except ValueError as error:
    told["untrusted"] = str(error)
pipe = DiffusionPipeline.from_pretrained("org/minim", {REMOTE})
told["origin"] = [origin(pipe), origin(pipe.filter_head)]
told["hub"] = draw(pipe)
told["named"] = draw(DiffusionPipeline.from_pretrained(
    "org/minim", custom_pipeline="pipeline", revision="v1", trust_remote_code=True))
told["folder"] = draw(DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER, trust_remote_code=True))
told["head left out"] = draw(DiffusionPipeline.from_pretrained("org/minim", filter_head=None, {REMOTE}))
half = DiffusionPipeline.from_pretrained("org/minim", variant="fp16", dtype=torch.float16, {REMOTE})
told["fp16"] = [str(half.unet.dtype), str(half.text_encoder.dtype), str(half.filter_head.dtype)]
told["fp16 loaded as fp32"] = str(DiffusionPipeline.from_pretrained("org/minim", variant="fp16", {REMOTE}).unet.dtype)
base = f"{{OTHER}}/ours"
told["base"] = draw(DiffusionPipeline.from_pretrained(base, custom_pipeline=base, trust_remote_code=True))
pipe.save_pretrained(f"{{FOLDER}}/../again")
"""
    return run(online, code, False, saved, stable_diffusion.parent)


def test_without_the_package_the_repository_draws_the_same(unpackaged, packaged):
    assert "trust_remote_code=True" in unpackaged["untrusted"]
    assert unpackaged["origin"] == ["diffusers_modules"] * 2
    assert unpackaged["hub"] == unpackaged["folder"] == packaged["class"], "bit for bit"
    assert unpackaged["named"] == unpackaged["head left out"] == packaged["head left out"]
    for what in ("fp16", "fp16 loaded as fp32"):
        assert unpackaged[what] == packaged[what]
    for complaint in ("might require the following packages", "Expected types", "are not expected by"):
        assert complaint not in unpackaged["stderr"]


def test_saved_without_the_package_it_loads_again_also_offline(offline, saved, unpackaged, packaged):
    again = saved.parent / "again"
    for name in ("model_index.json", "pipeline.py", "filter_head/minim_filter.py", "filter_head/config.json"):
        assert (again / name).read_bytes() == (saved / name).read_bytes(), name
    code = """
told["again"] = draw(DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER, trust_remote_code=True))
from huggingface_hub import snapshot_download
kept = snapshot_download("org/minim", local_files_only=True)
told["cached"] = draw(DiffusionPipeline.from_pretrained(kept, custom_pipeline=kept, trust_remote_code=True))
"""
    told = run(offline, code, False, again)
    assert told["again"] == told["cached"] == packaged["class"]


@pytest.fixture(scope="module")
def other(online) -> list:
    """What `org/other` draws in a process that knows nothing else."""
    return run(online, f'told["other"] = draw(DiffusionPipeline.from_pretrained("org/other", {OTHER}))', False)[
        "other"
    ]


@pytest.mark.parametrize("package", [False, True])
def test_two_repositories_of_different_versions_do_not_mix(online, packaged, other, package, tmp_path):
    assert other != packaged["class"]
    code = f"""
first = DiffusionPipeline.from_pretrained("org/minim", {"" if package else REMOTE})
second = DiffusionPipeline.from_pretrained("org/other", {OTHER})
told["first"], told["second"] = draw(first), draw(second)
told["heads"] = [origin(first.filter_head), origin(second.filter_head)]
import pathlib
for name, pipe in (("first", first), ("second", second)):
    folder = str(pathlib.Path({str(tmp_path)!r}) / name)
    pipe.save_pretrained(folder)
    told[name + " again"] = draw(DiffusionPipeline.from_pretrained(
        folder, custom_pipeline=folder, trust_remote_code=True))
told["first afterwards"] = draw(first)
"""
    told = run(online, ("import minim_pipeline.pipeline_minim\n" if package else "") + code, package)
    assert told["first"] == told["first again"] == told["first afterwards"] == packaged["class"]
    assert told["second"] == told["second again"] == other
    assert told["heads"] == ["minim_pipeline" if package else "diffusers_modules", "diffusers_modules"]


def test_stable_diffusion_as_the_base_loads_without_the_package_once_saved(packaged, unpackaged):
    assert unpackaged["base"] == packaged["base"] != packaged["class"]
