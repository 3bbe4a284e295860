"""The page that draws images, without a browser: what is drawn, what is said of it, and how it is stopped."""

import csv
import json
import re
import zipfile
from dataclasses import replace

import pytest
from drawing import Drawer, Stopped
from generate_page import build
from generate_settings import Limits, Settings
from generate_words import captions, summarise
from PIL import Image, ImageChops
from vocabulary import Vocabulary

from minim_pipeline import CAPTIONS, EMBEDDED_CHECKPOINT, MODALITIES
from minim_pipeline.modalities import Modality


ASKED = Settings("oct", "cyst", images=2, seed=7, steps=3, guidance=2.0, candidates=3, second="normal")


def quiet(*progress, **told) -> None:
    pass


@pytest.fixture(scope="module")
def drawer(make_pipeline):
    return Drawer(make_pipeline(filtered=True), "model", "revision")


@pytest.fixture(scope="module")
def vocabulary():
    config = json.loads((EMBEDDED_CHECKPOINT / "model_index.json").read_text())
    return Vocabulary({name: MODALITIES[name] for name in config["modalities"].split()}, config["findings"])


def test_two_prompts_are_drawn_from_one_noise_and_every_file_again_by_its_seed(drawer, tmp_path):
    output, _ = drawer.draw(ASKED, quiet)
    second = drawer.redraw(replace(ASKED, prompt=ASKED.second), output.seeds, quiet)
    paths, archive = drawer.write(ASKED, output, second)
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(tmp_path)
    with open(tmp_path / "data.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["Text"], row["num_candidates"]) for row in rows] == [("cyst", "3")] * 2 + [("normal", "1")] * 2
    assert [row["drawn_seed"] for row in rows[:2]] == [row["seed"] for row in rows[2:]]
    assert [path.name for path in paths] == [row["path"] for row in rows]
    for row in rows:
        options = {"num_inference_steps": 3, "guidance_scale": 2.0, "seeds": [int(row["drawn_seed"])]}
        with Image.open(tmp_path / row["path"]) as image:
            again = drawer.pipe(row["Text"], "oct", **options).images[0]
            difference = ImageChops.difference(again, image.convert("RGB")).getextrema()
        assert max(most for _, most in difference) <= 2, "but for rounding, which differs with the batch"


def test_who_stops_gets_nothing_and_the_next_call_is_as_ever(drawer):
    before, _ = drawer.draw(ASKED, quiet, "a")
    steps = []

    def press_stop(step, desc, unit):
        steps.append((step[0], desc))
        drawer.stop("b")

    with pytest.raises(Stopped):
        drawer.draw(ASKED, press_stop, "b")
    assert [step for step, _ in steps] == [1] and re.fullmatch(r"Drawing, about \d+ s left", steps[0][1])
    with pytest.raises(Stopped):
        drawer.redraw(ASKED, [1], press_stop, "b")
    assert len(steps) == 1, "what was stopped while it waited does not begin"
    after, _ = drawer.draw(ASKED, quiet, "a")
    assert [image.tobytes() for image in after.images] == [image.tobytes() for image in before.images]


def test_the_words_of_captions_and_summary_agree(drawer):
    output, others = drawer.draw(replace(ASKED, images=4), quiet)
    said, told = captions(output, 2.0), summarise(output, 1)
    assert [caption.startswith("✓") for caption in said] == output.accepted
    assert all(" of 3 (2.00 needed)" in caption for caption in said)
    assert [": " in caption for caption in said] == [not accepted for accepted in output.accepted]
    assert told.startswith(f"The filter accepted {sum(output.accepted)} of 4 images")
    chosen, outranked = re.search(r"It chose them from (\d+) candidates; outranked: (.+)\.", told).groups()
    assert int(chosen) == 12 and sum(map(int, re.findall(r"\d+", outranked))) == len(others) == 8
    rated = drawer.pipe.score(output.images, "cyst", "oct")
    assert output.reasons == rated.reasons


@pytest.mark.parametrize(
    ("text", "modality", "remark"),
    [
        ("cataract", "oct", "This sounds like Fundus, but OCT is chosen."),
        ("Bacterial pneumonia with lobar consolidation", "fundus", "This sounds like CXR, but Fundus is chosen."),
        ("diabetic macular edema", "cxr", "This sounds like OCT or Fundus, but CXR is chosen."),
        ("COVID-19 pneumonia", "cxr", ""),
        ("normal", "oct", ""),
        ("something else", "oct", ""),
    ],
)
def test_a_sentence_of_another_modality_is_pointed_out(vocabulary, text, modality, remark):
    assert vocabulary.remark(text, modality) == remark


def test_sentences_of_the_modality_itself_are_not_pointed_out(vocabulary):
    held_out = json.loads(CAPTIONS.with_name("captions_test.json").read_text(encoding="utf-8"))
    own = [(text, name) for name in vocabulary.known for texts in held_out[name].values() for text in texts]
    assert len(own) > 300 and [pair for pair in own if vocabulary.others(*pair)] == []


def test_a_modality_of_the_models_own_has_its_findings_as_examples(make_pipeline):
    import gradio as gr

    own = {"dermoscopy": {"name": "Dermoscopy", "words": "photo of skin", "grey": False}}
    findings = {"dermoscopy": ["nevus", "melanoma"]}
    pipe = make_pipeline(modalities=["oct", "dermoscopy"], custom_modalities=own, findings=findings)
    drawer = Drawer(pipe, "model", "revision")
    assert isinstance(drawer.modalities["dermoscopy"], Modality) and "dermoscopy" not in MODALITIES
    with gr.Blocks() as demo:
        build(drawer, Limits())
    events = {event.fn.__name__: event for event in demo.fns.values() if event.fn is not None}
    examples, prompt, remark = events["on_modality"].fn(
        "dermoscopy", "diabetic macular edema with intraretinal cysts", ""
    )
    assert examples["samples"] == [["nevus"], ["melanoma"]] and prompt == "nevus" and remark == ""
    assert events["on_modality"].fn("oct", "melanoma in situ", "")[1:] == (
        "melanoma in situ",
        "This sounds like Dermoscopy, but OCT is chosen.",
    )
    values = [component.value for component in events["on_draw"].inputs]
    values[:3] = "dermoscopy", "nevus", 1
    assert len(events["on_draw"].fn(*values, progress=quiet)[0]["value"]) == 1
