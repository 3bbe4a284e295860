import pytest
import torch

from minim_pipeline import MODALITIES, MinimPipeline, add_modality_tokens, negative_text, prompt_text


@pytest.fixture
def parts(make_pipeline):
    pipe = make_pipeline("sd1")
    return pipe.tokenizer, pipe.text_encoder


def test_tokens_start_as_the_mean_of_their_words(parts):
    tokenizer, text_encoder = parts
    before = text_encoder.get_input_embeddings().weight.detach().clone()
    ids = add_modality_tokens(tokenizer, text_encoder, ["oct", "Chest CT"])

    after = text_encoder.get_input_embeddings().weight
    assert ids == {"oct": len(before), "chest_ct": len(before) + 1} and len(after) == len(before) + 2
    assert torch.equal(after[: len(before)], before)
    words = tokenizer("axial chest ct", add_special_tokens=False).input_ids
    assert torch.allclose(after[ids["chest_ct"]], before[words].mean(0))
    assert tokenizer("<oct> a").input_ids[1] == ids["oct"]


def test_tokens_that_are_there_keep_what_they_learned(parts):
    tokenizer, text_encoder = parts
    first = add_modality_tokens(tokenizer, text_encoder, ["oct"])
    with torch.no_grad():
        text_encoder.get_input_embeddings().weight[first["oct"]] = 7.0
    second = add_modality_tokens(tokenizer, text_encoder, ["cxr", "oct"])
    assert second["oct"] == first["oct"] and second["cxr"] == first["oct"] + 1
    assert (text_encoder.get_input_embeddings().weight[first["oct"]] == 7.0).all()


def test_pools_at_the_end_of_the_text(parts, tmp_path):
    tokenizer, text_encoder = parts
    add_modality_tokens(tokenizer, text_encoder, ["oct"])
    inputs = tokenizer("<oct> edema", padding="max_length", max_length=20, return_tensors="pt")
    end = (inputs.input_ids[0] == tokenizer.eos_token_id).nonzero()[0, 0]

    text_encoder.save_pretrained(tmp_path)
    for encoder in (text_encoder, type(text_encoder).from_pretrained(tmp_path)):
        output = encoder(inputs.input_ids)
        assert torch.allclose(output.pooler_output[0], output.last_hidden_state[0, end])


def test_textual_inversion_comes_and_goes_and_the_tokens_stay(pipeline):
    prompt = {"prompt": "edema", "modality": "oct", "seeds": [0], "output_type": "np"}
    before = pipeline(**prompt).images
    ids = pipeline.tokenizer.convert_tokens_to_ids(["<oct>", "<brain_mri>"])

    pipeline.load_textual_inversion({"<drusen>": torch.randn(1, 32)})
    assert abs(pipeline(**{**prompt, "prompt": "<drusen>"}).images - before).max() > 0
    pipeline.unload_textual_inversion()

    assert pipeline.tokenizer.convert_tokens_to_ids(["<oct>", "<brain_mri>"]) == ids
    assert "<drusen>" not in pipeline.tokenizer.get_vocab()
    assert abs(pipeline(**prompt).images - before).max() < 1e-5


def test_tokens_survive_saving(pipeline_dir, shared_pipeline):
    tokenizer = MinimPipeline.from_pretrained(pipeline_dir).tokenizer
    assert tokenizer("<oct> Edema").input_ids == shared_pipeline.tokenizer("<oct> Edema").input_ids


def test_texts(parts, shared_pipeline):
    oct_ = MODALITIES["oct"]
    assert prompt_text("edema", oct_, shared_pipeline.tokenizer) == "<oct> edema"
    assert prompt_text("", oct_, shared_pipeline.tokenizer) == "<oct>"
    assert negative_text("", oct_, shared_pipeline.tokenizer) == "<oct>"
    assert negative_text("blur", oct_, shared_pipeline.tokenizer) == "<oct> blur"
    # Stable Diffusion's tokenizer has no such token.
    assert prompt_text("edema", oct_, parts[0]) == "optical coherence tomography of the retina, edema"
    assert negative_text("", oct_, parts[0]) == "" and negative_text("blur", oct_, parts[0]) == "blur"


def test_adding_nothing_new_changes_nothing(pipeline):
    before = pipeline.text_encoder.get_input_embeddings().weight
    add_modality_tokens(pipeline.tokenizer, pipeline.text_encoder, ["oct", "fundus"])
    assert pipeline.text_encoder.get_input_embeddings().weight is before
    with pytest.raises(ValueError, match="Unknown modality 'pet'"):
        add_modality_tokens(pipeline.tokenizer, pipeline.text_encoder, ["pet"])
