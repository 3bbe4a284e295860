"""The evaluation's page shows every figure or why there is none, and neither trusts nor requests anything."""

import copy
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from minim_pipeline.evaluation.page import render, written


pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

EVIL = "<script>alert('1')</script>"


def accuracy(value: float, **more) -> dict:
    return {
        "balanced_accuracy": value,
        "balanced_accuracy_merged": value + 0.01,
        "modality_accuracy": value + 0.02,
        "n": 301,
        **more,
    }


def memorisation(share: float) -> dict:
    return {
        "share": share,
        "copies": 3,
        "n": 76,
        "n_val": 75,
        "limit": 0.0512,
        "median": 0.2134,
        "median_val": 0.2567,
        "copied": [{"synthetic": "0003.png", "train": "images/a.webp", "distance": 0.0123}],
        "nearest": [{"synthetic": "0004.png", "train": "images/b.webp", "distance": 0.0789}],
    }


def training(value: float, **more) -> dict:
    interval = [value - 0.02, value + 0.02]
    return {
        "accuracy": value,
        "interval": interval,
        "n_train": 5001,
        "seeds": [value - 0.005, value + 0.005],
        "modalities": {"oct": {"accuracy": value + 0.001, "interval": interval}},
        **more,
    }


REPORT = {
    "made": {"minim": "0.1.0", "versions": {"torch": "2.13.0"}, "device": "cpu", "minutes": 4.2},
    "sets": {
        "real": {"file": "real.csv", "split": "val", "n": 655},
        "synthetic": {
            "file": "data.csv",
            "n": 654,
            "model": "minim-256",
            "revision": "sha256-beef",
            "settings": {"guidance_scale": 7.5},
        },
        "train": {"file": "train.csv", "split": "train", "n": 5806},
    },
    "conversions": ["12 of 655 real images: resized to 256 x 256 px"],
    "labels": {"column": "finding"},
    "extractors": [{"name": "minim-encoder", "digest": "0123456789abcdef", "dimensions": 256}],
    "modalities": {
        "oct": {
            "n": {"real": 76, "synthetic": 77, "train": 776},
            "fidelity": {
                "minim-encoder": {
                    "frechet_distance": {"value": 12.345, "interval": [11.2, 13.6], "n": 71},
                    "frechet_floor": {"value": 4.561, "n": 72},
                    "kernel_distance": {"value": -0.00123, "interval": [-0.0041, 0.0022]},
                    "kernel_floor": {"value": 0.000345},
                    "precision": {"value": 0.812},
                    "recall": {"value": 0.634},
                    "density": {"value": 0.957},
                    "coverage": {"left_out": "fewer than 6 images <here>"},
                }
            },
            "diversity": {
                "ms_ssim": {"value": 0.311},
                "ms_ssim_real": {"value": 0.289},
                "inception_score": {"value": 2.41},
                "inception_score_real": {"value": 2.73},
            },
            "retrieval": {
                "image_image": {"value": 0.851, "chance": 0.137, "pool": 79, "n": 70},
                "image_image_real": {"value": 0.871},
                "image_text": {"value": 0.641},
                "image_text_real": {"left_out": "too few captions"},
            },
            "memorisation": {"encoder": memorisation(0.0395), "pixels": {"left_out": "no training images"}},
        }
    },
    "memorisation": {
        "encoder": {"share": 0.0412, "copies": 27, "n": 654},
        "pixels": {"left_out": "no training images"},
    },
    "extraction": {
        "encoder": {"share": 0.019, "copies": 3, "n": 160, "captions": 40},
        "prompts": [
            {"modality": "cxr", "text": "a rare one", "train_images": 1, "images": 4, "copies": 0, "distance": 0.21}
        ],
    },
    "judges": {
        "names": ["resnet", "vit"],
        "synthetic": accuracy(
            0.701,
            modalities={
                "oct": accuracy(
                    0.711,
                    interval=[0.655, 0.768],
                    chance=0.333,
                    findings={"drusen": {"accuracy": 0.444, "n": 18}},
                    within_source={"tvhl": {"balanced_accuracy": 0.777, "chance": 0.5, "n": 40}},
                )
            },
        ),
        "real": accuracy(0.801, modalities={"oct": accuracy(0.811, findings={"drusen": {"accuracy": 0.555, "n": 9}})}),
        "each": {"resnet": {"synthetic": accuracy(0.601), "real": accuracy(0.611)}},
    },
    "downstream": {
        "settings": {"steps": 1234},
        "real": training(0.815),
        "synthetic": training(0.715),
        "cas_ratio": {"value": 0.877, "modalities": {"oct": {"value": 0.866}}},
        "low_data": {
            "data_sharing": {
                "meaning": "One hospital shares synthetic images.",
                "real": training(0.515),
                "points": [training(0.535, percent=100), training(0.545, percent=250, gain={"value": 0.022})],
                "gain": {"value": 0.031, "interval": [0.004, 0.058], "modalities": {"oct": {"value": 0.041}}},
                "gain_at": 250,
            }
        },
    },
}


def image(seed: int = 0, size: tuple[int, int] = (200, 240)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def pictures(caption: str = "normal macula", train: np.ndarray | None = None) -> dict:
    return {
        "sheets": {"oct": [{"image": image(), "caption": caption, "lines": ["read 0.93"], "copy": True}]},
        "neighbours": {
            "oct": [
                {
                    "synthetic": image(),
                    "train": train,
                    "distance": 0.1234,
                    "names": ("0003.png", "images/a.webp"),
                    "copy": False,
                }
            ]
        },
    }


CURVES = {name: {"synthetic": [0.31, 0.12, 0.2], "val": [0.4, 0.2, 0.3], "limit": 0.15} for name in ("oct", "fundus")}


@pytest.fixture(scope="module")
def page() -> str:
    return render(REPORT, pictures(train=image(1)), CURVES)


class Text(HTMLParser):
    """What a reader sees, words parted by single spaces; `ids` and `images` on the way."""

    def __init__(self, html: str):
        super().__init__()
        self.words, self.ids, self.images, self.tags = [], [], [], set()
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.add(tag)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.images += [attributes] if tag == "img" else []

    def handle_data(self, data):
        self.words.append(data)


def test_every_figure_is_there(page):
    text = Text(page).text
    fidelity = ["12.3 [11.2, 13.6] n 71", "4.56 n 72", "−0.00123 [−0.00410, 0.00220]", "0.000345"]
    fidelity += ["0.812", "0.634", "0.957", "real 76 · synthetic 77 · train 776"]
    diversity = ["0.311", "0.289", "2.41", "2.73"]
    retrieval = ["85.1 % chance 13.7 % · pool 79 · n 70", "87.1 %", "64.1 %"]
    copies = ["4.0 % 3 of 76", "0.213", "0.257 n val 75", "0.0512", "4.1 % 27 of 654", "1.9 % 3 of 160 · captions 40"]
    pairs = ["0003.png", "images/a.webp", "0.0123 yes", "images/b.webp", "0.0789", "a rare one 1 4 0 0.21"]
    judges = [
        "70.1 %",
        "72.1 %",
        "71.1 % [65.5, 76.8] chance 33.3 % · n 301",
        "81.1 %",
        "drusen 44.4 % n 18 55.5 % n 9",
    ]
    judges += ["tvhl 77.7 % chance 50.0 % · n 40", "resnet 60.1 %", "61.1 %"]
    downstream = [
        "81.5 % [79.5, 83.5] n train 5001 · each seed 81.0 %, 82.0 %",
        "71.6 %",
        "0.877",
        "0.866",
        "+ 250 %",
        "54.5 %",
    ]
    downstream += [
        "Gain at 250 % +3.1 points [+0.4, +5.8] +4.1 points",
        "gain +2.2 points",
        "One hospital shares synthetic images.",
    ]
    about = [
        "real.csv, split val, 655 images",
        "minim-256, revision sha256-beef",
        "0123456789abcdef",
        "column finding",
    ]
    about += [
        "12 of 655 real images",
        "2.13.0",
        "4.2 minutes",
        "guidance_scale 7.5",
        "steps 1234",
        "not for diagnosis",
    ]
    wanted = fidelity + diversity + retrieval + copies + pairs + judges + downstream + about
    assert [words for words in wanted if words not in text] == []


def test_a_left_out_figure_is_a_dash_with_its_reason_in_sight(page):
    text = Text(page).text
    assert "fewer than 6 images <here>" in text
    assert "too few captions" in text
    assert "— 1" in text


def test_whole_parts_can_be_left_out_with_a_reason():
    report = copy.deepcopy(REPORT)
    for key in ("memorisation", "extraction", "judges", "downstream", "labels"):
        report[key] = {"left_out": f"no {key} today"}
    report["modalities"]["oct"]["memorisation"] = {"left_out": "no memorisation today"}
    text = Text(render(report, {}, {})).text
    assert all(f"no {key} today" in text for key in ("memorisation", "extraction", "judges", "downstream", "labels"))


def test_conditions_of_downstream_training_can_be_left_out():
    report = copy.deepcopy(REPORT)
    report["downstream"]["note"] = "Measured of another model."
    assert "Measured of another model." in Text(render(report, {}, {})).text
    setting = report["downstream"]["low_data"]["data_sharing"]
    setting["points"][0] = {"percent": 100, "left_out": "too few images to add", "gain": {"left_out": "nothing added"}}
    assert "too few images to add" in Text(render(report, {}, {})).text
    setting["real"] = report["downstream"]["synthetic"] = {"left_out": "no label is in both sets"}
    found = Text(render(report, {}, {}))
    assert "no label is in both sets" in found.text
    assert "svg" not in found.tags


@pytest.mark.parametrize(
    ("value", "low", "verdict"),
    [
        (0.06, 0.01, "by at least the 5 points"),
        (0.04, 0.01, "by less than the 5 points"),
        (0.06, 0, "not shown to help"),
    ],
)
def test_the_page_says_whether_synthetic_images_help(value, low, verdict):
    report = copy.deepcopy(REPORT)
    report["downstream"]["low_data"]["data_sharing"]["gain"] = {"value": value, "interval": [low, 0.09]}
    assert verdict in Text(render(report, {}, {})).text


def test_text_from_outside_is_never_markup():
    report = copy.deepcopy(REPORT)
    report["sets"]["synthetic"]["model"] = report["sets"]["real"]["file"] = EVIL
    report["extractors"][0]["name"] = EVIL
    report["modalities"][EVIL] = report["modalities"]["oct"]
    report["modalities"]["oct"]["fidelity"] = {EVIL: {"recall": {"left_out": EVIL}}}
    report["conversions"] = report["judges"]["names"] = [EVIL]
    report["judges"]["synthetic"]["modalities"]["oct"]["findings"] = {EVIL: {"accuracy": 0.5, "n": 2}}
    report["extraction"]["prompts"][0]["text"] = report["downstream"]["settings"]["steps"] = EVIL
    report["downstream"]["low_data"] = {EVIL: report["downstream"]["low_data"]["data_sharing"]}
    shown = pictures(EVIL + '" onerror="x')
    shown["neighbours"]["oct"][0]["names"] = (EVIL, EVIL)
    found = Text(render(report, shown, {EVIL: CURVES["oct"]}))
    assert "script" not in found.tags
    assert not any("onerror" in attributes for attributes in found.images)
    assert found.text.count(EVIL) > 10


def test_the_page_requests_nothing(page):
    alone = page.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"https?://|src=\"/|url\(|@import|<link|<script|srcset", alone)
    found = Text(page)
    assert all(attributes["src"].startswith("data:image/webp;base64,") for attributes in found.images)
    assert all(max(int(attributes["width"]), int(attributes["height"])) <= 160 for attributes in found.images)
    links = re.findall(r'href="([^"]*)"', page)
    assert links and all(link.startswith("#") and link[1:] in found.ids for link in links)


def test_plots_do_not_share_ids_and_are_the_same_each_time(page):
    ids = Text(page).ids
    assert page.count("<svg") == 3
    assert len(ids) == len(set(ids))
    assert render(REPORT, pictures(train=image(1)), CURVES) == page


def test_a_real_picture_that_may_not_be_shown_is_not():
    with_real, without = (Text(render(REPORT, pictures(train=train), {})) for train in (image(1), None))
    assert len(with_real.images) == 3
    assert len(without.images) == 2
    assert "not shown distance 0.123 0003.png · images/a.webp" in without.text


def test_only_copies_are_marked_as_such():
    shown = pictures()
    assert Text(render(REPORT, shown, {})).text.count("Copy ·") == 1
    shown["sheets"]["oct"][0]["copy"] = False
    assert "Copy ·" not in Text(render(REPORT, shown, {})).text


def test_a_report_without_optional_parts():
    report = {key: REPORT[key] for key in ("made", "sets", "labels", "extractors", "modalities", "memorisation")}
    report["sets"] = {**REPORT["sets"], "synthetic": {"file": "data.csv", "n": 2, "model": None}, "train": None}
    report["modalities"] = {"oct": {"n": {"real": 3, "synthetic": 2}}}
    report["memorisation"] = {"left_out": "no training set was given"}
    found = Text(render(report, {}, {}))
    assert "not computed" in found.text
    assert "no training set was given" in found.text
    assert not {"img", "svg"} & found.tags
    assert not {"judges", "downstream", "extraction", "images"} & set(found.ids)


@pytest.mark.parametrize(
    "value, style, interval, expected",
    [
        (0, "number", None, "0"),
        (123.456, "number", None, "123"),
        (6.21, "number", (1, 15.5), "6.2"),
        (12345.6, "number", (12000, 12900), "12346"),
        (0.0000001234, "number", None, "1.23 × 10^−7"),
        (-0.00001, "percent", None, "0.0 %"),
        (0.5, "percent", (0.5, 0.5), "50.0 %"),
        (0.5, "percent", (0.1, 0.9), "50.0 %"),
        (-0.012, "points", None, "−1.2 points"),
    ],
)
def test_numbers_have_the_digits_that_make_sense(value, style, interval, expected):
    assert written(value, style, interval) == expected
