"""Whether generated images can be told from real ones: a guess, a certainty, and what only a decoder gives away."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from minim_pipeline.evaluation import two_sample
from minim_pipeline.evaluation.extractors import Extractor
from minim_pipeline.evaluation.images import to_unit
from minim_pipeline.evaluation.metrics import auroc, gradient_magnitude
from minim_pipeline.evaluation.realism import RealismSettings, realism, reconstruct
from minim_pipeline.evaluation.report import ImageSet, over_floor
from minim_pipeline.evaluation.two_sample import halves, held_out_scores, mean_auroc, network, ridge


torch.set_num_threads(1)


def pictures(seed: int, count: int = 60) -> torch.Tensor:
    """Bright blots on a darker ground, and noise: uint8 [N, 3, 32, 32], grey."""
    g = torch.Generator().manual_seed(seed)
    coarse = F.interpolate(torch.rand(count, 1, 4, 4, generator=g), size=(32, 32), mode="bilinear")
    x = 150 + 80 * coarse + 12 * torch.randn(count, 1, 32, 32, generator=g)
    return x.clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)


def image_set(images: torch.Tensor, **columns) -> ImageSet:
    rows = [{"path": f"{i}.png", "Text": "a", "modality": "OCT"} for i in range(len(images))]
    for name, values in columns.items():
        rows = [row | {name: value} for row, value in zip(rows, values)]
    return ImageSet(rows, images)


class Halving:
    """An autoencoder that keeps every second pixel of a row and column: what has gone through it stays as it is."""

    device, dtype = torch.device("cpu"), torch.float32

    def encode(self, x):
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: x[:, :, ::2, ::2]))

    def decode(self, z):
        return SimpleNamespace(sample=z.repeat_interleave(2, -1).repeat_interleave(2, -2))


def looked_at(images: torch.Tensor) -> torch.Tensor:
    """How bright an image is, how sharp, and how alike neighbours are, at two places."""
    x = to_unit(images)[:, 0]
    alike = [(x[:, :, i + 1] - x[:, :, i]).abs().mean(1) for i in (0, 1)]
    return torch.stack([x.mean((1, 2)), gradient_magnitude(images), *alike], 1)


EXTRACTOR = Extractor("eyes", "0" * 16, looked_at)


def told(sets: dict[str, ImageSet], **settings) -> dict:
    features = {("eyes", name): looked_at(images.images) for name, images in sets.items()}
    return realism(sets, "oct", features, RealismSettings([EXTRACTOR], **settings))


@pytest.fixture(scope="module")
def real_sets() -> dict[str, ImageSet]:
    return {"real": image_set(pictures(0)), "train": image_set(pictures(1, 90))}


def test_images_of_one_kind_are_a_guess_and_inverted_ones_are_certain(real_sets):
    same = told(real_sets | {"synthetic": image_set(pictures(2))})["two_sample"]["eyes"]
    assert 0.3 < same["raw"]["value"] < 0.7 and same["raw"]["n"] == 60
    low, high = same["raw"]["interval"]
    assert low < 0.55 and high > 0.45
    other = told(real_sets | {"synthetic": image_set(255 - pictures(2))})["two_sample"]["eyes"]
    assert other["raw"]["value"] > 0.99
    assert other["raw_floor"] == same["raw_floor"], "real against real, whatever was generated"
    assert 0.3 < other["raw_floor"]["value"] < 0.7


def test_what_the_decoder_alone_gives_away_is_gone_once_both_sides_are_decoded(real_sets):
    generated = reconstruct(Halving(), pictures(2), grey=True)
    found = told(real_sets | {"synthetic": image_set(generated)}, autoencoder=Halving())
    tests = found["two_sample"]["eyes"]
    assert tests["raw"]["value"] > 0.99
    assert 0.3 < tests["decoded"]["value"] < 0.7 and 0.3 < tests["decoded_floor"]["value"] < 0.7
    assert found["sharpness"]["real"] == "decoded" and found["sharpness"]["value"] == pytest.approx(1, abs=0.1)


def test_blurred_images_are_less_sharp(real_sets):
    blurred = F.avg_pool2d(pictures(2).float(), 3, 1, 1).to(torch.uint8)
    sharpness = told(real_sets | {"synthetic": image_set(blurred)})["sharpness"]
    assert sharpness["value"] < 0.7 and sharpness["interval"][1] < 1 and sharpness["real"] == "raw"


def test_what_cannot_be_measured_says_why(real_sets):
    found = told({"real": real_sets["real"], "synthetic": image_set(pictures(2))})["two_sample"]["eyes"]
    assert found["raw_floor"] == {"left_out": "no training images were given"}
    assert "--autoencoder" in found["decoded"]["left_out"]
    few = told(real_sets | {"synthetic": image_set(pictures(2, 7))})["two_sample"]["eyes"]
    assert "7 and 7 given, equally many and at least 8 needed" in few["raw"]["left_out"]
    flat = image_set(torch.zeros(60, 3, 32, 32, dtype=torch.uint8))
    assert "no edges" in told({"real": flat, "synthetic": real_sets["real"]})["sharpness"]["left_out"]
    one = image_set(pictures(0), group=["the only patient"] * 60)
    found = told({"real": one, "synthetic": image_set(pictures(2))})["two_sample"]["eyes"]
    assert "1 group given" in found["raw"]["left_out"]


def test_both_sets_are_equally_large(real_sets):
    found = told(real_sets | {"synthetic": image_set(pictures(2, 20))})["two_sample"]["eyes"]
    assert found["raw"]["n"] == found["raw_floor"]["n"] == 20


def test_images_of_a_patient_are_not_learned_from_and_asked_about():
    groups = [f"patient {i // 6}" for i in range(60)]
    asked = []

    def fit(real, generated):
        learned = {groups[int(i)] for i in real[:, 0]}

        def score(items):
            asked.append(not learned & {groups[int(i)] for i in items[:, 0]})
            return items[:, 0]

        return score

    numbers = torch.arange(60.0)[:, None]
    held_out_scores(numbers, numbers, (groups, groups), fit)
    assert asked == [True] * 4
    assert 24 <= halves(groups).sum() <= 36
    uneven = halves(["a"] + ["b"] * 9)
    assert 0 < uneven.sum() < 10, "a half is never empty"


def test_auroc_counts_ties_as_halves():
    assert auroc(torch.tensor([0.0, 1.0, 1.0]), torch.tensor([1.0, 2.0])) == pytest.approx(5 / 6)
    assert auroc(torch.tensor([1.0, 2.0]), torch.tensor([0.0])) == 0
    with pytest.raises(ValueError, match="0 given, at least 1 needed"):
        auroc(torch.zeros(0), torch.zeros(2))


def test_more_features_than_images_do_not_tell_what_is_not_there():
    g = torch.Generator().manual_seed(0)
    real, same = torch.randn(2, 80, 400, generator=g)
    assert 0.3 < mean_auroc(*held_out_scores(real, same, (range(80), range(80)), ridge)) < 0.7
    assert mean_auroc(*held_out_scores(real, same + 0.3, (range(80), range(80)), ridge)) > 0.95


def not_installed(architecture: str) -> None:
    raise ImportError(architecture)


@pytest.mark.parametrize("installed", [True, False])
def test_a_network_is_fine_tuned_where_steps_are_asked_for(installed, real_sets, monkeypatch):
    """From ImageNet where its weights are installed, and from scratch elsewhere."""
    if not installed:
        monkeypatch.setattr(two_sample, "check_architecture", not_installed)
    sets = {"real": image_set(pictures(0, 8)), "synthetic": image_set(255 - pictures(2, 8))}
    found = told(sets, steps=1)["two_sample_trained"]
    assert found["raw"]["network"] == ("efficientnet-lite0" if installed else "resnet")
    assert found["raw"]["steps"] == 1 and 0 <= found["raw"]["value"] <= 1
    assert "two_sample_trained" not in told(sets)


def test_the_network_learns_what_can_be_seen(monkeypatch):
    monkeypatch.setattr(two_sample, "check_architecture", not_installed)
    real, generated = pictures(0, 16), 255 - pictures(2, 16)
    scores = held_out_scores(real, generated, (range(16), range(16)), network(12, batch_size=8))
    assert mean_auroc(*scores) > 0.9


def test_a_distance_over_its_floor():
    distance = {"value": 3.0, "interval": [2.0, 5.0], "n": 9}
    assert over_floor(distance, {"value": 2.0, "n": 9}) == {
        "value": 1.5,
        "n": 9,
        "floor": 2.0,
        "interval": [1.0, 2.5],
    }
    assert over_floor(distance, {"left_out": "too few"}) == {"left_out": "too few"}
    assert "floor is 0" in over_floor(distance, {"value": 0.0, "n": 9})["left_out"]
