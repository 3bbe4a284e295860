"""Publishing: huggingface_hub's real client in processes of its own, against a Hub on loopback."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from fresh import Child, Nursery
from hub_server import Hub, environment

from minim_pipeline.files import write_report


TRAIN = ROOT / "train"
# Runs push_to_hub.py once for each (token, arguments), and prints what each came to.
DRIVER = """
import contextlib, io, json, os, sys
sys.path.insert(0, sys.argv[1])
import push_to_hub
results = []
for token, arguments in json.loads(sys.argv[2]):
    os.environ.pop("HF_TOKEN", None)
    if token: os.environ["HF_TOKEN"] = token
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            push_to_hub.main(arguments)
        results.append(["done", output.getvalue()])
    except SystemExit as stop:
        results.append(["refused", str(stop)])
print(json.dumps(results))
"""
CARD = """---
license: other
license_name: house
library_name: diffusers
pipeline_tag: text-to-image
tags: [medical]
datasets: [odir-5k]
---

# Tiny

`MinimPipeline.from_pretrained("org/minim")` draws it.
"""
REPORT = {
    "generated": {"new": {"balanced_accuracy": 0.5, "modalities": {"oct": {"balanced_accuracy": 0.25}}}},
}


@pytest.fixture(scope="module")
def models(make_pipeline, tmp_path_factory) -> Path:
    """Folders of tiny pipelines: `full` with card and report beside it, and `bare` without a filter head."""
    folder = tmp_path_factory.mktemp("models")
    make_pipeline(filtered=True).save_pretrained(folder / "full")
    (folder / "full" / "README.md").write_text(CARD)
    write_report(folder / "full" / "report.json", REPORT)
    make_pipeline().save_pretrained(folder / "bare")
    return folder


@pytest.fixture(scope="module")
def server():
    started = Hub(writers={"hf_good": {"me", "org"}, "poor": {"me"}})
    yield started
    started.close()


@pytest.fixture(scope="module")
def clients(server, tmp_path_factory):
    """Starts processes that reach the Hub, without a token."""
    started = Nursery(environment(server, tmp_path_factory.mktemp("hf"), None))
    yield started
    started.close()


@pytest.fixture
def hub(server):
    """The Hub, empty."""
    server.forget()
    return server


def push(clients: Nursery, *cases: tuple) -> list[tuple[str, str]]:
    """What came of each (token, arguments)."""
    told = json.dumps([(token, [str(a) for a in arguments]) for token, arguments in cases])
    done = clients.run("-c", DRIVER, TRAIN, told)
    assert done.returncode == 0, done.stderr
    return [tuple(result) for result in json.loads(done.stdout.splitlines()[-1])]


def front_matter(readme: bytes) -> dict:
    return yaml.safe_load(readme.decode().split("---\n")[1])


def test_what_lies_in_a_published_repository(hub, clients, models):
    full, bare = ["--model", models / "full"], ["--model", models / "bare"]
    into = ["--repo-id", "org/minim", "--samples", "1"]
    results = push(
        clients,
        ("hf_good", [*full, *into, "--private"]),
        ("hf_good", [*bare, *into, "--revision", "v2"]),
        ("hf_good", [*bare, *into, "--create-pr"]),
        ("hf_good", [*full, *into]),
        ("hf_good", [*bare, *into]),
    )
    assert [what for what, _ in results] == ["done"] * 5, results
    repository = hub.repositories["models/org/minim"]
    assert repository.private
    first, second = list(repository.commits.values())[1], hub.files("models/org/minim", "v2")
    assert {"model_index.json", "pipeline.py", "README.md", "report.json", "filter_head/minim_filter.py"} <= set(first)
    for part in ("unet", "vae"):
        halves, whole = (
            len(first[f"{part}/diffusion_pytorch_model{variant}.safetensors"]) for variant in (".fp16", "")
        )
        assert halves < whole
    assert "text_encoder/model.fp16.safetensors" in first and "samples/oct-0.png" in first
    assert not [path for path in first if path.endswith((".bin", ".pt", ".pkl"))]

    data = front_matter(first["README.md"])
    assert data["license"] == "other" and data["datasets"] == ["odir-5k"]
    measured = data["model-index"][0]["results"]
    assert [m["value"] for r in measured for m in r["metrics"]] == [0.5, 0.25]
    assert b'from_pretrained("org/minim")' in first["README.md"] and b"without a filter head" not in first["README.md"]
    assert {w["output"]["url"] for w in data["widget"]} == {path for path in first if path.startswith("samples/")}
    published = json.loads(first["report.json"])
    assert next(iter(published)) == "schema_version" and published["generation"] == REPORT

    assert "filter_head/config.json" not in second and b"without a filter head" in second["README.md"]
    index = json.loads(second["model_index.json"])
    assert index["filter_head"] == [None, None]
    pull = hub.files("models/org/minim", "refs/pr/1")
    assert "discussions/1" in results[2][1] and pull["model_index.json"] == second["model_index.json"]
    # The third commit to main took away what the first had and it has not: no file of an old part stays behind.
    last = hub.files("models/org/minim")
    assert not [path for path in last if path.startswith("filter_head/")] and "report.json" not in last
    assert ".gitattributes" in last


def test_whoever_may_not_is_told_in_a_line_and_nothing_is_uploaded(hub, clients, models, tmp_path):
    from hub_server import Repository

    for key, files in {
        "datasets/org/data": {},
        "models/org/other": {"model_index.json": b'{"_class_name": "FluxPipeline"}'},
        "models/org/ours": {"model_index.json": b'{"_class_name": "MinimPipeline"}'},
    }.items():
        hub.repositories[key] = Repository()
        hub.repositories[key].commit(files)
    (tmp_path / "card.md").write_text(CARD.replace("license_name: house\n", "").replace("tags: [medical]\n", ""))
    (tmp_path / "broken.md").write_text("---\nlicense: [\n---\n# x\n")
    write_report(tmp_path / "report.json", REPORT | {"data": "/home/ann/patients/data.csv"})
    model = ["--model", models / "full"]
    cases = {
        "There is no token": (None, [*model, "--repo-id", "org/new"]),
        "the token is not valid": ("forged", [*model, "--repo-id", "org/new"]),
        "Could not write to org/new: the token has no right to": ("poor", [*model, "--repo-id", "org/new"]),
        "Could not write to org/ours: the token has no right to": ("poor", [*model, "--repo-id", "org/ours"]),
        "org/data is a dataset on the Hub, not a model": ("hf_good", [*model, "--repo-id", "org/data"]),
        "org/data is a dataset on the Hub, not a space": (
            "hf_good",
            [*model, "--repo-id", "org/new", "--space-id", "org/data"],
        ),
        "org/other holds a FluxPipeline": ("hf_good", [*model, "--repo-id", "org/other"]),
        "'a/b/c' is no id of a repository": ("hf_good", [*model, "--repo-id", "a/b/c"]),
        "card.md lacks tags, license_name": (
            "hf_good",
            [*model, "--repo-id", "org/new", "--card", tmp_path / "card.md"],
        ),
        "broken.md is no model card": ("hf_good", [*model, "--repo-id", "org/new", "--card", tmp_path / "broken.md"]),
        "report.json names '/home/ann/patients/data.csv'": (
            "hf_good",
            [*model, "--repo-id", "org/new", "--report", tmp_path / "report.json"],
        ),
        "it holds no model_index.json": ("hf_good", ["--model", tmp_path, "--repo-id", "org/new"]),
    }
    results = push(clients, *cases.values())
    for expected, (what, told) in zip(cases, results, strict=True):
        assert what == "refused" and expected in told and "\n" not in told, (expected, told)
    assert not hub.uploads and set(hub.repositories) == {"datasets/org/data", "models/org/other", "models/org/ours"}
    assert all(len(repository.commits) == 1 for repository in hub.repositories.values())
    unreachable = environment(hub, tmp_path / "hf", "hf_good") | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    command = [sys.executable, str(TRAIN / "push_to_hub.py"), "--model", str(models / "full"), "--repo-id", "org/new"]
    done = subprocess.run(command, env=unreachable, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Could not reach the Hub: the connection failed" in done.stderr.splitlines()[-1]


def test_an_upload_that_was_killed_is_completed_by_the_next(hub, clients, models):
    def start(model: str) -> Child:
        command = [TRAIN / "push_to_hub.py", "--model", models / model, "--repo-id", "org/minim", "--samples", 0]
        return clients.start(*command, HF_TOKEN="hf_good")

    def kill_in_the_middle(model: str, after: int) -> None:
        hub.hold_after = len(hub.uploads) + after
        process = start(model)
        while len(hub.uploads) < hub.hold_after:
            assert process.poll() is None, process.said()
            time.sleep(0.05)
        process.kill()
        process.wait()
        hub.release()

    kill_in_the_middle("bare", 2)
    assert set(hub.files("models/org/minim")) == {".gitattributes"}, "no model_index.json without its files"
    assert start("bare").wait() == 0
    before = hub.files("models/org/minim")
    assert "model_index.json" in before and len(hub.uploads) <= 8, "what had come through was sent again"

    kill_in_the_middle("full", 1)
    assert hub.files("models/org/minim") == before, "the old version stays whole"


def test_a_space_and_a_place_for_ratings(hub, clients, models):
    arguments = ["--model", models / "full", "--repo-id", "org/minim", "--samples", "0"]
    arguments += ["--space-id", "org/pages", "--ratings-dataset-id", "org/ratings"]
    results = push(clients, ("hf_good", arguments), ("hf_good", arguments))
    assert [what for what, _ in results] == ["done", "done"], results
    space = hub.files("spaces/org/pages")
    assert {"app.py", "README.md", "requirements.txt", "minim_pipeline/pipeline_minim.py"} <= set(space)
    assert not [path for path in space if path.endswith(".safetensors") or "__pycache__" in path]
    data = front_matter(space["README.md"])
    assert (data["sdk"], data["models"], data["datasets"]) == ("gradio", ["org/minim"], ["org/ratings"])
    variables = hub.repositories["spaces/org/pages"].variables
    assert variables == {"MINIM_MODEL": "org/minim", "MINIM_RATINGS_REPO": "org/ratings"}
    assert hub.repositories["datasets/org/ratings"].private
    assert "secret HF_TOKEN" in results[0][1] and not any(b"hf_good" in data for data in space.values())


def test_a_dry_run_lists_every_file_and_asks_nothing(models, capsys):
    import push_to_hub

    push_to_hub.main(["--model", str(models / "full"), "--repo-id", "org/minim", "--dry-run", "--space-id", "org/x"])
    lines = capsys.readouterr().out.splitlines()
    listed = {line.split()[1]: int(line.split()[0].replace(",", "")) for line in lines if line.startswith(" ")}
    weights = models / "full" / "unet" / "diffusion_pytorch_model.safetensors"
    assert listed["unet/diffusion_pytorch_model.safetensors"] == weights.stat().st_size
    assert {"README.md", "pipeline.py", "app.py"} <= set(listed)


def test_push_to_hub_of_the_pipeline_does_the_same(hub, clients, models):
    code = """
import sys
import torch
from minim_pipeline import MinimPipeline
pipe = MinimPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
print(pipe.push_to_hub("org/direct", private=True))
with torch.no_grad():
    next(pipe.unet.parameters()).add_(1)
pipe.push_to_hub("org/changed", commit_message="another model")
pipe = MinimPipeline.from_pretrained("org/direct")
pipe.set_progress_bar_config(disable=True)
pipe.push_to_hub("org/copy")
with torch.no_grad():
    next(pipe.unet.parameters()).add_(1)
pipe.push_to_hub("org/tuned")
try:
    pipe.push_to_hub("org/pickles", safe_serialization=False)
except ValueError as error:
    print(error)
sys.path.insert(0, sys.argv[2])
import push_to_hub
push_to_hub.main(["--model", sys.argv[1], "--repo-id", "org/script"])
"""
    done = clients.run("-c", code, models / "full", TRAIN, HF_TOKEN="hf_good")
    assert done.returncode == 0, done.stderr
    assert "/models/org/direct/commit/" in done.stdout and "pickles" in done.stdout
    ours, theirs = hub.files("models/org/direct"), hub.files("models/org/script")
    assert set(ours) == set(theirs)
    assert hub.repositories["models/org/direct"].private
    for path in ours:
        if not path.endswith(".png") and path != "README.md":
            assert ours[path] == theirs[path], path
    # What came from the Hub keeps its card and licence; what was trained from there names it.
    assert front_matter(hub.files("models/org/copy")["README.md"])["license_name"] == "house"
    tuned = front_matter(hub.files("models/org/tuned")["README.md"])
    assert tuned["base_model"] == "org/direct" and tuned["license_name"] == "house"
    # Other weights than those that the card and the figures are about.
    changed = hub.files("models/org/changed")
    assert "report.json" not in changed and front_matter(changed["README.md"])["license_name"] == "house"


def test_a_training_script_publishes_what_it_made(hub, clients, tmp_path):
    from PIL import Image

    rows = ["path,Text,modality,split"]
    for i in range(6):
        Image.new("L", (32, 32), 40 * i).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,Edema.,OCT,{'val' if i > 3 else 'train'}")
    (tmp_path / "data.csv").write_text("\n".join(rows))
    options = ["--train_data", str(tmp_path / "data.csv"), "--output_dir", str(tmp_path / "eyes")]
    options += ["--preset", "tiny", "--resolution", "32", "--crop", "32"]
    options += ["--train_batch_size", "2", "--max_train_steps", "1"]
    code = """
import json, os, pathlib, sys
sys.path.insert(0, sys.argv[1])
import train_autoencoder
options = json.loads(sys.argv[2])
told = []
for token, arguments in [("", ["--hub_model_id", "org/eyes"]), ("forged", ["--push_to_hub"])]:
    os.environ["HF_TOKEN"] = token
    try:
        train_autoencoder.main([*options, *arguments])
    except ValueError as error:
        told.append([str(error), pathlib.Path(options[3]).exists()])
os.environ["HF_TOKEN"] = "hf_good"
train_autoencoder.main([*options, "--push_to_hub", "--hub_model_id", "org/eyes"])
print(json.dumps(told))
"""
    done = clients.run("-c", code, TRAIN, json.dumps(options))
    assert done.returncode == 0, done.stderr
    (useless, _), (forged, trained) = json.loads(done.stdout.splitlines()[-1])
    assert "without --push_to_hub" in useless
    assert "the token is not valid" in forged and not trained, "told before training"
    files = hub.files("models/org/eyes")
    assert set(files) == {".gitattributes", "README.md", "vae/config.json", "vae/diffusion_pytorch_model.safetensors"}
    assert b"train_autoencoder.py" in files["README.md"] and str(tmp_path).encode() not in files["vae/config.json"]
