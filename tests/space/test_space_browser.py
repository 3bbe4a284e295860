"""The Space's pages in a real browser, as people use them: with the mouse, by keyboard alone, two at once."""

import csv
import io
import re
import shutil
import time
import zipfile
from pathlib import Path

import pytest
from PIL import Image, ImageChops
from space_server import Server

from minim_pipeline import EMBEDDED_CHECKPOINT, MinimPipeline, resolve_modality
from minim_pipeline.ratings import RatingStore


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium, which is not installed here")
READY = "[...document.querySelectorAll('button')].some(b => b.innerText == 'Generate' && !b.disabled)"
HOST = "the-host-of-this-test"
LINK = "/?modality=cxr&prompt=bacterial+pneumonia&images=2&steps=3&candidates=2&seed=5&guidance=2.5"


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("space")


@pytest.fixture(scope="module")
def server(nursery, folder):
    started = Server(nursery, folder, "--host_token", HOST)
    yield started
    started.kill()


@pytest.fixture
def visit(browser, server):
    """Opens pages, each a visitor of its own; at the end none has had an error, or asked another host for anything."""
    contexts, problems = [], []

    def open_page(place: str, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda m: problems.append(f"console: {m.text}") if m.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(f"page: {error}"))
        page.on("request", lambda r: problems.append(f"outside: {r.url}") if is_outside(r.url, server.url) else None)
        page.goto(server.url + place)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


def is_outside(url: str, home: str) -> bool:
    return not url.startswith((home, "data:", "blob:"))


def begin(page, name: str) -> None:
    page.get_by_label("Your name").fill(name)
    page.keyboard.press("Enter")
    page.wait_for_selector("#picture img")


def rate(page, key: str) -> None:
    """Presses a key, and waits until the page says that it is done."""
    done = int(page.locator("#count").inner_text().split()[0])
    page.keyboard.press(key)
    page.wait_for_function(f"document.getElementById('count').textContent.startsWith('{done + 1} ')")


def test_a_link_fills_the_page_and_its_images_come_with_scores_and_as_a_zip(visit):
    page = visit(LINK)
    page.wait_for_function("[...document.querySelectorAll('textarea')].some(t => t.value == 'bacterial pneumonia')")
    page.get_by_role("button", name="Generate", exact=True).click()
    page.wait_for_selector("text=/[123]\\/3 steps/")  # progress, step by step
    page.wait_for_selector("#told:has-text('The filter accepted')")
    page.wait_for_function("document.querySelectorAll('.grid-container img').length == 2")
    assert len(re.findall(r"accepted, score \d\.\d\d of 3", page.inner_text("body"))) == 2
    link = page.locator("label:has-text('Link to these settings') textarea")
    page.wait_for_function("[...document.querySelectorAll('textarea')].some(t => t.value.startsWith('http'))")
    assert link.input_value().endswith("images=2&seed=5&steps=3&guidance=2.5&candidates=2")

    with page.expect_download() as caught:
        page.get_by_text("Download ZIP").click()
    with zipfile.ZipFile(caught.value.path()) as archive:
        rows = list(csv.DictReader(io.StringIO(archive.read("data.csv").decode())))
        assert [(row["modality"], row["Text"], row["seed"]) for row in rows] == [
            ("CXR", "bacterial pneumonia", "5"),
            ("CXR", "bacterial pneumonia", "6"),
        ]
        with Image.open(io.BytesIO(archive.read(rows[0]["path"]))) as image:
            assert image.size == (256, 256) and image.text["synthetic"] == "true"
            assert image.text["seed"] == rows[0]["drawn_seed"]

    page.get_by_text("Candidates that were outranked").click()
    page.get_by_role("button", name="Draw them").click()
    page.wait_for_function("document.querySelectorAll('.grid-container img').length == 4")


def generate(page) -> str:
    """Presses the button, and returns what is told of the images once they are there."""
    page.get_by_role("button", name="Generate", exact=True).click()
    page.wait_for_function("!document.getElementById('told')?.innerText.trim()")
    page.wait_for_selector("#told:has-text('The filter accepted')")
    return page.inner_text("#told")


def test_the_page_follows_what_is_chosen(visit):
    page = visit("/?images=1&steps=2&candidates=1&modality=fundus&prompt=cataract")
    page.wait_for_selector("#examples button:has-text('Healthy retina')")
    page.get_by_label("Modality").click()
    page.get_by_role("option", name="BrainMRI").click()
    page.wait_for_selector("#examples button:has-text('meningioma')")
    asked = page.get_by_label("What it shows")
    assert asked.input_value() == "meningioma compressing the adjacent brain", "an example is replaced by another"
    asked.fill("glaucoma")
    page.wait_for_selector("#remark:has-text('This sounds like Fundus, but BrainMRI is chosen.')")
    page.locator("#examples button", has_text="no tumor").click()
    page.wait_for_function("document.getElementById('remark').innerText.trim() == ''")

    page.locator("#settings").get_by_text("Settings").click()
    meaning = page.get_by_text("How closely the sentence is followed")
    assert meaning.evaluate("e => getComputedStyle(e).opacity") == "0"
    page.get_by_label("range slider for Guidance").hover()
    assert meaning.evaluate("e => getComputedStyle(e).opacity") == "1"

    seed = page.get_by_label("Seed", exact=True)
    generate(page)
    drawn = seed.input_value()
    page.get_by_label("Keep this seed").check()
    page.get_by_label("Compare with").fill("glioma")
    generate(page)
    assert drawn == seed.input_value() != "0", "a new one at the first press, and kept at the second"
    page.wait_for_function("document.querySelectorAll('.pictures img').length == 2")
    labels = page.locator(".pictures").all_inner_texts()
    assert labels[0].startswith("BrainMRI: no tumor") and labels[1].startswith("BrainMRI: glioma")
    box = page.locator(".pictures img").first.bounding_box()
    assert box["height"] > 250, "larger than it is"


def test_stop_ends_a_call_at_its_next_step(visit):
    page = visit("/?modality=oct&images=1&steps=50&candidates=1&prompt=cyst", reduced_motion="reduce")
    page.wait_for_function("[...document.querySelectorAll('textarea')].some(t => t.value == 'cyst')")
    page.get_by_role("button", name="Generate", exact=True).click()
    page.wait_for_selector("text=/Drawing, about \\d+ s left/")
    moving = page.evaluate("document.getAnimations().map((one) => one.effect.target.className)")
    assert moving == [], "who wants no motion sees none"
    page.get_by_role("button", name="Stop").click()
    page.wait_for_selector("#told:has-text('Stopped.')")
    page.wait_for_selector("text=/Drawing, about/", state="detached")
    assert page.locator(".pictures img").count() == 0
    page.wait_for_function(READY)


def press_everything(pages, seconds: float) -> list[zipfile.ZipFile]:
    """Each of the visitors draws, and draws what was outranked, for so long; the archives that they downloaded."""
    archives, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        for page in pages:
            page.get_by_role("button", name="Generate", exact=True).click()
            page.wait_for_function("!document.getElementById('told')?.innerText.trim()")
        for page in pages:
            page.wait_for_selector("#told:has-text('The filter accepted')")
            page.get_by_role("button", name="Draw them").click()
        for page in pages:
            with page.expect_download() as caught:
                page.get_by_text("Download ZIP").click()
            archives.append(zipfile.ZipFile(caught.value.path()))
            page.wait_for_function(READY)
    return archives


@pytest.mark.slow
def test_two_visitors_at_once_get_their_own_images(visit):
    asked = {"oct": "cyst", "cxr": "normal"}
    pages = [visit(f"/?modality={m}&prompt={text}&images=1&steps=2&candidates=2") for m, text in asked.items()]
    for page in pages:
        page.get_by_text("Candidates that were outranked").click()
    archives = press_everything(pages, 1)
    pipe = MinimPipeline.from_pretrained(EMBEDDED_CHECKPOINT)
    for archive in archives:
        for row in csv.DictReader(io.StringIO(archive.read("data.csv").decode())):
            assert asked[resolve_modality(row["modality"]).id] == row["Text"]
            options = {"num_inference_steps": 2, "guidance_scale": float(row["guidance"])}
            again = pipe(row["Text"], row["modality"], seeds=[int(row["drawn_seed"])], **options).images[0]
            with Image.open(io.BytesIO(archive.read(row["path"]))) as image:
                difference = ImageChops.difference(again, image.convert("RGB")).getextrema()
            assert max(most for _, most in difference) <= 2
    for page in pages:
        assert page.locator(".toast-body").count() == 0


def test_what_cannot_be_drawn_is_said_in_words(visit):
    page = visit("/?modality=%3Cb%3Eoct")
    page.wait_for_selector("text=Choose a modality: oct, fundus, cxr, chest_ct, brain_mri, breast_us (got '<b>oct')")
    page = visit("/?steps=100000&modality=oct&prompt=cyst")
    page.wait_for_selector("text=steps has to be a whole number from 2 to 50")
    page.get_by_label("What it shows").fill("   ")
    page.get_by_role("button", name="Generate", exact=True).click()
    page.wait_for_selector("text=Say what the image is to show")


def test_two_raters_at_once_and_the_way_back(visit, server):
    ann, bob = visit("/rate"), visit("/rate")
    begin(ann, "ann")
    begin(bob, "bob")
    first = ann.locator("#picture img").get_attribute("src")
    for page, key in ((ann, "3"), (bob, "1"), (ann, "2"), (bob, "1")):
        rate(page, key)
    assert ann.locator("#count").inner_text() == bob.locator("#count").inner_text() == "2 of 40"
    ann.keyboard.press("b")
    ann.keyboard.press("ArrowLeft")
    assert ann.locator("#picture img").get_attribute("src") == first
    assert ann.get_by_role("button", name="3 good").get_attribute("aria-pressed") == "true"
    ann.get_by_role("button", name="1 not usable").click()
    ann.wait_for_function(f"!document.querySelector('#picture img').src.endsWith('{first}')")
    store = RatingStore(server.store)
    assert [r.rating for r in store.ratings("bob")] == [1, 1]
    assert sorted(r.rating for r in store.ratings("ann")) == [1, 2], "the last rating counts"


def shown_pixels(page) -> Image.Image:
    """What is seen of the picture, without the frame's round corners."""
    image = Image.open(io.BytesIO(page.locator("#picture").screenshot())).convert("L")
    return image.crop((10, 10, image.width - 10, image.height - 10))


def test_zoom_and_window_change_what_is_seen_and_nothing_else(visit):
    page = visit("/rate", viewport={"width": 1000, "height": 700})
    page.get_by_label("Your name").fill("viewer")
    for name in ("Fundus", "CXR", "ChestCT", "BrainMRI", "BreastUS"):
        page.get_by_label(name, exact=True).uncheck()
    page.keyboard.press("Enter")
    page.wait_for_selector("#picture img")
    assert page.inner_text("#modality") == "OCT" and page.locator("#picture").bounding_box()["height"] > 550
    page.evaluate("document.querySelector('#picture img').decode()")
    plain = shown_pixels(page)
    for key in "ccc":
        page.keyboard.press(key)
    page.keyboard.press("ArrowUp")
    assert page.inner_text("#seen") == "window 131, level 120"
    width, level = 255 / 1.25**3, 127.5 - 8
    table = [min(255, max(0, round((value - level + width / 2) * 255 / width))) for value in range(256)]
    windowed, wanted = shown_pixels(page), plain.point(table)
    assert windowed != plain and max(ImageChops.difference(windowed, wanted).getextrema()) <= 4

    page.keyboard.press("Escape")
    box = page.locator("#picture").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.wheel(0, -400)
    page.wait_for_function("document.getElementById('seen').textContent == 'zoom 2.7'")
    zoomed = shown_pixels(page)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2 - 60, box["y"] + box["height"] / 2)
    page.mouse.up()
    moved = shown_pixels(page)
    right, left = zoomed.crop((200, 100, 400, 400)), moved.crop((140, 100, 340, 400))
    assert max(ImageChops.difference(right, left).getextrema()) <= 4
    page.mouse.down(button="right")
    page.mouse.move(box["x"] + box["width"] / 2 - 100, box["y"] + box["height"] / 2 + 20)
    page.mouse.up(button="right")
    assert re.fullmatch(r"zoom 2.7, window 215, level 13\d", page.inner_text("#seen"))
    rate(page, "2")
    assert page.inner_text("#seen") == "", "the next image is seen as it is"
    page.keyboard.press("b")
    assert shown_pixels(page) == plain, "and so is this one"


def test_skip_remark_cannot_judge_and_the_way_forward(visit, server):
    page = visit("/rate")
    begin(page, "words")
    source = "() => document.querySelector('#picture img').getAttribute('src')"
    first = page.evaluate(source)
    page.keyboard.press("n")
    page.wait_for_function(f"document.querySelector('#picture img').getAttribute('src') != '{first}'")
    second = page.evaluate(source)
    page.keyboard.press("r")
    page.keyboard.type("0 1 2 3 motion n b")
    page.keyboard.press("Escape")
    assert page.locator("#count").inner_text() == "0 of 40", "what is written is no rating"
    rate(page, "0")
    third = page.evaluate(source)
    rate(page, "3")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("b")
    assert page.evaluate(source) == second and page.get_by_label("Remark").input_value() == "0 1 2 3 motion n b"
    assert page.get_by_role("button", name="Cannot judge").get_attribute("aria-pressed") == "true"
    page.keyboard.press("ArrowRight")
    assert page.evaluate(source) == third and page.get_by_label("Remark").input_value() == ""
    page.keyboard.press("f")
    assert page.locator("[aria-pressed=true]").count() == 0 and page.locator("#forward").is_disabled()
    answers = RatingStore(server.store).answers("words")
    assert [(r.rating, r.remark) for r in answers] == [(0, "0 1 2 3 motion n b"), (3, "")]
    assert all(r.seconds > 0 for r in answers)
    page.reload()
    page.wait_for_selector("#picture img")
    assert page.evaluate(source) not in (first, second, third), "skipped ones come at the end"


def make_study(page, server, **fields: str) -> None:
    """Fills the host's form in, and waits for the study's page."""
    page.goto(f"{server.url}/studies?token={HOST}")
    for label, value in {"Title": "Pilot", "Readers, a name": "Ann\nBob", "Images for each": "3", **fields}.items():
        page.get_by_label(label).fill(value)
    page.get_by_role("button", name="Make the study").click()
    page.wait_for_selector("text=link for Ann")


def test_a_host_makes_a_study_and_a_reader_answers_by_its_link(visit, server):
    page, host = visit("/rate"), visit("/agreement")
    begin(page, "somebody")  # a reader's link knows nothing of that name
    make_study(host, server)
    with page.expect_navigation():
        page.goto(host.get_by_text("link for Ann").evaluate("a => a.href"))
    page.wait_for_function("document.getElementById('name').value == 'Ann'")
    assert not page.get_by_role("navigation").is_visible(), "a reader has this study alone"
    assert page.inner_text("h1") == "Pilot" and "How good is this image" in page.inner_text("#question")
    page.get_by_role("button", name="Start").click()
    page.wait_for_selector("#picture img")
    assert "As a real image could be" in page.inner_text("[data-rating='3']")
    for key in "132":
        rate(page, key)
    page.wait_for_selector("#thanks:has-text('last image')")
    host.reload()
    assert "3 of 3" in host.inner_text("main")


def test_the_pages_work_by_keyboard_and_every_control_has_a_name(visit):
    page = visit("/rate")
    page.keyboard.type("keys only")  # the name has the focus
    page.keyboard.press("Enter")
    page.wait_for_selector("#picture img")
    assert re.search(r"asked for: .+", page.locator("#picture img").get_attribute("alt"))
    page.keyboard.press("Tab")
    for _ in range(30):
        if page.evaluate("document.activeElement.dataset.rating") == "2":
            break
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_function("document.getElementById('count').textContent.startsWith('1 ')")
    for place in ("/", "/rate", "/agreement", "/about"):
        page.goto(page.url.split("/", 3)[0] + "//" + page.url.split("/", 3)[2] + place)
        page.wait_for_selector("a:has-text('Agreement')")
        page.wait_for_timeout(1000)
        nameless = page.evaluate(
            """[...document.querySelectorAll('button, input, textarea, select, img')].filter(e => e.checkVisibility()
            && !(e.innerText || e.ariaLabel || e.title || e.alt || e.labels?.length || e.ariaLabelledByElements?.length
            || e.closest('label')?.innerText)).map(e => e.outerHTML)"""
        )
        assert nameless == [], place


# What axe-core finds that is not of our making: Gradio's empty gallery, its colours of code, and a card's table.
OF_OTHERS = {("aria-prohibited-attr", "empty"), ("color-contrast", "token"), ("empty-table-header", "<th>")}
VIOLATIONS = """axe.run().then((found) => found.violations.flatMap((one) =>
    one.nodes.map((node) => [one.id, node.html.slice(0, 200)])))"""


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 360)])
def test_nothing_keeps_anybody_out(visit, server, scheme, width):
    """axe-core (WCAG 2 A and AA, and best practice) on every page, in both colours, and as narrow as a telephone."""
    axe = pytest.importorskip("axe_playwright_python", reason="needs axe-core")
    script = Path(axe.__file__).with_name("axe.min.js").read_text(encoding="utf-8")
    page = visit("/rate", color_scheme=scheme, viewport={"width": width, "height": 740}, reduced_motion="reduce")
    found = []
    for place in ("form", "/rate", "/agreement", "/about", f"/studies?token={HOST}", "study", "reader", "/"):
        if place == "/rate":
            begin(page, f"axe {scheme}")
            rate(page, "2")
            page.locator("summary").click()
        elif place == "study":
            make_study(page, server)
        elif place == "reader":
            page.get_by_text("link for Ann").click()
            page.wait_for_function("document.getElementById('name').value == 'Ann'")
        elif place != "form":
            page.goto(server.url + place)
            page.wait_for_selector("main h1, #about h1, #examples button")
        if place == "/":
            page.locator("#settings").get_by_text("Settings").click()
            page.wait_for_selector("text=Compare with")
        page.evaluate(script)
        found += [(place, *one) for one in page.evaluate(VIOLATIONS)]
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, f"{place} scrolls sideways"
    ours = [one for one in found if not any(one[1] == rule and part in one[2] for rule, part in OF_OTHERS)]
    assert ours == []


@pytest.mark.slow
def test_ten_ratings_by_keys_survive_a_kill(browser, nursery, tmp_path):
    server = Server(nursery, tmp_path)
    context = browser.new_context()
    page = context.new_page()
    try:
        page.goto(server.url + "/rate")
        begin(page, "Dr Ten")
        keys = "1231231231"
        for key in keys:
            rate(page, key)
        server.kill()
        page.keyboard.press("2")
        page.wait_for_selector("text=this rating is not stored, press it again")
        assert sorted(r.rating for r in RatingStore(server.store).ratings("Dr Ten")) == sorted(map(int, keys))
        server = Server(nursery, tmp_path)
        page.goto(server.url + "/rate")  # another port, so the name is asked for again
        begin(page, "Dr Ten")
        assert page.locator("#count").inner_text() == "10 of 40"
    finally:
        context.close()
        server.kill()
