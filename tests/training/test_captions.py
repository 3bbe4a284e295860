import json
import random
import re

import pytest

from minim_pipeline import MODALITIES, names_a_side
from minim_pipeline.training.captions import grades, load_captions, normalize, split_suffix, vary_caption


FINDINGS = {
    "oct": {
        "normal",
        "no diabetic macular edema",
        "diabetic macular edema",
        "diabetic retinopathy without edema",
        "age-related macular degeneration",
        "choroidal neovascularization",
        "drusen",
        "subretinal fluid",
    },
    "fundus": {
        "normal",
        "cataract",
        "glaucoma",
        "no diabetic retinopathy",
        "diabetic retinopathy",
        "mild non-proliferative diabetic retinopathy",
        "moderate non-proliferative diabetic retinopathy",
        "severe non-proliferative diabetic retinopathy",
        "proliferative diabetic retinopathy",
        "diabetic macular edema",
        "pathological myopia",
        "epiretinal membrane",
        "dry age-related macular degeneration",
        "wet age-related macular degeneration",
        "drusen",
        "hypertensive retinopathy",
        "myelinated nerve fibers",
        "vitreous degeneration",
        "retinal vein occlusion",
    },
    "cxr": {
        "normal",
        "bacterial pneumonia",
        "viral pneumonia",
        "COVID-19",
        "pneumonia",
        "atelectasis",
        "edema",
        "infiltration",
        "effusion",
        "consolidation",
        "nodule or mass",
        "pneumothorax",
        "cardiomegaly",
        "pleural thickening",
        "emphysema",
        "fibrosis",
    },
    "chest_ct": {
        "normal",
        "COVID-19",
        "non-COVID",
        "adenocarcinoma",
        "squamous cell carcinoma",
        "large cell carcinoma",
        "lung cancer",
        "benign nodule",
    },
    "brain_mri": {"glioma", "lower-grade glioma", "meningioma", "pituitary tumor", "no tumor"},
    "breast_us": {"benign", "malignant", "normal"},
    "breast_mri": {
        "malignant",
        "benign",
        "HER2-positive cancer",
        "hormone-receptor-positive HER2-negative cancer",
        "triple-negative cancer",
    },
}


@pytest.fixture(scope="module")
def captions():
    return load_captions()


def variants(captions, text, modality, finding, n=300):
    rng = random.Random(0)
    return [vary_caption(text, modality, finding, rng, captions) for _ in range(n)]


def test_every_finding_has_enough_phrasings(captions):
    assert {m: set(f) for m, f in captions.items()} == FINDINGS
    assert set(captions) == set(MODALITIES)
    for findings in captions.values():
        for phrasings in findings.values():
            assert set(phrasings) == {"train", "new", "test"}
            assert len(phrasings["train"]) >= 25
            assert len(phrasings["new"]) >= 4
            assert len(phrasings["test"]) >= 6


def test_no_phrasing_twice_in_a_modality_and_no_new_one_trained_on(captions):
    trained = {normalize(p) for findings in captions.values() for f in findings.values() for p in f["train"]}
    for findings in captions.values():
        everything = [normalize(p) for f in findings.values() for p in f["train"] + f["new"] + f["test"]]
        assert len(everything) == len(set(everything))
        assert not trained & {normalize(p) for f in findings.values() for p in f["new"] + f["test"]}


def test_no_phrasing_for_measuring_is_one_to_train_on_in_another_order(captions):
    def words(phrasing):
        return frozenset(normalize(phrasing).split())

    for findings in captions.values():
        trained = {words(p) for f in findings.values() for p in f["train"]}
        assert not [p for f in findings.values() for p in f["new"] + f["test"] if words(p) in trained]


def test_phrasings_name_no_side_age_or_view(captions):
    # A mirrored image, or the suffix of a row, would make such a phrasing wrong.
    for findings in captions.values():
        for f in findings.values():
            for phrasing in f["train"] + f["new"] + f["test"]:
                assert not names_a_side(phrasing), phrasing
                assert not re.search(r"year-old|\bAP\b|\bPA\b|\b[LR][LMU]L\b|\d [cm]m\b", phrasing), phrasing


def test_phrasings_are_read_whole(captions):
    from transformers import CLIPTokenizer

    from minim_pipeline import EMBEDDED_CHECKPOINT

    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED_CHECKPOINT, subfolder="tokenizer")
    for modality, findings in captions.items():
        for f in findings.values():
            texts = [f"{MODALITIES[modality].token} {p}" for p in f["train"] + f["new"] + f["test"]]
            assert max(map(len, tokenizer(texts).input_ids)) <= tokenizer.model_max_length
            assert max(len(text.split()) for text in texts) <= 30


def test_test_phrasings_are_read_from_the_file_beside(tmp_path):
    own = {"oct": {"hole": {"train": ["Macular hole."], "new": ["A hole"]}}}
    (tmp_path / "own.json").write_text(json.dumps(own))
    assert load_captions(tmp_path / "own.json") == own
    (tmp_path / "own_test.json").write_text(json.dumps({"oct": {"hole": ["pt has hole in eye"]}}))
    assert load_captions(tmp_path / "own.json")["oct"]["hole"]["test"] == ["pt has hole in eye"]
    (tmp_path / "own_test.json").write_text(json.dumps({"oct": {"whole": ["pt has hole in eye"]}}))
    with pytest.raises(ValueError, match="own_test.json .* does not know: .*whole"):
        load_captions(tmp_path / "own.json")


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
        r"\b(no|non|not|without|negative|absent|absence|free|none|nothing|against|ruled out|excluded|normal|"
        r"healthy|unremarkable|grade 0|level 10|icdr 0|r0|ndr)\b",
        re.IGNORECASE,
    )
    for varied in variants(captions, text, modality, finding):
        assert denies.search(varied), varied


def test_vary_caption_adds_no_stage_that_the_row_does_not_name(captions):
    stages = {"mild", "moderate", "severe", "proliferative", "nonproliferative", "background"}
    finding = "mild non-proliferative diabetic retinopathy"
    for text in ("Mild non-proliferative diabetic retinopathy.", "Diabetic retinopathy grade 1."):
        mild = variants(captions, text, "fundus", finding)
        assert all(grades(v) & stages <= {"mild", "nonproliferative"} for v in mild)
        assert any("mild" in v.lower() for v in mild)
        own = [v for v in mild if normalize(text) == normalize(v)]
        assert 0.3 * len(mild) < len(own) < 0.9 * len(mild)
    plain = "Diabetic retinopathy, cotton wool spots and exudates, left eye."
    assert not any(grades(v) & stages for v in variants(captions, plain, "fundus", "diabetic retinopathy"))


def test_vary_caption_never_emits_a_new_phrasing(captions):
    for modality, findings in captions.items():
        for finding, f in findings.items():
            new = set(map(normalize, f["new"] + f["test"]))
            for text in f["train"][:2]:
                assert not new & set(map(normalize, variants(captions, text, modality, finding, 60)))
    # Not even where dropping an article, or the British spelling, would make one.
    new = ["there is tumor", "there is tumour", "There is a tumour"]
    for kept in ({"new": new}, {"new": [], "test": new}):
        tiny = {"brain_mri": {"tumor": {"train": ["There is a tumor."], **kept}}}
        varied = set(map(normalize, variants(tiny, "There is a tumor.", "brain_mri", "tumor")))
        assert varied == {"there is a tumor"}


@pytest.mark.parametrize(
    "modality, finding, text, never",
    [
        ("cxr", "effusion", "Unilateral pleural effusion.", r"bilateral"),
        ("cxr", "effusion", "Layering pleural fluid.", r"unilateral|bilateral"),
        ("cxr", "bacterial pneumonia", "Bacterial pneumonia, PA view, 45-year-old male.", r"child|p(a)?ediatric"),
        ("fundus", "retinal vein occlusion", "Branch retinal vein occlusion, right eye.", r"central|crvo|\bleft"),
        ("fundus", "retinal vein occlusion", "Central retinal vein occlusion.", r"branch|brvo|quadrant|sector"),
        ("fundus", "drusen", "Hard drusen around the macula.", r"soft"),
        ("fundus", "vitreous degeneration", "Vitreous opacities, vitreous degeneration.", r"asteroid"),
        ("oct", "drusen", "Early age-related macular degeneration with drusen.", r"intermediate"),
        ("brain_mri", "glioma", "Glioma.", r"gbm|glioblastoma|high[- ]grade|low[- ]grade|hgg|lgg|\bt[12]|flair"),
        ("brain_mri", "pituitary tumor", "Brain MRI showing a pituitary macroadenoma.", r"micro"),
        ("cxr", "COVID-19", "COVID-19 pneumonia, PA view.", r"intubated|bilateral|severe"),
        ("breast_mri", "HER2-positive cancer", "HER2-positive breast cancer on contrast-enhanced MRI.", r"negative"),
    ],
)
def test_vary_caption_adds_nothing_that_contradicts_the_row(captions, modality, finding, text, never):
    varied = variants(captions, text, modality, finding, 600)
    assert len(set(map(normalize, varied))) > 10
    for caption in varied:
        assert not re.search(never, caption, re.IGNORECASE), caption


def test_vary_caption_keeps_size_and_sequence_or_drops_them(captions):
    text = "HER2-positive breast cancer on contrast-enhanced MRI, mass about 23 mm."
    sizes = [v for v in variants(captions, text, "breast_mri", "HER2-positive cancer") if re.search("[cm]m", v)]
    assert len(sizes) > 200
    assert all(re.search(r"23 mm|2\.3 cm", v) for v in sizes)
    flair = variants(captions, "Glioma, FLAIR.", "brain_mri", "glioma")
    assert sum("flair" in v.lower() for v in flair) > 200


def test_vary_caption_finds_the_finding_behind_others(captions):
    text = "Infiltration, pneumonia, edema, pleural thickening, PA view."
    varied = variants(captions, text, "cxr", "edema")
    assert len(set(map(normalize, varied))) > 50
    for caption in varied:
        others = {"infiltration", "pneumonia", "pleural thickening"}
        assert sum(other in caption.lower() for other in others) in (0, 3), caption
    assert sum("pleural thickening" in v.lower() for v in varied) > 200


def test_vary_caption_finds_the_phrasing_before_a_comma_without_a_space(captions):
    varied = variants(captions, "Pathological myopia,lens dust, right eye.", "fundus", "pathological myopia")
    assert len(set(map(normalize, varied))) > 30
    assert sum("lens dust" in v.lower() for v in varied) > 200


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
        ("A fib with effusion", "a fib"),
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
