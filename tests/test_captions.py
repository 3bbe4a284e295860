import random
import re

import pytest
from captions import grades, load_captions, normalize, split_suffix, vary_caption

from minim_pipeline import MODALITIES, names_a_side


FINDINGS = {
    "oct": {
        "normal",
        "no diabetic macular edema",
        "diabetic macular edema",
        "diabetic retinopathy without edema",
    },
    "fundus": {
        "normal",
        "cataract",
        "glaucoma",
        "no diabetic retinopathy",
        "diabetic retinopathy",
        "diabetic macular edema",
    },
    "cxr": {"normal", "bacterial pneumonia", "viral pneumonia", "COVID-19", "pneumonia"},
    "chest_ct": {
        "normal",
        "COVID-19",
        "non-COVID",
        "adenocarcinoma",
        "squamous cell carcinoma",
        "large cell carcinoma",
    },
    "brain_mri": {"glioma", "meningioma", "pituitary tumor", "no tumor"},
    "breast_us": {"benign", "malignant", "normal"},
}


@pytest.fixture(scope="module")
def captions():
    return load_captions()


def variants(captions, text, modality, finding, n=300):
    rng = random.Random(0)
    return [vary_caption(text, modality, finding, rng, captions) for _ in range(n)]


def test_every_finding_has_enough_phrasings(captions):
    assert {m: set(f) for m, f in captions.items()} == FINDINGS
    assert set(captions) <= set(MODALITIES)
    for findings in captions.values():
        for phrasings in findings.values():
            assert set(phrasings) == {"train", "new"}
            assert len(phrasings["train"]) >= 20
            assert len(phrasings["new"]) >= 4


def test_no_phrasing_twice_in_a_modality_and_no_new_one_trained_on(captions):
    trained = {normalize(p) for findings in captions.values() for f in findings.values() for p in f["train"]}
    for findings in captions.values():
        everything = [normalize(p) for f in findings.values() for p in f["train"] + f["new"]]
        assert len(everything) == len(set(everything))
        assert not trained & {normalize(p) for f in findings.values() for p in f["new"]}


def test_phrasings_name_no_side_age_or_view(captions):
    # A mirrored image, or the suffix of a row, would make such a phrasing wrong.
    for findings in captions.values():
        for f in findings.values():
            for phrasing in f["train"] + f["new"]:
                assert not names_a_side(phrasing), phrasing
                assert not re.search(r"year-old|\bAP\b|\bPA\b", phrasing), phrasing


def test_split_suffix_takes_the_longest_phrasing():
    phrasings = ["Glaucoma.", "Glaucoma, suspected."]
    assert split_suffix("Glaucoma, left eye, 60-year-old male.", phrasings) == (
        "Glaucoma",
        ["left eye", "60-year-old male"],
    )
    assert split_suffix("Glaucoma, suspected, left eye.", phrasings) == ("Glaucoma, suspected", ["left eye"])
    assert split_suffix("Glaucomatous disc.", phrasings) == (None, [])


def test_vary_caption_is_seeded(captions):
    text = "Glaucoma, left eye."
    assert variants(captions, text, "fundus", "glaucoma") == variants(captions, text, "fundus", "glaucoma")
    assert len(set(variants(captions, text, "fundus", "glaucoma"))) > 50


@pytest.mark.parametrize("side, names", [("left", {"left", "os"}), ("right", {"right", "od"})])
def test_vary_caption_keeps_the_side_or_drops_it(captions, side, names):
    named = 0
    for varied in variants(captions, f"Macular OCT showing no edema, {side} eye.", "oct", "no diabetic macular edema"):
        sides = {"left", "os", "right", "od"} & set(normalize(varied).split())
        assert sides <= names, varied
        named += bool(sides)
    assert named > 200


def test_vary_caption_keeps_age_and_sex_or_drops_them(captions):
    text = "COVID-19 pneumonia, supine AP view, 61-year-old female."
    ages = [v for v in variants(captions, text, "cxr", "COVID-19") if "61" in v]
    assert len(ages) > 200
    assert all(re.search("female|woman", v) for v in ages)
    assert not any(re.search(r"\bmale|\bman\b|PA", v) for v in ages)


@pytest.mark.parametrize(
    "modality, finding, text",
    [
        ("oct", "no diabetic macular edema", "Macula without diabetic macular edema, left eye."),
        ("fundus", "no diabetic retinopathy", "No diabetic retinopathy."),
        ("chest_ct", "non-COVID", "Axial chest CT, negative for COVID-19 pneumonia."),
        ("brain_mri", "no tumor", "No evidence of brain tumor."),
        ("breast_us", "normal", "Breast ultrasound without a mass."),
    ],
)
def test_vary_caption_keeps_the_negation(captions, modality, finding, text):
    denies = re.compile(
        r"\b(no|non|not|without|negative|absent|absence|free|none|ruled out|excluded|normal|healthy|unremarkable|"
        r"grade 0|level 10|icdr 0|r0|ndr)\b",
        re.IGNORECASE,
    )
    for varied in variants(captions, text, modality, finding):
        assert denies.search(varied), varied


def test_vary_caption_adds_no_stage_that_the_row_does_not_name(captions):
    stages = {"mild", "moderate", "severe", "proliferative", "nonproliferative", "background"}
    mild = variants(captions, "Mild non-proliferative diabetic retinopathy.", "fundus", "diabetic retinopathy")
    assert all(grades(v) & stages <= {"mild", "nonproliferative"} for v in mild)
    own = [v for v in mild if "mild non-proliferative diabetic retinopathy" in v.lower()]
    assert len(own) > 0.4 * len(mild)
    plain = "Diabetic retinopathy, cotton wool spots and exudates, left eye."
    assert not any(grades(v) & stages for v in variants(captions, plain, "fundus", "diabetic retinopathy"))


def test_vary_caption_never_emits_a_new_phrasing(captions):
    for modality, findings in captions.items():
        for finding, f in findings.items():
            new = set(map(normalize, f["new"]))
            for text in f["train"][:4]:
                assert not new & set(map(normalize, variants(captions, text, modality, finding, 60)))
    # Not even where dropping an article, or the British spelling, would make one.
    new = ["there is tumor", "there is tumour", "There is a tumour"]
    tiny = {"brain_mri": {"tumor": {"train": ["There is a tumor."], "new": new}}}
    varied = set(map(normalize, variants(tiny, "There is a tumor.", "brain_mri", "tumor")))
    assert varied == {"there is a tumor"}


@pytest.mark.parametrize("finding", [None, "", "unheard of"])
def test_vary_caption_leaves_unknown_findings_alone(captions, finding):
    for varied in variants(captions, "Drusen at the macula, ___ left eye.", "fundus", finding, 50):
        assert normalize(varied) in {"drusen at the macula left eye", "drusen at macula left eye"}
    assert vary_caption("A mass.", "breast_mri", finding, random.Random(0), captions)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Stanford type A aortic dissection.", "type a aortic dissection"),
        ("stanford type a aortic dissection", "type a aortic dissection"),
        ("Influenza A pneumonia with an effusion", "influenza a pneumonia"),
        ("Hepatitis A cirrhosis", "hepatitis a cirrhosis"),
        ("Group A streptococcus in the lung", "group a streptococcus"),
        ("Lymphoma of stage IV A", "stage iv a"),
        ("The A and B lines", "a and b lines"),
        ("Insufficient evidence of metastasis", "insufficient evidence of metastasis"),
    ],
)
def test_a_class_named_a_is_no_article(text, kept):
    varied = {normalize(vary_caption(text, "cxr", None, random.Random(seed), {})) for seed in range(200)}
    assert all(kept in caption for caption in varied), varied


def test_articles_are_dropped_now_and_then():
    rng, text = random.Random(0), "The scan shows a nodule, no evidence of an effusion."
    varied = {normalize(vary_caption(text, "chest_ct", None, rng, {})) for _ in range(100)}
    assert varied == {"the scan shows a nodule no evidence of an effusion", "scan shows nodule no effusion"}
