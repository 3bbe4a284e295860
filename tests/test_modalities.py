import json

import pytest

from minim_pipeline import modalities
from minim_pipeline.modalities import (
    AMBIGUOUS,
    MODALITIES,
    Modality,
    register_definitions,
    register_modality,
    resolve_modality,
    split_prefix,
)


SKIN = Modality("skin", "Dermoscopy", "photograph of the skin", ("skin lesion",), grey=False, flip=True)


@pytest.fixture
def table():
    """What a test registers is forgotten after it."""
    tables = (modalities.MODALITIES, modalities._BY_KEY)
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before):
        table.clear()
        table.update(entries)


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


def test_a_registered_modality_is_like_those_of_the_table(table):
    assert register_modality(SKIN) is SKIN
    assert register_modality(Modality(**vars(SKIN))) is SKIN, "the same again"
    for spelling in ("skin", "dermoscopy", "Skin-Lesion"):
        assert resolve_modality(spelling) is SKIN
    assert split_prefix("Dermoscopy: nevus") == ("Dermoscopy", "nevus")
    with pytest.raises(ValueError, match="'skin' is known, but this model has not been trained on it"):
        resolve_modality("skin", trained=["oct"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"grey": True}, "'skin' is in the table already, with another definition: grey is False, now True"),
        ({"id": "Skin"}, "has to begin with a letter a-z .* got 'Skin'"),
        ({"id": "2d"}, "has to begin with a letter a-z .* got '2d'"),
        ({"id": "x_ray"}, "'x_ray' cannot be called 'x_ray': that is modality 'cxr'"),
        ({"id": "photo", "aliases": ("Colour Fundus",)}, "'photo' cannot be called 'Colour Fundus': .* 'fundus'"),
        ({"id": "photo", "name": "CT"}, "cannot be called 'CT': that may be 'chest_ct' or 'oct'"),
        ({"id": "photo", "name": "-"}, "'photo': its name, its words and its aliases must not be empty"),
        ({"id": "photo", "words": " "}, "'photo': its name, its words and its aliases must not be empty"),
    ],
)
def test_what_cannot_be_registered(table, changed, message):
    register_modality(SKIN)
    before = dict(MODALITIES)
    fields = {"name": "Photo", "aliases": ()} if "id" in changed else {}
    with pytest.raises(ValueError, match=message):
        register_modality(Modality(**vars(SKIN) | fields | changed))
    assert before == MODALITIES


LOAD = """
import json, sys
folder, package = sys.argv[1], json.loads(sys.argv[2])
if not package:
    sys.modules["minim_pipeline"] = None  # as if it were not installed
from diffusers import DiffusionPipeline
if package:
    import minim_pipeline.pipeline_minim
    pipe = DiffusionPipeline.from_pretrained(folder)
else:
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
pipe.save_config(f"{folder}/../again")
image = pipe("nevus", modality="skin lesion", seeds=[0], num_inference_steps=2, output_type="np").images[0]
print(json.dumps([image.shape, float(abs(image[..., 0] - image[..., 1]).max())]))
"""


@pytest.mark.parametrize("package", [True, False])
def test_a_pipeline_brings_its_own_modalities_along(make_pipeline, nursery, table, tmp_path, package):
    from minim_pipeline import add_modality_tokens

    register_modality(SKIN)
    pipe = make_pipeline(modalities=["oct", "skin"])
    add_modality_tokens(pipe.tokenizer, pipe.text_encoder, ["skin"])
    pipe.save_pretrained(tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    definition = {"name": "Dermoscopy", "words": SKIN.words, "aliases": ["skin lesion"], "grey": False, "flip": True}
    assert index["custom_modalities"] == {"skin": definition}
    done = nursery.run("-c", LOAD, tmp_path / "model", json.dumps(package))
    assert done.returncode == 0, done.stderr
    shape, colour = json.loads(done.stdout.splitlines()[-1])
    assert shape == [64, 64, 3] and colour > 0
    assert json.loads((tmp_path / "again" / "model_index.json").read_text())["custom_modalities"] == {
        "skin": definition
    }


def test_a_model_s_definition_gives_way_to_the_table(table):
    """A model that was saved before the table knew its modality is loaded with the table's names and words."""
    register_modality(SKIN)
    register_definitions({"skin": {"name": "Skin", "words": "skin", "aliases": ["mole"], "grey": False, "flip": True}})
    assert resolve_modality("skin") is SKIN
    with pytest.raises(ValueError, match="in the table already.*grey is False, now True"):
        register_definitions({"skin": {"name": "Skin", "words": "skin", "grey": True, "flip": True}})


def test_a_pipeline_of_the_table_says_nothing_of_others(make_pipeline, tmp_path):
    make_pipeline().save_config(tmp_path)
    assert "custom_modalities" not in json.loads((tmp_path / "model_index.json").read_text())


def test_a_pipeline_knows_its_own_modalities_without_a_registry(make_pipeline, table):
    """Built from parts, beside another one that means something else by the same word."""
    skin = {"name": "Dermoscopy", "words": "photograph of the skin", "aliases": ["lesion"], "grey": False}
    one = make_pipeline(modalities=["oct", "skin"], custom_modalities={"skin": skin})
    two = make_pipeline(modalities=["oct", "liver"], custom_modalities={"liver": skin | {"name": "CT of the liver"}})
    assert "skin" not in MODALITIES and "liver" not in MODALITIES
    for pipe, own in ((one, "skin"), (two, "liver")):
        prompts, (modality,) = pipe.resolve_prompts("Lesion: dark", None, 1)
        assert prompts == ["dark"] and modality.id == own and not modality.grey
        assert pipe("dark", modality="lesion", seeds=[0]).images[0].size == (64, 64)
    with pytest.raises(ValueError, match="Unknown modality 'skin'; known: .*'liver'. Did you mean"):
        two("dark", modality="skin")
    with pytest.raises(ValueError, match="'skin' cannot be called 'OCT': that is modality 'oct'"):
        make_pipeline(custom_modalities={"skin": skin | {"aliases": ["OCT"]}})


def test_reading_an_index_registers_nothing(tmp_path, table):
    from minim_pipeline.loading import read_model_index, register_modalities

    definition = {"name": "Dermoscopy", "words": "photograph of the skin"}
    index = {"modalities": "oct skin", "custom_modalities": {"skin": definition}}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert read_model_index(str(tmp_path))["modalities"] == ["oct", "skin"] and "skin" not in MODALITIES
    assert register_modalities(str(tmp_path)) == read_model_index(str(tmp_path))
    assert resolve_modality("Dermoscopy").id == "skin"
