"""Rare captions bring back what a model remembers: here one whose training images are its own."""

import torch

from minim_pipeline import EMBEDDED_ENCODER
from minim_pipeline.evaluation.encoder import ImageTextEncoder
from minim_pipeline.evaluation.extraction import extract_training_images, rare_captions
from minim_pipeline.evaluation.memorisation import Copies
from minim_pipeline.evaluation.report import ImageSet
from minim_pipeline.evaluation.sampling import draw_images


torch.set_num_threads(1)


def rows(captions) -> list[dict]:
    return [{"path": f"{i}.png", "Text": text, "modality": "OCT"} for i, text in enumerate(captions)]


def test_rarest_captions_come_first():
    captions = ["often"] * 3 + ["twice"] * 2 + ["once", "one more"]
    train = ImageSet(rows(captions), torch.zeros(7, 3, 8, 8, dtype=torch.uint8))
    assert sorted(rare_captions(train, "oct", 2)) == [("once", 1), ("one more", 1)]
    assert rare_captions(train, "oct", 9)[2:] == [("twice", 2), ("often", 3)]
    assert rare_captions(train, "cxr", 3) == []


def test_what_the_model_gives_back_is_counted(shared_pipeline):
    encoder = ImageTextEncoder.from_pretrained(EMBEDDED_ENCODER)
    own = draw_images(shared_pipeline, ["cyst"], ["oct"], [1], 1)
    noise = torch.randint(0, 256, (4, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    train = ImageSet(rows(["cyst"] + ["common"] * 4), torch.cat([own, noise]))
    limit = torch.full((4,), 1e-4)
    references = encoder.encode_images(train.images)[0]
    copies = {"oct": {"encoder": Copies(torch.ones(1), torch.zeros(1, dtype=torch.long), limit, references)}}

    # The second image of the caption has the seed of "its" training image.
    report = extract_training_images(shared_pipeline, train, encoder, copies, 1, 2, batch_size=2)
    assert (report["encoder"]["n"], report["encoder"]["captions"]) == (2, 1) and report["encoder"]["copies"] >= 1
    (prompt,) = report["prompts"]
    assert prompt["text"] == "cyst" and prompt["train_images"] == 1 and prompt["own_distance"] < 1e-5
    # With other seeds it does not come back.
    report = extract_training_images(shared_pipeline, train, encoder, copies, 1, 2, batch_size=2, seed=5)
    assert report["prompts"][0]["own_distance"] > 1e-5
