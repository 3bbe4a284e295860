import pytest

from minim_pipeline import MODALITIES, check_caption, may_mirror, names_a_side


@pytest.mark.parametrize(
    "caption",
    """effusion on the Left|OD, drusen|Lt temporal glioma|rt. frontal meningioma|L MCA infarct|l mca infarct|(R) breast
    R-sided mass|l-sided tumor|L. temporal|DME, O.S.|o.d. drusen|O. S.|oculus sinister|dexter|levoscoliosis|LLL opacity
    mass at 10 o'clock|mass at 10 o’clock|lesion at 10:30|Tumor bei 10 Uhr|œil gauche|à droite|links|rechtes Auge
    ojo izquierdo|olho direito|occhio destro|venstre øye|höger öga|lewe oko|правый глаз|左眼|왼쪽 눈|RE drusen
    LMCA stroke|LUOQ mass, irregular|mass in RUOQ|effusion, lhs|R_frontal glioma|glioma (l)|mca infarct, l
    """.strip()
    .replace("\n", "|")
    .split("|"),
)
def test_sides_in_words_letters_and_clock_faces(caption):
    assert names_a_side(caption.strip())
    assert not may_mirror(MODALITIES["fundus"], "drusen", caption)


@pytest.mark.parametrize(
    "caption",
    """bright lesions, soft borders|L3 vertebra|T2 hyperintense lesion|diabetic macular edema|no signs of disease
    a clear view of the chest cavity|glioma, r/o lymphoma|temporal lobe mass|ROI in the brain|BI-RADS 4|upright film
    linear scar|T1_LR|mass, large|RT-PCR positive|LCC of the lung|the real and the ideal|solid nodule|high-grade glioma
    """.strip()
    .replace("\n", "|")
    .split("|"),
)
def test_captions_without_a_side_may_be_mirrored(caption):
    assert not names_a_side(caption.strip())
    assert may_mirror(MODALITIES["fundus"], caption.strip())
    assert not may_mirror(MODALITIES["cxr"], caption.strip()), "the heart lies on one side"


MISSING = "nan NaN None N/A n/a null NULL <NA> #N/A - -- ? … .".split()
MISSING += [" nan ", "nan.", "(none)", "NaN, NaN", "not available", "No caption."]


@pytest.mark.parametrize("text", MISSING)
def test_what_stands_for_a_missing_caption(text):
    with pytest.raises(ValueError, match="is no caption, but what stands where one is missing"):
        check_caption(text)


@pytest.mark.parametrize("text", ["normal", "no finding", "naevus", "None of the vessels is blocked", "正常", "E"])
def test_short_captions_that_say_something(text):
    check_caption(text)
