"""Studies, by real requests: who may see what, what is assigned and stored, and what simulated readers come to."""

import csv
import io
import re
import time
from collections import Counter
from urllib.parse import urlencode

import numpy as np
import pytest
from rating_images import WHOLE, read_folder
from starlette.applications import Starlette
from starlette.testclient import TestClient
from studies import Studies
from study_drawing import Prompts
from study_page import host_routes, reader_routes
from study_plan import Plan, assign
from test_space import write_folder

from minim_pipeline.ratings import RatingStore
from minim_pipeline.training.filter.raters import read_ratings


HOST = "the-host's-own-token"
FORM = {
    "token": HOST,
    "title": "Turing <test>",
    "question": "real_or_synthetic",
    "images": "made",
    "real": "real",
    "raters": "Ann\nBob\nCleo",
    "each": "60",
    "overlap": "1",
    "repeat_share": "0.25",
    "real_share": "0.5",
    "order": "random",
}
PLAN = Plan("t", "quality", "made", ("ann", "bob"), 10, overlap=0.4, repeat_share=0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("images")
    return {name: write_folder(home / name, 60, modality=kind) for name, kind in (("made", "OCT"), ("real", "OCT"))}


@pytest.fixture
def open_space(folders, tmp_path):
    """Starts the pages anew on the same folder of studies."""

    def start() -> TestClient:
        studies = Studies(tmp_path / "studies", folders, WHOLE)
        return TestClient(Starlette(routes=[*reader_routes(studies), *host_routes(studies, HOST)]))

    return start


def post_form(client: TestClient, **changes: str):
    return client.post("/studies", content=urlencode(FORM | changes), follow_redirects=False)


def make(client: TestClient, **changes: str) -> tuple[str, dict[str, str]]:
    """A study's page, with the host's token, and the readers' tokens by name."""
    answer = post_form(client, **changes)
    assert answer.status_code == 303, answer.text
    place = "/" + answer.headers["location"]
    return place, {n: t for t, n in re.findall(r'study\?token=([\w-]+)"[^>]*>link for (\w+)', client.get(place).text)}


def answer_all(client: TestClient, token: str, decide) -> int:
    """Answers what a reader is shown by `decide(item)`; returns how many."""
    told = client.post(f"/study/{token}/next", json={"rater": "x"}).json()
    while told["next"]:
        item = told["next"][0]
        shown = {"rater": "x", "image": item["image"], "turn": item["turn"]}
        answer = client.post(f"/study/{token}/rating", json=shown | {"rating": decide(item), "seconds": 1})
        assert answer.status_code == 200
        told = answer.json()
    return told["done"]


@pytest.fixture(scope="module")
def images(folders):
    return [
        image for kind, name in (("generated", "made"), ("real", "real")) for image in read_folder(folders[name], kind)
    ]


def test_readers_share_as_many_images_as_was_asked_for(images):
    own = assign(PLAN, images, 1)
    ann, bob = ({image.path for image, _ in own[name]} for name in ("ann", "bob"))
    assert len(ann) == len(bob) == 10 and len(ann & bob) == 4
    assert own == assign(PLAN, images, 1) != assign(PLAN, images, 2)
    mixed = Plan("t", "quality", "made", ("ann", "bob"), 40, "real", 1, 0.2, 0.25, "given")
    shown = assign(mixed, images, 1)["ann"]
    assert Counter(image.kind for image, turn in shown if not turn) == {"generated": 30, "real": 10}
    assert sum(turn for _, turn in shown) == 8
    first = [image.path for image, turn in shown if not turn and image.kind == "generated"]
    assert first == sorted(first), "as in data.csv"
    with pytest.raises(ValueError, match="76 generated images are needed, there are 60: let each reader have fewer"):
        assign(Plan("t", "quality", "made", ("ann", "bob"), 40, overlap=0.1), images, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"title": " "}, "title has to have 1 to 80 characters, got 0"),
        ({"question": "beauty"}, "question has to be one of quality, congruence, real_or_synthetic, got &#39;beauty"),
        ({"raters": "Ann\nAnn"}, "readers of different names are needed, got 2"),
        ({"raters": "x" * 81}, "1 to 80 characters"),
        ({"each": "many"}, "each has to be a number, got &#39;many"),
        ({"each": "5001"}, "have to be 1 to 5000, got 5001"),
        ({"overlap": "0"}, "90 generated images are needed, there are 60"),
        ({"overlap": "nan"}, "overlap has to be in [0, 1], got nan"),
        ({"real": ""}, "needs a folder of real images"),
        ({"images": "../../etc"}, "folder has to be one of made, real, got &#39;../../etc"),
    ],
)
def test_a_host_is_told_what_is_wrong_with_a_plan(open_space, changes, message):
    answer = post_form(open_space(), **changes)
    assert answer.status_code == 422 and message in answer.text and "/tmp" not in answer.text
    assert ('value="0.25"' in answer.text) and "<option" in answer.text, "what was filled in is still there"


def test_a_folder_that_cannot_be_read_says_nothing_of_the_machine(tmp_path, capsys):
    studies = Studies(tmp_path / "studies", {"made": tmp_path / "gone"}, WHOLE)
    client = TestClient(Starlette(routes=host_routes(studies, HOST)))
    answer = post_form(client, real="", real_share="0")
    assert answer.status_code == 422 and "made cannot be read" in answer.text and str(tmp_path) not in answer.text
    assert str(tmp_path) in capsys.readouterr().err


def test_three_simulated_readers_come_back_with_their_agreement_and_auroc(open_space, images, tmp_path, monkeypatch):
    # Who sees what is by chance, and one interval of twenty misses: the same chance every time.
    monkeypatch.setattr("secrets.randbits", lambda bits: 1)
    client = open_space()
    place, tokens = make(client)
    assert list(tokens) == ["Ann", "Bob", "Cleo"]
    real = {image.id: image.kind == "real" for image in images}
    g = np.random.default_rng(5)
    seen = {name: g.normal() + 1.2 * is_real for name, is_real in real.items()}  # what all of them see of an image

    def reader(bias: float, noise: float):
        return lambda item: 1 + int(np.digitize(seen[item["image"]] + bias + noise * g.normal(), (0.2, 1.0)))

    readers = {"Ann": (0.0, 0.3), "Bob": (0.3, 0.6), "Cleo": (-0.3, 1.0)}
    for name, (bias, noise) in readers.items():
        assert answer_all(client, tokens[name], reader(bias, noise)) == 75
        client = open_space()  # whoever starts the server again finds everything
    # What would come out of very many images and answers.
    n = 400_000
    kinds = np.arange(n) % 2
    many = g.normal(size=n) + 1.2 * kinds
    told = [1 + np.digitize(many + b + e * g.normal(size=n), (0.2, 1.0)) for b, e in readers.values()]
    results = client.get(place.replace("?", "/results?")).json()
    for name, answers in zip(readers, told, strict=True):
        share = [[(answers[kinds == k] == level).mean() for level in (1, 2, 3)] for k in (0, 1)]
        auroc = sum(share[1][a] * share[0][b] * (1 if a > b else 0.5) for a in range(3) for b in range(a + 1))
        low, high = results["all"]["raters"][name]["auroc"]["interval"]
        assert low < auroc < high
    for pair in results["all"]["pairs"]:
        a, b = (told[list(readers).index(name)].astype(float) for name in pair["raters"])
        chance = (a**2).mean() + (b**2).mean() - 2 * a.mean() * b.mean()
        assert pair["n"] == 60 and pair["interval"][0] < 1 - ((a - b) ** 2).mean() / chance < pair["interval"][1]
    assert results["all"]["consistency"]["n"] == 45 and set(results["modalities"]) == {"oct"}
    page = client.get(place).text
    assert "Turing &lt;test&gt;" in page and "75 of 75" in page
    auroc = results["all"]["auroc"]
    assert f"{auroc['value']:.2f} ({auroc['interval'][0]:.2f} to {auroc['interval'][1]:.2f})" in page

    answer = client.get(place.replace("?", "/ratings.csv?"))
    assert answer.headers["content-type"].startswith("text/csv") and str(tmp_path) not in answer.text
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert len(rows) == 225 and {row["question"] for row in rows} == {"real_or_synthetic"}
    (tmp_path / "studies" / "given.csv").write_text(answer.text)
    assert len(read_ratings(tmp_path / "studies" / "given.csv")) == 225, "train_filter.py takes it"


def test_without_or_with_a_foreign_token_every_address_is_closed(open_space, tmp_path):
    client = open_space()
    place, tokens = make(client, each="20", overlap="0", real="", real_share="0")
    _, others = make(client, raters="Ann", each="20")
    identity = place.split("/")[2].split("?")[0]
    store = RatingStore(tmp_path / "studies" / f"{identity}.sqlite")
    item = client.post(f"/study/{tokens['Ann']}/next", json={"rater": "x"}).json()["next"][0]
    shown = {"rater": "Ann", "image": item["image"], "turn": item["turn"]}
    said = shown | {"rating": 3, "seconds": 1}
    for wrong in ("", "x", HOST[:-1], tokens["Ann"], HOST + "\u00e9"):
        for page in ("/studies", *(f"/studies/{identity}{part}" for part in ("", "/results", "/ratings.csv"))):
            answer = client.get(page, params={"token": wrong})
            assert answer.status_code == 403 and "Turing" not in answer.text and tokens["Bob"] not in answer.text
        assert post_form(client, token=wrong).status_code == 403
    assert client.get("/studies").status_code == 403
    for wrong in ("x", HOST, identity):
        for answer in (
            client.get("/study", params={"token": wrong}),
            client.get(f"/study/{wrong}/about"),
            client.get(f"/study/{wrong}/modalities"),
            client.get(f"/study/{wrong}/image/{item['image']}"),
            client.post(f"/study/{wrong}/next", json={"rater": "Ann"}),
            client.post(f"/study/{wrong}/skip", json=shown),
            client.post(f"/study/{wrong}/rating", json=said),
        ):
            assert answer.status_code == 403 and "not known" in answer.text
    assert client.get("/study").status_code == 403

    # Another reader of the same study: neither the images nor the name are theirs. One of another study, who may have
    # been given the same image there, says nothing here.
    assert client.get(f"/study/{tokens['Bob']}/image/{item['image']}").status_code == 404
    assert client.post(f"/study/{tokens['Bob']}/rating", json=said).status_code == 422
    client.post(f"/study/{others['Ann']}/rating", json=said)
    assert store.answers() == []
    assert client.post(f"/study/{tokens['Ann']}/rating", json=said | {"rater": "Bob"}).status_code == 200
    assert [(r.rater, r.question) for r in store.answers()] == [("Ann", "real_or_synthetic")]
    told = client.post(f"/study/{tokens['Bob']}/next", json={"rater": "Ann"}).json()
    assert told["done"] == 0 and told["last"] == [], "nobody sees what another has said"


def test_no_address_is_left_open(open_space):
    client = open_space()
    identity = make(client)[0].split("/")[2].split("?")[0]
    refused = set()
    for route in client.app.routes:
        for method in route.methods - {"HEAD"}:
            answer = client.request(method, route.path.format(token="x", id=identity), params={"token": "x"}, json={})
            assert answer.status_code == 403, route.path
            refused.add((method, route.path))
    assert len(refused) == 12


def test_what_is_too_long_or_not_there_is_refused(open_space):
    client = open_space()
    assert post_form(client, title="x" * 20_000).status_code == 413
    assert client.get("/studies/nothing", params={"token": HOST}).status_code == 404
    _, tokens = make(client, each="10")
    page = client.get("/study", params={"token": tokens["Ann"]})
    assert page.status_code == 200 and page.headers["referrer-policy"] == "no-referrer"
    about = client.get(f"/study/{tokens['Ann']}/about").json()
    assert about["question"] == "Is this image real or synthetic?" and about["rater"] == "Ann"
    assert len(about["answers"]) == 3 and "real" not in client.get(f"/study/{tokens['Ann']}/modalities").text


def test_images_of_prompts_are_drawn_before_the_study_opens(pipeline_dir, tmp_path):
    prompts = tmp_path / "asked.csv"
    prompts.write_text("Text,modality,num_images\ncyst,OCT,2\neffusion,CXR,2\n")

    def start() -> tuple[Studies, TestClient]:
        studies = Studies(tmp_path / "studies", {}, WHOLE, Prompts({"asked.csv": prompts}, str(pipeline_dir)))
        return studies, TestClient(Starlette(routes=[*reader_routes(studies), *host_routes(studies, HOST)]))

    studies, client = start()
    asked = {"images": "asked.csv", "real": "", "real_share": "0", "question": "congruence"}
    assert "5 generated images are needed, there are 4" in post_form(client, **asked, each="5").text
    answer = post_form(client, **asked, each="4")
    assert answer.headers["location"].startswith("studies?token=")
    assert "being drawn" in client.get("/studies", params={"token": HOST}).text or studies.open
    for _ in range(600):
        if studies.open or studies.failed:
            break
        time.sleep(0.1)
    assert list(studies.open) and not studies.pending and not studies.failed
    (token,) = (token for token, (_, rater) in studies.readers.items() if rater == "Ann")
    assert answer_all(client, token, lambda item: 2) == 4
    # Killed before it was all there, and started again: the same images, the study as it was.
    (identity,) = studies.open
    (tmp_path / "studies" / f"{identity}.json").write_text("{}")
    studies, client = start()
    assert list(studies.open) == [identity] and not list((tmp_path / "studies").glob("*.json"))
    page = client.get(f"/studies/{identity}/ratings.csv", params={"token": HOST}).text
    assert {row["path"].split("/")[0] for row in csv.DictReader(io.StringIO(page))} == {identity}
    prompts.write_text("Text,modality\ncyst,sonar\n")
    answer = post_form(client, **asked, each="1")
    assert "asked.csv cannot be read" in answer.text and str(tmp_path) not in answer.text


def test_a_study_whose_images_are_gone_is_told_and_left_out(open_space, folders, tmp_path, capsys):
    client = open_space()
    make(client, each="10")
    (tmp_path / "studies" / "notes.sqlite").write_text("no database " * 100)
    gone = Studies(tmp_path / "studies", {"made": folders["made"]}, WHOLE)
    said = capsys.readouterr().err
    assert (
        gone.open == {} and "folder has to be one of made, got 'real'" in said and "notes.sqlite is no study" in said
    )
