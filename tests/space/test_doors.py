"""The doors before all pages, on a real server: a password, and a limit of requests."""

import base64
import socket
import urllib.error
import urllib.request

import pytest
from app import launch, parse_args
from doors import RateLimit
from starlette.responses import PlainTextResponse
from starlette.routing import Route


PASSWORD = "w\u00f6rd: of the ward"


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    import gradio as gr

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    args = parse_args(["--port", str(port), "--password", PASSWORD, "--max_requests", "60"])
    places = ("/rate", "/rate/next", "/healthz", "/study", "/study/x/about", "/studies", "/studyx", "/agreement")
    with gr.Blocks() as demo:
        gr.Markdown("inside")
    launch(demo, [Route(place, lambda request: PlainTextResponse("inside")) for place in places], args)
    yield f"http://127.0.0.1:{port}"
    demo.close()


def get(address: str, credentials: str | None = None, kind: str = "Basic") -> tuple[int, str]:
    request = urllib.request.Request(address)
    if credentials is not None:
        request.add_header("Authorization", f"{kind} {base64.b64encode(credentials.encode()).decode()}")
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers.get("Retry-After") or error.headers.get("WWW-Authenticate") or ""


def test_the_password_opens_every_page_and_only_what_has_tokens_is_open_without(url):
    for place in ("/", "/config", "/gradio_api/info", "/rate", "/rate/next", "/agreement", "/studyx"):
        assert get(url + place) == (401, 'Basic realm="minim", charset="UTF-8"'), place
        for wrong in ("ann:wrong", PASSWORD, "ann:"):
            assert get(url + place, wrong)[0] == 401
    assert get(url + "/rate", f"ann:{PASSWORD}", "Bearer")[0] == 401
    for place in ("/", "/rate", "/agreement"):
        assert get(url + place, f"ann:{PASSWORD}")[0] == 200
    for place in ("/healthz", "/study", "/study/x/about", "/studies"):
        assert get(url + place) == (200, "inside")


def test_who_asks_too_often_has_to_wait_and_is_told_how_long(url):
    answers = [get(url + "/healthz") for _ in range(100)]
    assert answers[-1][0] == 429 and int(answers[-1][1]) >= 1
    assert get(url + "/rate", f"ann:{PASSWORD}")[0] == 429, "guesses are limited, too"


def test_each_address_has_its_own_limit_and_few_are_remembered(monkeypatch):
    monkeypatch.setattr("doors.MOST_ADDRESSES", 2)
    limit = RateLimit(None, 2)
    assert [limit.wait("a") > 0 for _ in range(3)] == [False, False, True]
    assert limit.wait("a") == pytest.approx(30, abs=5)
    assert limit.wait("b") == 0 and limit.wait("c") == 0 and list(limit.buckets) == ["b", "c"]
