import json
import random

import pytest
import torch
import train_text_encoder as script
from corpus import abbreviate, expand, generate
from transformers import BertConfig, BertModel, BertTokenizer, CLIPTextModel, CLIPTokenizer


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


def test_report_counts_the_new_phrasings(trained):
    report = json.loads((trained[0] / "report.json").read_text())
    assert {m: r["n"] for m, r in report.items()} == {"oct": 2, "cxr": 2}
    assert all(0 <= r[key] <= 1 for r in report.values() for key in ("prototype", "probe"))


def test_new_phrasings_are_never_drawn():
    texts = script.Texts(CAPTIONS, [], 50, random.Random(0))
    new = {script.normalize(p) for findings in CAPTIONS.values() for f in findings.values() for p in f["new"]}
    drawn = [s["text"].split("> ")[-1] for _ in range(20) for batch in texts.batches(16, 2) for s in batch]
    assert not new & set(map(script.normalize, drawn))
    assert not new & set(map(script.normalize, texts.all()))


def test_a_new_phrasing_among_the_captions_is_refused():
    with pytest.raises(ValueError, match="Infected lobe"):
        script.Texts(CAPTIONS, [("Infected lobe.", "cxr", "pneumonia")], 10, random.Random(0))


def test_corrupt_keeps_words_that_deny():
    rng = random.Random(0)
    for _ in range(300):
        words = script.corrupt("no ground-glass opacity, without nodules", rng).split()
        assert {"no", "without"} <= set(words)


@pytest.mark.parametrize(
    "text, side",
    [
        ("Glaucoma, left eye", 1),
        ("OD: cataract", 2),
        ("cataract", 0),
        ("left and right lung", 0),
        ("upright film", 0),
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
