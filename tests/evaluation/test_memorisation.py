"""Copies among generated images are found, and what only resembles the training images is not called one."""

import pytest
import torch
import torch.nn.functional as F

from minim_pipeline.evaluation.memorisation import (
    copy_share,
    latent_features,
    mean_of,
    memorisation_report,
    nearest_distances,
    pixel_features,
)


torch.set_num_threads(1)


def pictures(count: int, seed: int) -> torch.Tensor:
    """Smooth random grey images [count, 3, 64, 64], uint8."""
    coarse = torch.rand(count, 1, 6, 6, generator=torch.Generator().manual_seed(seed))
    smooth = F.interpolate(coarse, size=(64, 64), mode="bicubic").clamp(0, 1)
    return (smooth * 255).to(torch.uint8).expand(-1, 3, -1, -1).contiguous()


@pytest.mark.parametrize("features", ["pixels", "latents"])
def test_planted_copies_are_found(features, make_pipeline):
    train, val, samples = pictures(60, 0), pictures(100, 1), pictures(40, 2)
    brighter = (train[7].float() * 1.12).clamp(0, 255).to(torch.uint8)
    samples[3], samples[20], samples[30] = train[5], brighter, train[9].flip(-1)
    if features == "pixels":
        extract = pixel_features
    else:
        vae = make_pipeline().vae

        def extract(images):
            return latent_features(images, vae)

    arguments = {"oct": samples}, {"oct": val}, {"oct": train}, extract
    report = memorisation_report(*arguments, {"oct": True}, remove_mean=features == "latents")
    found = {sample: reference for sample, reference, _ in report["modalities"]["oct"]["nearest"][:3]}
    assert found == {3: 5, 20: 7, 30: 9}
    assert report["copies"] >= 3 and report["share"] <= 0.125
    # Where a mirrored image is another one, it is no copy.
    report = memorisation_report(*arguments, {"oct": False}, remove_mean=features == "latents")
    assert 30 not in [sample for sample, _, _ in report["modalities"]["oct"]["nearest"][:2]]


def test_share_of_unseen_images_is_about_one_percent():
    train, val, samples = pictures(50, 0), pictures(400, 1), pictures(400, 2)
    report = memorisation_report({"a": samples}, {"a": val}, {"a": train}, pixel_features, {"a": False})
    assert report["share"] <= 0.03 and report["n"] == 400


def test_distances_and_correlation_agree_with_brute_force():
    a, b = pictures(3, 0), pictures(4, 1)
    distance, index = nearest_distances(pixel_features(a), pixel_features(b))
    for i in range(3):
        r = [torch.corrcoef(torch.stack([a[i, 0].float().flatten(), x[0].float().flatten()]))[0, 1] for x in b]
        assert index[i] == torch.stack(r).argmax()
        assert distance[i] == pytest.approx(1 - max(r).item(), abs=1e-4)


def test_nearest_of_many_references_are_found_in_parts():
    queries, references = (torch.randn(n, 5, generator=torch.Generator().manual_seed(n)) for n in (2100, 70))
    mean = mean_of(references, at_once=9)
    torch.testing.assert_close(mean, references.mean(0))
    unit = [F.normalize(x - mean, dim=1) for x in (queries, references)]
    distance, index = (unit[0] @ unit[1].T).max(1)
    found, place = nearest_distances(queries, references, mean, at_once=9)
    torch.testing.assert_close(found, 1 - distance)
    assert place.equal(index)


def test_copy_share_counts_below_the_quantile():
    val = torch.arange(101.0)
    share, limit = copy_share(torch.tensor([0.5, 0.9, 1.5, 50.0]), val)
    assert limit == pytest.approx(1.0) and share == 0.5
