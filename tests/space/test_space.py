"""The Space, started as its host starts it: what browsers ask of it, and what they must not get."""

import csv
import http.client
import json
import re
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from drawing import Drawer
from generate_page import build
from generate_settings import Limits, Settings, check
from PIL import Image
from rating_desk import Answer, RatingDesk
from rating_images import WHOLE, queue, read_folder
from rating_page import routes
from space_server import APP, Server
from starlette.applications import Starlette
from starlette.testclient import TestClient
from studies import Studies
from study_plan import Plan

from minim_pipeline.ratings import Rating, RatingStore


ROOT = APP.parent.parent


def write_folder(folder: Path, count: int, text: str = "cyst", modality: str = "OCT") -> Path:
    folder.mkdir(parents=True)
    with open(folder / "data.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "Text", "modality"])
        for i in range(count):
            Image.new("RGB", (16, 12), (i % 256, 0, 0)).save(folder / f"{i:04d}.png")
            writer.writerow([f"{i:04d}.png", text, modality])
    return folder


@pytest.fixture(scope="module")
def server(nursery, tmp_path_factory):
    started = Server(nursery, tmp_path_factory.mktemp("space"))
    yield started
    started.kill()


def test_it_says_when_it_is_ready_and_with_which_model(server):
    assert server.health["status"] == "ok" and server.health["model"] == "minim-256" and server.health["images"] == 36


def test_the_images_that_come_along_are_synthetic_and_say_so():
    for image in read_folder(APP.parent / "images", "generated"):
        with Image.open(image.file) as opened:
            assert opened.text["synthetic"] == "true" and opened.text["prompt"] == image.text


def test_a_host_is_told_in_a_line_what_is_wrong(nursery, tmp_path):
    wrong = {
        "nowhere": ["--images", "nowhere"],
        "shares have to be in": ["--real_share", "1"],
        "--max_queue has to be at least 1, got 0": ["--max_queue", "0"],
        "--max_requests has to be at least 1, got 0": ["--max_requests", "0"],
        "--password has to have at least 12 characters, got 5": ["--password", "hello"],
        "--host_token has to have at least 12 characters, got 1": ["--host_token", "x"],
        "--study_images: nowhere is no folder": ["--study_images", "nowhere"],
        "Limits have to be at least 1": ["--max_images", "0"],
        "notes.txt is no store of ratings": ["--store", "notes.txt"],
        # Images of a modality that only the model knows are read; then comes the store.
        "more.txt is no store of ratings": ["--model", "model", "--images", "skin", "--store", "more.txt"],
        "error:": ["--host", "256.0.0.1"],
    }
    for name in ("notes.txt", "more.txt"):
        (tmp_path / name).write_text("no database " * 100)
    write_folder(tmp_path / "skin", 1, modality="Skin")
    (tmp_path / "model").mkdir()
    definition = {"name": "Skin", "words": "photo of skin"}
    (tmp_path / "model" / "model_index.json").write_text(json.dumps({"custom_modalities": {"skin": definition}}))
    # One process for all: most of each would be spent on importing.
    code = """
import contextlib, io, json, sys
sys.path.insert(0, sys.argv[1])
import app
told = []
for options in json.loads(sys.argv[2]):
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            app.main(["--store", "ratings.sqlite", *options])
    except SystemExit as stop:
        told.append(errors.getvalue() + str(stop.code))
print(json.dumps(told))
"""
    done = nursery.run("-c", code, APP.parent, json.dumps(list(wrong.values())), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for message, told in zip(wrong, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert message in told and "Traceback" not in told


def test_ratings_of_other_images_of_the_same_names_are_not_taken_for_these(tmp_path):
    store = RatingStore(tmp_path / "r.sqlite")
    first = RatingDesk(store, read_folder(write_folder(tmp_path / "a", 2), "generated"))
    item = first.upcoming("ann")["next"][0]
    first.take(Answer(rater="ann", image=item["image"], turn=0, rating=3, seconds=1))
    Image.new("RGB", (16, 12), "green").save(tmp_path / "a" / store.ratings()[0].path)
    with pytest.raises(ValueError, match="ratings of another 000.*choose another --store"):
        RatingDesk(store, read_folder(tmp_path / "a", "generated"))


def test_of_many_images_the_broken_ones_are_found_after_the_start(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("rating_images.AT_ONCE", 3)
    folder = write_folder(tmp_path / "many", 4)
    (folder / "0001.png").write_text("no image")
    images = read_folder(folder, "generated")
    assert len(images) == 4 and capsys.readouterr().err == ""
    desk = RatingDesk(RatingStore(tmp_path / "r.sqlite"), images)
    broken = next(image for image in images if image.path == "0001.png")
    with TestClient(Starlette(routes=routes(desk))) as client:
        answer = client.get(f"/rate/image/{broken.id}")
        assert answer.status_code == 404 and answer.json() == {"error": "This image cannot be shown."}
        assert client.post("/rate/next", json={"rater": "ann"}).json()["total"] == 4
        desk.check(images, "many")
        told = client.post("/rate/next", json={"rater": "ann"}).json()
    assert told["total"] == 3 and broken.id not in {item["image"] for item in told["next"]}
    said = capsys.readouterr().err
    assert "many: broken image" in said and "0001.png" in said and "it is not shown" in said
    (folder / "0002.png").unlink()
    with pytest.raises(ValueError, match="row 3.*no image .*0002.png"):
        read_folder(folder, "generated")


def test_every_rater_has_an_order_of_their_own_which_stays(tmp_path):
    images = read_folder(write_folder(tmp_path / "made", 40), "generated")
    images += read_folder(write_folder(tmp_path / "real", 40), "real")
    shown = queue(images, "ann", real_share=0.2, repeat_share=0.1)
    assert shown == queue(images, "ann", 0.2, 0.1) != queue(images, "bob", 0.2, 0.1)
    first = [image for image, turn in shown if turn == 0]
    assert len(set(first)) == len(first) == 50 and sum(image.kind == "real" for image in first) == 10
    again = [(i, image) for i, (image, turn) in enumerate(shown) if turn == 1]
    assert len(again) == 5
    assert min(i - shown.index((image, 0)) for i, image in again) > 10, "not at once"
    assert queue(images[:8], "ann", 0.2, 1.0) == queue(images[:8], "ann", 0.2, 0.0), "too few for any to come again"


def test_what_the_store_would_refuse_is_told_before_anybody_rates(tmp_path):
    with pytest.raises(ValueError, match="row 1.*1 to 1000 characters"):
        read_folder(write_folder(tmp_path / "made", 1, text="x" * 1001), "generated")


@pytest.mark.parametrize("candidates", [1, 3])
def test_what_was_left_out_are_the_candidates_that_did_not_come_back(make_pipeline, candidates):
    drawer = Drawer(make_pipeline(filtered=True), "model", "revision")
    settings = Settings("oct", "normal", images=2, seed=7, steps=2, guidance=1.0, candidates=candidates)
    output, others = drawer.draw(settings, lambda *progress, **told: None)
    assert len(others) == len(set(others)) == 2 * (candidates - 1) and not set(others) & set(output.seeds)
    again = drawer.pipe.draw_seeds([0, 1], 3, [torch.Generator().manual_seed(seed) for seed in (7, 8)])
    assert candidates == 1 or sorted(others + output.seeds) == sorted(again)


def page(pipe, **limits):
    """The page's events by the names of their functions, and the values that its controls begin with."""
    import gradio as gr

    with gr.Blocks() as demo:
        build(Drawer(pipe, "model", "revision"), Limits(**limits))
    events = {event.fn.__name__: event for event in demo.fns.values() if event.fn is not None}
    return events, [component.value for component in events["on_draw"].inputs]


def test_all_that_touches_the_pipeline_waits_in_one_queue(make_pipeline):
    events, _ = page(make_pipeline(filtered=True))
    queues = {(events[name].concurrency_id, events[name].concurrency_limit) for name in ("on_draw", "on_look")}
    assert len(queues) == 1 and next(iter(queues))[1] == 1


@pytest.mark.parametrize(("filtered", "images"), [(False, 8), (True, 1), (False, 1)])
def test_a_model_without_a_filter_and_a_single_image_can_be_served(make_pipeline, filtered, images):
    events, values = page(make_pipeline(filtered=filtered), images=images)
    values[1] = "cyst"
    shown, told = events["on_draw"].fn(*values, progress=lambda *progress, **told: None)[:2]
    shown = shown["value"]
    assert len(shown) == min(4, images) and f"{len(shown)} images" in told


def test_nothing_sent_to_the_browser_tells_real_from_generated(tmp_path):
    made, real = (read_folder(write_folder(tmp_path / kind, 1), kind)[0] for kind in ("generated", "real"))
    assert made.path == real.path and made.id != real.id and "real" not in real.id
    assert made.read() == real.read() and made.read()[:4] == b"\x89PNG" and b"tEXt" not in made.read()


def test_a_rating_is_stored_and_the_next_images_are_told(server):
    status, told = server.post("/rate/next", {"rater": "  Dr Ann "})
    assert status == 200 and told["done"] == 0 and len(told["next"]) == 6
    item = told["next"][0]
    assert set(item) == {"image", "turn", "text", "modality", "rating"}, "blind: neither score nor kind"
    answer = {"rater": "Dr Ann", "image": item["image"], "turn": item["turn"], "rating": 3, "seconds": 1.25}
    status, told = server.post("/rate/rating", answer)
    assert status == 200 and told["done"] == 1 and told["last"][-1]["rating"] == 3
    assert item["image"] not in [(i["image"], i["turn"]) for i in told["next"]]
    stored = RatingStore(server.store).ratings("Dr Ann")
    assert [(r.rating, r.seconds, r.text) for r in stored] == [(3, 1.25, item["text"])]
    with urllib.request.urlopen(f"{server.url}/rate/image/{item['image']}") as image:
        assert image.headers["Content-Type"] == "image/png"


def test_what_cannot_be_judged_is_stored_and_what_is_skipped_comes_last(server):
    status, told = server.post("/rate/next", {"rater": "Zed", "modalities": ["oct", "cxr"]})
    assert status == 200 and {item["modality"] for item in told["next"]} <= {"OCT", "CXR"} and told["total"] < 20
    first, second = told["next"][:2]
    shown = {"rater": "Zed", "modalities": ["oct", "cxr"], "image": first["image"], "turn": first["turn"]}
    status, told = server.post("/rate/skip", shown)
    assert status == 200 and told["done"] == 0 and told["next"][0] == second
    rows = {row["path"]: row for row in csv.DictReader((APP.parent / "images" / "data.csv").open())}
    while told["next"]:
        item = told["next"][0]
        said = {"rating": 0, "seconds": 1, "remark": "too dark"} if item == second else {"rating": 2, "seconds": 2}
        status, told = server.post("/rate/rating", shown | {"image": item["image"], "turn": item["turn"]} | said)
        assert status == 200
    assert item == first and told["done"] == told["total"]
    judged, every = (RatingStore(server.store).ratings("Zed"), RatingStore(server.store).answers("Zed"))
    assert [(r.text, r.remark, r.question) for r in every if r not in judged] == [
        (second["text"], "too dark", "overall"),
    ]
    assert {(r.seed, r.revision) for r in every} <= {(int(row["seed"]), row["revision"]) for row in rows.values()}
    page = urllib.request.urlopen(server.url + "/agreement").read().decode()
    assert "Could not judge" in page


GOOD = {"rater": "eve", "image": "0" * 16, "turn": 0, "rating": 2, "seconds": 1}


@pytest.mark.parametrize(
    ("place", "body", "status", "message"),
    [
        ("/rate/next", b"{", 422, "Invalid JSON"),
        ("/rate/next", {"rater": "   "}, 422, "rater: String should have at least 1 character"),
        ("/rate/next", {"rater": "x" * 81}, 422, "rater: String should have at most 80"),
        ("/rate/rating", GOOD, 422, "not among those to rate"),
        ("/rate/rating", GOOD | {"rating": 4}, 422, "rating: Input should be less than or equal to 3"),
        ("/rate/rating", GOOD | {"image": "../../etc/passwd"}, 422, "not among those to rate"),
        ("/rate/rating", GOOD | {"seconds": -1}, 422, "seconds"),
        ("/rate/rating", GOOD | {"remark": "x" * 501}, 422, "remark: String should have at most 500"),
        ("/rate/skip", {"rater": "eve", "image": "0" * 16, "turn": 0}, 422, "not among those to rate"),
        ("/rate/next", {"rater": "eve", "modalities": ["sonar"]}, 422, "modalities have to be among oct, fundus, "),
        ("/rate/next", {"rater": "eve", "modalities": ["oct"] * 51}, 422, "modalities: List should have at most 50"),
        ("/rate/rating", b" " * 5000, 413, "4000 bytes"),
    ],
)
def test_what_no_browser_of_ours_sends_is_refused_in_words(server, place, body, status, message):
    code, told = server.post(place, body)
    assert code == status and message in told["error"]
    assert RatingStore(server.store).ratings("eve") == []


def test_pages_of_other_sites_cannot_rate_in_a_visitors_name(server):
    request = urllib.request.Request(server.url + "/rate/next", b'{"rater": "ann"}', {"Content-Type": "text/plain"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code == 415


@pytest.mark.parametrize(
    "place",
    [
        "/rate/image/nothing",
        "/pages/../app.py",
        "/pages/%2e%2e/app.py",
        "/gradio_api/file=ratings.sqlite",
        f"/gradio_api/file={APP}",
        "/gradio_api/file=/etc/passwd",
    ],
)
def test_files_of_the_server_stay_there(server, place):
    assert server.store.is_file()
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(server.url + place)
    assert refused.value.code in (403, 404)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modality": "sonar"}, "Choose a modality: oct, cxr (got 'sonar')"),
        ({"prompt": "  "}, "Say what the image is to show"),
        ({"prompt": "None"}, "'None' is no caption"),
        ({"prompt": "x" * 301}, "301 characters, at most 300"),
        ({"images": 9}, "images has to be a whole number from 1 to 8, got '9'"),
        ({"images": 1.5}, "images has to be a whole number"),
        ({"steps": 10**6}, "steps has to be a whole number from 2 to 50"),
        ({"guidance": float("nan")}, "guidance has to be a number from 1 to 10.0, got 'nan'"),
        ({"candidates": "many"}, "candidates has to be a whole number from 1 to 8, got 'many'"),
        ({"seed": None}, "seed has to be a whole number"),
    ],
)
def test_the_server_itself_bounds_what_is_asked_of_it(changes, message):
    asked = {"modality": "oct", "prompt": "cyst", "images": 1, "seed": 0, "steps": 4, "guidance": 3, "candidates": 1}
    assert check(Limits(), ["oct", "cxr"], **asked).prompt == "cyst"
    with pytest.raises(ValueError, match=re.escape(message)):
        check(Limits(), ["oct", "cxr"], **asked | changes)


@pytest.mark.slow
def test_eight_raters_at_once_lose_nothing_when_the_server_is_killed(nursery, tmp_path):
    images = write_folder(tmp_path / "made", 60)
    options = ["--images", str(images), "--repeat_share", "0"]
    acknowledged: dict[str, dict[str, int]] = {f"rater {i}": {} for i in range(8)}
    plan = Plan("half of them", "quality", "images", tuple(acknowledged)[4:], 60, repeat_share=0)
    study = Studies(tmp_path / "ratings" / "studies", {"images": images}, WHOLE).make(plan)
    homes = {rater: f"/study/{study.tokens[rater]}" if rater in study.tokens else "/rate" for rater in acknowledged}
    server = Server(nursery, tmp_path, *options)

    def ratings() -> list[Rating]:
        return RatingStore(server.store).ratings() + study.store.ratings()

    def work(rater: str) -> None:
        try:
            told = server.post(f"{homes[rater]}/next", {"rater": rater})[1]
            while told["next"]:
                item = told["next"][0]
                rating = 1 + hash((rater, item["image"])) % 3
                answer = {"rater": rater, "image": item["image"], "turn": item["turn"], "rating": rating, "seconds": 1}
                status, told = server.post(f"{homes[rater]}/rating", answer)
                assert status == 200
                acknowledged[rater][item["image"]] = rating
                if sum(map(len, acknowledged.values())) == 240:
                    server.kill()
        except (OSError, http.client.HTTPException):
            return  # it was killed

    def all_rate() -> None:
        threads = [threading.Thread(target=work, args=(rater,)) for rater in acknowledged]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    all_rate()
    assert 240 <= sum(map(len, acknowledged.values())) < 480
    ids = {image.path: image.id for image in read_folder(images, "generated")}
    server = Server(nursery, tmp_path, *options)
    try:
        stored = {(r.rater, ids[r.path]): r.rating for r in ratings()}
        for rater, given in acknowledged.items():
            assert all(stored[rater, image] == rating for image, rating in given.items()), "every acknowledged one"
        all_rate()  # and each goes on with what is left
    finally:
        server.kill()
    assert len(ratings()) == len({(r.rater, r.path, r.turn) for r in ratings()}) == 480


def test_the_page_on_agreement_counts_and_hides_names(server):
    store = RatingStore(server.store)
    for path, ann, bob in (("a.png", 1, 1), ("b.png", 2, 2), ("c.png", 3, 3)):
        common = {"path": path, "text": "normal", "modality": "cxr"}
        store.add(Rating(rater="Zoe Secret", rating=ann, **common), Rating(rater="Yan Secret", rating=bob, **common))
    page = urllib.request.urlopen(server.url + "/agreement").read().decode()
    assert "Secret" not in page and "<strong>1.00</strong>" in page and "CXR" in page


def test_what_spaces_install_is_what_the_package_needs():
    project = (ROOT / "pyproject.toml").read_text()
    needed = set(json.loads(re.search(r"^dependencies = (\[.*?\])$", project, re.M | re.S)[1].replace(",\n]", "]")))
    needed |= set(json.loads(re.search(r"^space = (\[.*?\])", project, re.M)[1]))
    lines = (APP.parent / "requirements.txt").read_text().splitlines()
    assert needed == {line for line in lines if line and not line.startswith("#")}
