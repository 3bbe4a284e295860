import json
import random
import shutil

import pytest
import torch
from transformers import CLIPTextModel, CLIPTokenizer

from minim_pipeline.files import read_report
from minim_pipeline.modalities import MODALITIES
from minim_pipeline.training.captions import load_captions, normalize
from minim_pipeline.training.text.encoder import TextEncoderConfig, one_cycle, train
from minim_pipeline.training.text.texts import (
    IGNORE,
    Texts,
    abbreviate,
    corrupt,
    expand,
    generate,
    load_corpus,
    read_rows,
    side_of,
)


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
def folder(tmp_path_factory, teacher):
    """Phrasings, a table, and the teacher."""
    folder = tmp_path_factory.mktemp("text_encoder")
    (folder / "teacher").symlink_to(teacher)
    (folder / "captions.json").write_text(json.dumps(CAPTIONS))
    (folder / "captions_test.json").write_text(json.dumps(TEST_CAPTIONS))
    (folder / "data.csv").write_text(CSV)
    return folder


def options(folder, output, **changes):
    return TextEncoderConfig(
        **{
            "output_dir": str(folder / output),
            "captions": str(folder / "captions.json"),
            "train_data": str(folder / "data.csv"),
            "teacher": str(folder / "teacher"),
            "corpus_size": 60,
            "vocab_size": 700,
            "max_length": 32,
            "hidden_size": 32,
            "num_layers": 1,
            "num_heads": 2,
            "max_train_steps": 40,
            "train_batch_size": 16,
            "learning_rate": 1e-2,
            "lr_warmup_steps": 4,
            "threads": torch.get_num_threads(),
            **changes,
        }
    )


@pytest.fixture(scope="module")
def trained(folder):
    history = train(options(folder, "out"))
    return folder / "out", history


def test_a_run_that_diverges_writes_nothing(folder):
    with pytest.raises(ValueError, match="the training has diverged"):
        train(options(folder, "diverged", learning_rate=1e30, max_train_steps=6))
    assert not (folder / "diverged" / "text_encoder").exists() and not list((folder / "diverged").glob("checkpoint-*"))


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
    again = train(options(folder, "again", max_train_steps=3))
    repeated = train(options(folder, "repeated", max_train_steps=3))
    assert again == repeated
    assert train(options(folder, "other", max_train_steps=3, seed=1)) != again


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(folder, trained):
    """By the same command; and one that is finished is left alone."""
    whole = train(options(folder, "whole", max_train_steps=12))
    part = train(options(folder, "resumed", max_train_steps=12, checkpointing_steps=5, validation_steps=5))
    assert part == whole, "how often it is looked at changes nothing"
    for name in ("finished.json", "checkpoint-12"):
        path = folder / "resumed" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert train(options(folder, "resumed", max_train_steps=12, checkpointing_steps=5)) == whole[10:]
    assert train(options(folder, "resumed", max_train_steps=12)) == []
    encoders = [CLIPTextModel.from_pretrained(folder / name / "text_encoder") for name in ("whole", "resumed")]
    assert all(torch.equal(*pair) for pair in zip(*(encoder.parameters() for encoder in encoders)))


def test_one_cycle_is_that_of_torch():
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 1000, pct_start=0.2)
    for step in range(1000):
        share, beta = one_cycle(step / 1000, 0.2)
        assert abs(optimizer.param_groups[0]["lr"] - 0.1 * share) < 1e-3
        assert abs(optimizer.param_groups[0]["betas"][0] - beta) < 1e-3
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("change", [{"compile": True}, {"ema_decay": 0.5}])
def test_what_an_option_would_not_do_is_refused(folder, change):
    with pytest.raises(ValueError, match=f"--{next(iter(change))} does nothing here: leave it out"):
        options(folder, "none", **change)


def test_only_the_chosen_split_is_read(folder):
    assert read_rows(folder / "data.csv", "train") == [("Macular edema.", "oct", "edema")]


def test_report_counts_the_phrasings_never_trained_on(trained):
    report = read_report(trained[0] / "report.json")
    counted = {part: {m: r["n"] for m, r in modalities.items()} for part, modalities in report.items()}
    assert counted == {"new": {"oct": 2, "cxr": 2}, "test": {"oct": 3}}
    figures = [r for modalities in report.values() for r in modalities.values()]
    assert all(0 <= r[key] <= 1 for r in figures for key in ("prototype", "probe"))


def test_phrasings_kept_for_measuring_are_never_drawn(folder):
    captions = load_captions(folder / "captions.json")
    texts = Texts(captions, [], 50, random.Random(0))
    kept = [p for findings in captions.values() for f in findings.values() for p in f["new"] + f.get("test", [])]
    new = set(map(normalize, kept))
    assert len(new) == 7
    drawn = [s["text"].split("> ")[-1] for _ in range(20) for batch in texts.batches(16, 2) for s in batch]
    assert not new & set(map(normalize, drawn))
    assert not new & set(map(normalize, texts.all()))


@pytest.mark.parametrize(
    "row", [("Infected lobe.", "cxr", "pneumonia"), ("Pt eye swollen", "oct", "edema")], ids=["new", "test"]
)
def test_a_phrasing_kept_for_measuring_among_the_captions_is_refused(folder, row):
    with pytest.raises(ValueError, match=row[0]):
        Texts(load_captions(folder / "captions.json"), [row], 10, random.Random(0))


def test_captions_are_drawn_by_finding_first():
    rows = [(f"Macular edema, {i}-year-old male.", "oct", "edema") for i in range(50)]
    texts = Texts(CAPTIONS, [*rows, ("White lobe.", "cxr", "pneumonia")], 50, random.Random(0))
    drawn = [normalize(texts.draw()["text"]) for _ in range(2000)]
    # A fifth of what is drawn are captions, and half of them are of the finding that has only one.
    assert sum("white" in text or "lobe" in text for text in drawn) > 140


def test_a_side_is_of_an_organ_that_the_modality_shows():
    captions = {m: {"x": {"train": ["Finding."], "new": []}} for m in MODALITIES}
    texts = Texts(captions, [], 50, random.Random(0))
    drawn = [texts.draw() for _ in range(4000)]
    sided = [s for s in drawn if s["finding"] != IGNORE and "Finding, " in s["text"] and s["side"]]
    organs = {(s["text"].split(">")[0].strip("<"), s["text"].split()[-1].rstrip(".")) for s in sided}
    assert set(load_corpus()["paired"].items()) <= organs
    assert not [s["text"] for s in sided if "eye" in s["text"] and not s["text"].startswith(("<oct>", "<fundus>"))]


def test_corrupt_keeps_words_that_deny():
    rng = random.Random(0)
    for _ in range(300):
        words = corrupt("no ground-glass opacity, without nodules", rng).split()
        assert {"no", "without"} <= set(words)
        assert {"neither", "nor"} <= set(corrupt("neither glioma nor meningioma seen", rng).split())
        assert "Nothing" in corrupt("Nothing abnormal in the breast", rng).split()


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
    assert side_of(text) == side


def test_corpus():
    sentences = generate(400, random.Random(0))
    assert sentences == generate(400, random.Random(0))
    texts = {text for text, _, _ in sentences}
    assert len(texts) > 350
    assert not any("{" in text or ";" in text for text in texts)
    assert {negated for _, _, negated in sentences} == {True, False}
    assert expand("GGO in a patient with DME") == "ground-glass opacity in a patient with diabetic macular edema"
    assert "no GGO" in {abbreviate("no ground-glass opacity", random.Random(seed)) for seed in range(20)}
