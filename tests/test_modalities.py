import pytest

from minim_pipeline.modalities import AMBIGUOUS, MODALITIES, names_a_side, resolve_modality, split_prefix


def test_minims_six_and_breast_ultrasound_are_known():
    names = ["OCT", "Fundus", "CXR", "ChestCT", "BrainMRI", "BreastMRI", "BreastUS"]
    assert [m.name for m in MODALITIES.values()] == names
    assert [m.token for m in MODALITIES.values()][3] == "<chest_ct>"
    assert [m.id for m in MODALITIES.values() if not m.grey] == ["fundus"]


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        ("OCT", "oct"),
        ("Chest CT", "chest_ct"),
        ("ChestCT", "chest_ct"),
        ("chest-ct", "chest_ct"),
        ("chest x-ray", "cxr"),
        ("X-Ray", "cxr"),
        (" Brain  MRI ", "brain_mri"),
        ("Colour fundus", "fundus"),
        ("breast_us", "breast_us"),
    ],
)
def test_aliases(spelling, expected):
    assert resolve_modality(spelling).id == expected


def test_every_name_and_alias_is_of_one_modality():
    for modality in MODALITIES.values():
        for spelling in (modality.id, modality.name, *modality.aliases):
            assert resolve_modality(spelling) is modality


def test_unknown_names_those_known_and_the_nearest():
    with pytest.raises(ValueError, match=r"Unknown modality 'fundis'.*'breast_us'.*Did you mean 'fundus'\?"):
        resolve_modality("fundis")


def test_known_but_not_trained():
    with pytest.raises(ValueError, match="'breast_mri' is known, but.*not been trained.*trained: 'oct', 'cxr'"):
        resolve_modality("BreastMRI", trained=["oct", "cxr"])


@pytest.mark.parametrize("name", ["MRI", "mr", "CT", "breast"])
def test_ambiguous_names_the_candidates(name):
    with pytest.raises(ValueError, match="ambiguous: it may be") as error:
        resolve_modality(name)
    assert all(repr(candidate) in str(error.value) for candidate in AMBIGUOUS[name.lower()])


def test_no_string():
    with pytest.raises(ValueError, match="has to be a string, got 3"):
        resolve_modality(3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("OCT: macular edema", ("OCT", "macular edema")),
        ("Chest CT : nodule", ("Chest CT", "nodule")),
        ("MRI: glioma", ("MRI", "glioma")),
        ("two findings: edema and drusen", (None, "two findings: edema and drusen")),
        ("drusen", (None, "drusen")),
    ],
)
def test_split_prefix(text, expected):
    assert split_prefix(text) == expected


def test_names_a_side():
    assert names_a_side("effusion on the Left") and names_a_side("OD, drusen")
    assert not names_a_side("bright lesions, soft borders")
