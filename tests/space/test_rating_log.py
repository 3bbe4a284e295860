"""Ratings outlive a Space's disk: huggingface_hub's real client, against a Hub on loopback."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from hub_server import Hub, environment

from minim_pipeline.ratings import Rating, RatingStore


SPACE = ROOT / "space"
# One start of a Space: what it reads back, then some ratings, then a push.
START = """
import sys
sys.path.insert(0, sys.argv[1])
from rating_log import RatingLog
from minim_pipeline.ratings import Rating, RatingStore
store = RatingStore(sys.argv[2] + "/ratings.sqlite")
log = RatingLog(store, sys.argv[2] + "/log", "clinic/ratings", "a token", every=60)
print(log.read_back, len(store.ratings()))
for place, rating in eval(sys.argv[3]):
    given = Rating(rater="Jürgen", path=place, rating=rating, text="zyste 日本", modality="oct")
    store.add(given)
    log.keep(given)
log.push()
"""


@pytest.fixture
def hub():
    started = Hub()
    yield started
    started.close()


def start(hub: Hub, disk: Path, ratings: list) -> str:
    command = [sys.executable, "-c", START, str(SPACE), str(disk), repr(ratings)]
    done = subprocess.run(command, env=environment(hub, disk / "hf"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_space_that_lost_its_disk_has_its_ratings_back(hub, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert start(hub, first, [("a.png", 1), ("b.png", 2)]) == "0 0"
    assert hub.repositories["datasets/clinic/ratings"].private, "names of raters are not for everybody"
    lines = b"".join(data for path, data in hub.files("datasets/clinic/ratings").items() if path.endswith(".jsonl"))
    assert [json.loads(line)["path"] for line in lines.splitlines()] == ["a.png", "b.png"]

    assert start(hub, second, [("b.png", 3), ("c.png", 1)]) == "2 2"
    paths = [path for path in hub.files("datasets/clinic/ratings") if path.endswith(".jsonl")]
    assert len(paths) == 2 and all(path.startswith("ratings/") for path in paths), "a file for each start"
    assert start(hub, tmp_path / "third", []) == "4 3"
    ratings = RatingStore(tmp_path / "third" / "ratings.sqlite").ratings()
    assert {r.path: r.rating for r in ratings} == {"a.png": 1, "b.png": 3, "c.png": 1}, "the last rating counts"
    assert {r.rater for r in ratings} == {"Jürgen"} and {r.text for r in ratings} == {"zyste 日本"}


def test_a_broken_line_is_told_and_the_others_are_read(tmp_path):
    from rating_log import read_lines

    good = Rating(rater="ann", path="a.png", rating=2, text="x", modality="oct")
    line = json.dumps({name: getattr(good, name) for name in ("rater", "path", "rating", "text", "modality")})
    (tmp_path / "x.jsonl").write_text(f'{line}\n{{"rater": \n{line.replace("2", "7")}\n')
    store = RatingStore(tmp_path / "r.sqlite")
    with pytest.warns(UserWarning) as told:
        assert read_lines(store, tmp_path / "x.jsonl") == 1
    assert [str(w.message).split(":")[0] for w in told] == ["x.jsonl, line 2", "x.jsonl, line 3"]
    assert len(store.ratings()) == 1


def test_a_repository_without_a_token_is_told_at_once(tmp_path, monkeypatch, capsys):
    from app import main

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["--ratings_repo", "clinic/ratings"])
    assert stopped.value.code == 2 and "HF_TOKEN" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
