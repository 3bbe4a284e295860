"""Latents on disk: the same whoever encodes them and however often that is stopped; drawn as from memory."""

import pytest
import torch
from conftest import forget_accelerator, write_csv
from PIL import Image

from minim_pipeline.data.sources import read_dataset
from minim_pipeline.training import latents
from minim_pipeline.training.config import DataOptions, RunOptions
from minim_pipeline.training.latents import Encoding, Latents, memorised_share
from minim_pipeline.training.run import Run


COUNT, VERSIONS = 11, 3


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataOptions:
    folder = tmp_path_factory.mktemp("data")
    for i in range(COUNT):
        noise = torch.rand(64, 64, 3, generator=torch.Generator().manual_seed(i))
        Image.fromarray((noise * 255).byte().numpy()).save(folder / f"{i}.png")
    rows = [{"path": f"{i}.png", "Text": f"case {i}", "modality": "Fundus"} for i in range(COUNT)]
    return DataOptions(train_data=str(write_csv(folder / "data.csv", rows)), resolution=64)


@pytest.fixture
def encoding(data, make_pipeline, tmp_path, monkeypatch) -> Encoding:
    """Two images at a time."""
    forget_accelerator()
    monkeypatch.setattr(latents, "PIXELS_AT_ONCE", 2 * 64 * 64)
    run = Run(RunOptions(output_dir=str(tmp_path)), "encoding")
    return Encoding(run, make_pipeline().vae, data, read_dataset(data.train_data), VERSIONS)


def encode(encoding: Encoding) -> Latents:
    return Latents.encode(encoding.run, encoding.vae, encoding.data, encoding.rows, "train", VERSIONS)


def test_latents_do_not_depend_on_who_encodes_them(encoding):
    """Each of two processes encodes every other file."""
    whole = encode(encoding).moments
    assert whole.shape == (COUNT, VERSIONS, 2, 8, 8, 8) and len(whole.files) == 6
    parts = [slice(i, min(i + 2, COUNT)) for i in range(0, COUNT, 2)]
    for own in (parts[::2], parts[1::2], parts[4:]):
        for part, moments in zip(own, encoding.parts(own), strict=True):
            assert moments.equal(whole[part])


def test_encoding_that_was_killed_goes_on_with_the_same_bits(encoding, monkeypatch):
    whole = encode(encoding)
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in whole.moments.files}
    lost = whole.moments.files[3:5]
    for file in lost:
        file.unlink()
    read = []
    load = latents.load_images
    monkeypatch.setattr(latents, "load_images", lambda rows, *a, **k: read.extend(rows) or load(rows, *a, **k))
    again = encode(encoding)
    assert [row["path"] for row in read] == ["6.png", "7.png", "8.png", "9.png"], "only what was lost is read"
    assert all(file.read_bytes() == content for file, (content, _) in before.items())
    assert all(file.stat().st_mtime_ns == time for file, (_, time) in before.items() if file not in lost)
    assert again[:].equal(whole[:])


def test_what_is_drawn_from_disk_is_drawn_from_memory(encoding):
    on_disk = encode(encoding)
    held = Latents(on_disk.moments[:], on_disk.scale, on_disk.shift)
    index, version = torch.tensor([10, 0, 3, 3]), torch.tensor([2, 0, 1, 2])
    drawn = [x.draw(index, version, torch.Generator().manual_seed(5)) for x in (on_disk, held)]
    assert drawn[0].equal(drawn[1]) and drawn[0].shape == (4, 8, 8, 8)
    assert on_disk.hold(torch.device("cpu")).moments is on_disk.moments, "a CPU reads them where they are"
    joined = on_disk.join(on_disk)
    assert len(joined) == 2 * COUNT and joined[[COUNT + 1]].equal(on_disk[[1]])


def test_copies_are_found_part_by_part(encoding, monkeypatch):
    """As if all latents were laid beside each other at once."""
    train, names = encode(encoding), ["fundus"] * COUNT
    samples = {"fundus": torch.cat([train[[2, 7]], train[:2].flip(-1) * 1.5])}
    val, known = torch.randn(5, 8, 8, 8, generator=torch.Generator().manual_seed(0)), {}
    whole = memorised_share(samples, val, names[:5], train, names, known)
    monkeypatch.setattr(latents, "IMAGES_AT_ONCE", 3)
    in_parts = {}
    assert memorised_share(samples, val, names[:5], train, names, in_parts) == whole >= 0.5
    torch.testing.assert_close(in_parts["fundus"], known["fundus"])
    assert memorised_share(samples, val, names[:5], train, names, in_parts) == whole, "what is known is used"
