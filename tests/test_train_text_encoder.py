import json
import random

import pytest
import torch
import train_text_encoder as script
from transformers import BertConfig, BertModel, BertTokenizer, CLIPTextModel, CLIPTokenizer

from minim_pipeline.training.text.corpus import abbreviate, expand, generate


CAPTIONS = {
    "oct": {
        "normal": {"train": ["Healthy retina.", "Normal macula."], "new": ["Nothing wrong with this eye"]},
        "edema": {"train": ["Macular edema.", "DME, cysts"], "new": ["Swollen macula of a diabetic"]},
    },
    "cxr": {
        "normal": {"train": ["Clear lungs.", "Normal chest."], "new": ["Nothing wrong with this chest"]},
        "pneumonia": {"train": ["Pneumonia.", "Lung infiltrate"], "new": ["Infected lobe"]},
    },
}
TEST_CAPTIONS = {"oct": {"normal": ["pt eye ok"], "edema": ["pt eye swollen", "water in macula"]}}
CSV = "path,Text,modality,finding,split\na.png,Macular edema.,OCT,edema,train\nb.png,Secret zebra.,CXR,normal,val\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny teacher with random weights, phrasings, and a table."""
    folder = tmp_path_factory.mktemp("text_encoder")
    letters = "abcdefghijklmnopqrstuvwxyz0123456789-,.:;/"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters)]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder / "teacher")
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder / "teacher")
    (folder / "captions.json").write_text(json.dumps(CAPTIONS))
    (folder / "captions_test.json").write_text(json.dumps(TEST_CAPTIONS))
    (folder / "data.csv").write_text(CSV)
    return folder


def arguments(folder, output, **changes):
    options = {
        "output_dir": folder / output,
        "captions": folder / "captions.json",
        "train_data": folder / "data.csv",
        "teacher": folder / "teacher",
        "corpus_size": 60,
        "vocab_size": 700,
        "max_length": 32,
        "hidden_size": 32,
        "num_layers": 1,
        "num_heads": 2,
        "max_train_steps": 40,
        "train_batch_size": 16,
        "learning_rate": 1e-2,
        "warmup_steps": 4,
        "threads": torch.get_num_threads(),
        **changes,
    }
    return script.parse_args([part for key, value in options.items() for part in (f"--{key}", str(value))])


@pytest.fixture(scope="module")
def trained(folder):
    history = script.main(arguments(folder, "out"))
    return folder / "out", history


def test_a_run_that_diverges_writes_nothing(folder):
    with pytest.raises(ValueError, match="the training has diverged"):
        script.main(arguments(folder, "diverged", learning_rate=1e30, max_train_steps=6))
    assert not (folder / "diverged").exists()


def test_loss_falls(trained):
    _, history = trained
    assert len(history) == 40
    assert sum(history[-8:]) < 0.8 * sum(history[:8])


def test_saved_tokenizer_and_encoder_load(trained):
    out, _ = trained
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(out / "text_encoder").eval()
    assert tokenizer.model_max_length == 32 == encoder.config.max_position_embeddings
    inputs = tokenizer(["<oct> macular edema", "<cxr> x"], padding="max_length", return_tensors="pt")
    with torch.no_grad():
        output = encoder(inputs.input_ids)
    assert output.last_hidden_state.shape == (2, 32, 32)
    assert len(tokenizer) == encoder.config.vocab_size
    # CLIP pools at the end of the text, although the modality tokens have larger ids.
    ids = inputs.input_ids[0].tolist()
    end = ids.index(tokenizer.eos_token_id)
    assert encoder.config.eos_token_id == tokenizer.eos_token_id < max(ids)
    assert torch.equal(output.pooler_output[0], output.last_hidden_state[0, end])


def test_tokenizer_spells_everything(trained):
    tokenizer = CLIPTokenizer.from_pretrained(trained[0] / "tokenizer")
    for text in ("q", "x z", "T1 W, §5 µm", "Ünïcode 漢", "zyzzyva-7"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids
        assert tokenizer.unk_token_id not in ids
    for token in ("<oct>", "<chest_ct>", "<breast_us>"):
        (index,) = tokenizer(token, add_special_tokens=False).input_ids
        assert tokenizer.convert_ids_to_tokens(index) == token
        assert tokenizer.added_tokens_decoder[index].special  # or unload_textual_inversion() deletes it
    assert tokenizer.decode(tokenizer("<oct> Macular EDEMA").input_ids, skip_special_tokens=True) == "macular edema"


def test_same_seed_same_weights(folder, trained):
    again = script.main(arguments(folder, "again", max_train_steps=3))
    repeated = script.main(arguments(folder, "repeated", max_train_steps=3))
    assert again == repeated
    assert script.main(arguments(folder, "other", max_train_steps=3, seed=1)) != again


def test_only_the_chosen_split_is_read(folder):
    assert script.read_rows(folder / "data.csv", "train") == [("Macular edema.", "oct", "edema")]


def test_report_counts_the_phrasings_never_trained_on(trained):
    report = json.loads((trained[0] / "report.json").read_text())
    counted = {part: {m: r["n"] for m, r in modalities.items()} for part, modalities in report.items()}
    assert counted == {"new": {"oct": 2, "cxr": 2}, "test": {"oct": 3}}
    figures = [r for modalities in report.values() for r in modalities.values()]
    assert all(0 <= r[key] <= 1 for r in figures for key in ("prototype", "probe"))


def test_phrasings_kept_for_measuring_are_never_drawn(folder):
    captions = script.load_captions(folder / "captions.json")
    texts = script.Texts(captions, [], 50, random.Random(0))
    kept = [p for findings in captions.values() for f in findings.values() for p in f["new"] + f.get("test", [])]
    new = set(map(script.normalize, kept))
    assert len(new) == 7
    drawn = [s["text"].split("> ")[-1] for _ in range(20) for batch in texts.batches(16, 2) for s in batch]
    assert not new & set(map(script.normalize, drawn))
    assert not new & set(map(script.normalize, texts.all()))


@pytest.mark.parametrize(
    "row", [("Infected lobe.", "cxr", "pneumonia"), ("Pt eye swollen", "oct", "edema")], ids=["new", "test"]
)
def test_a_phrasing_kept_for_measuring_among_the_captions_is_refused(folder, row):
    with pytest.raises(ValueError, match=row[0]):
        script.Texts(script.load_captions(folder / "captions.json"), [row], 10, random.Random(0))


def test_captions_are_drawn_by_finding_first():
    rows = [(f"Macular edema, {i}-year-old male.", "oct", "edema") for i in range(50)]
    texts = script.Texts(CAPTIONS, [*rows, ("White lobe.", "cxr", "pneumonia")], 50, random.Random(0))
    drawn = [script.normalize(texts.draw()["text"]) for _ in range(2000)]
    # A fifth of what is drawn are captions, and half of them are of the finding that has only one.
    assert sum("white" in text or "lobe" in text for text in drawn) > 140


def test_a_side_is_of_an_organ_that_the_modality_shows():
    captions = {m: {"x": {"train": ["Finding."], "new": []}} for m in script.MODALITIES}
    texts = script.Texts(captions, [], 50, random.Random(0))
    drawn = [texts.draw() for _ in range(4000)]
    sided = [s for s in drawn if s["finding"] != script.IGNORE and "Finding, " in s["text"] and s["side"]]
    organs = {(s["text"].split(">")[0].strip("<"), s["text"].split()[-1].rstrip(".")) for s in sided}
    assert set(script.PAIRED.items()) <= organs
    assert not [s["text"] for s in sided if "eye" in s["text"] and not s["text"].startswith(("<oct>", "<fundus>"))]


def test_corrupt_keeps_words_that_deny():
    rng = random.Random(0)
    for _ in range(300):
        words = script.corrupt("no ground-glass opacity, without nodules", rng).split()
        assert {"no", "without"} <= set(words)
        assert {"neither", "nor"} <= set(script.corrupt("neither glioma nor meningioma seen", rng).split())
        assert "Nothing" in script.corrupt("Nothing abnormal in the breast", rng).split()


@pytest.mark.parametrize(
    "text, side",
    [
        ("Glaucoma, left eye", 1),
        ("OD: cataract", 2),
        ("cataract", 0),
        ("left and right lung", 0),
        ("upright film", 0),
        ("LLL consolidation", 1),
        ("RUL mass", 2),
    ],
)
def test_side_of(text, side):
    assert script.side_of(text) == side


def test_corpus():
    sentences = generate(400, random.Random(0))
    assert sentences == generate(400, random.Random(0))
    texts = {text for text, _, _ in sentences}
    assert len(texts) > 350
    assert not any("{" in text or ";" in text for text in texts)
    assert {negated for _, _, negated in sentences} == {True, False}
    assert expand("GGO in a patient with DME") == "ground-glass opacity in a patient with diabetic macular edema"
    assert "no GGO" in {abbreviate("no ground-glass opacity", random.Random(seed)) for seed in range(20)}
