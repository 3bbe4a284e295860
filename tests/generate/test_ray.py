"""A plan drawn by Ray's actors: the same as by one process, whatever is killed on the way."""

import os
import signal
import socket
import threading
import time
from pathlib import Path

import psutil
import pytest
from pyarrow import parquet

from minim_pipeline.cli import main
from minim_pipeline.generate.options import GenerateOptions, ShardOptions
from minim_pipeline.generate.ray_actors import Drawer, check_answers


ray = pytest.importorskip("ray")
SHARDS = 8


@pytest.fixture
def two_cpus(monkeypatch):
    monkeypatch.setenv("RAY_worker_niceness", "0")  # by default others' tests would come first
    ray.init(num_cpus=2, object_store_memory=80 * 2**20, include_dashboard=False)
    yield
    ray.shutdown()


@pytest.fixture
def run(pipeline_dir):
    def run(out, *options):
        given = ["--model", pipeline_dir, "--device", "cpu", "--modality", "OCT", "--prompt", "edema"]
        given += ["--num-images", 3 * SHARDS - 1, "--shard-size", 3, "--format", "parquet", "--output-dir", out]
        return main(["generate", *map(str, [*given, *options])])

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def said(capfd) -> str:
    """All of it: Ray has its own ideas of where what is printed goes."""
    return "".join(capfd.readouterr())


def kill_one_that_draws(data: Path, killed: list[int]) -> None:
    """Kills an actor of this process while a shard is being written."""
    while not killed:
        time.sleep(0.01)
        drawing = [p for p in psutil.Process().children(recursive=True) if "Drawer.draw" in " ".join(p.cmdline())]
        if drawing and list(data.glob(".*.parquet")):
            os.kill(drawing[0].pid, signal.SIGKILL)
            killed.append(drawing[0].pid)


@pytest.mark.slow
def test_actors_of_which_one_is_killed_make_what_one_process_makes(two_cpus, run, tmp_path, capfd):
    assert run(tmp_path / "one", "--quiet") == 0
    killed = list[int]()
    killer = threading.Thread(target=kill_one_that_draws, args=[tmp_path / "out/data", killed], daemon=True)
    killer.start()
    capfd.readouterr()
    assert run(tmp_path / "out", "--ray") == 0
    assert killed
    assert f"{SHARDS} shards drawn, 0 were there. {3 * SHARDS - 1} images written." in said(capfd)
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
    assert parquet.read_table(tmp_path / "out/data")["id"].to_pylist() == list(range(3 * SHARDS - 1))
    # What an actor finds wrong is one line, too.
    assert run("nowhere://set", "--ray", "--quiet") == 2
    assert "minim generate: error: Protocol not known: nowhere\n" in said(capfd).replace("\r", "")


def test_what_is_wrong_is_one_line(run, tmp_path, capfd):
    for options, message in [
        (["--ray", "here"], "--ray has to be an address such as host:6379 or ray://host:10001, got 'here'"),
        (["--ray", "--device", "cuda:1"], "--device has to be cpu or cuda, got cuda:1"),
    ]:
        capfd.readouterr()
        assert run(tmp_path, *options) == 2
        lines = [line for line in said(capfd).splitlines() if line.startswith("minim generate: error")]
        assert len(lines) == 1 and message in lines[0]
    assert not list(tmp_path.iterdir())


def test_a_cluster_that_does_not_answer_and_a_folder_that_is_not_shared(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(ConnectionError, match=f"No Ray cluster answers at {address}"):
        check_answers(address)
    drawer = Drawer(None, str(tmp_path), GenerateOptions(), ShardOptions())
    with pytest.raises(ValueError, match="--output-dir has to be a folder that all share, or a URL"):
        drawer.draw(0)
