"""Tensors on disk: the same rows as in memory, made once, whatever stops and however many processes there are."""

from threading import Event

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from minim_pipeline import mapped
from minim_pipeline.data.image_loading import load_images
from minim_pipeline.data.mapped_images import map_images
from minim_pipeline.data.sources import read_dataset
from minim_pipeline.mapped import MappedTensor, ahead, derive, map_parts, select


ROWS = torch.rand(23, 2, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def few_files(monkeypatch):
    monkeypatch.setattr(mapped, "SHARDS", 3)


def make(folder, key="a", rows=ROWS, stop=None, made=None, **options) -> MappedTensor:
    """`rows` on disk, four at a time, unless making stops before row `stop`; `made` notes which are made."""

    def parts(wanted: list[slice]):
        for part in wanted:
            if part.start == stop:
                raise KeyboardInterrupt
            if made is not None:
                made.append(part.start)
            yield rows[part]

    return map_parts(folder / "x", key, len(rows), 4, parts, **options)[0]


def test_rows_are_read_as_of_a_tensor_in_memory(tmp_path, few_files):
    x = make(tmp_path)
    assert len(x.files) == 3 and x.shape == ROWS.shape and x.dtype == ROWS.dtype and x.nbytes == ROWS.nbytes
    mask = torch.arange(23) % 3 == 0
    for index in (0, -1, slice(5, 19), slice(None), [22, 0, 7], np.array([3, 3]), torch.tensor([21, 1]), mask):
        assert x[index].equal(ROWS[index]), index
        if not isinstance(index, int):
            assert x.select(index)[:].equal(ROWS[index]) and select(ROWS, index).equal(ROWS[index])
    assert x.select([9, 3, 22]).select([2, 0])[1].equal(ROWS[9])
    rows, columns = torch.tensor([4, 22, 0]), torch.tensor([1, 0, 1])
    assert x[rows, columns].equal(ROWS[rows, columns])
    assert torch.cat(list(x.split(5))).equal(ROWS) and x.to("cpu", rows_at_once=6).equal(ROWS)
    assert x.select([1]).join(x.select([20, 2]))[:].equal(ROWS[[1, 20, 2]])
    assert torch.cat([load_file(file)["rows"] for file in x.files]).equal(ROWS), "any reader of safetensors reads them"


def test_what_was_stopped_goes_on_with_the_next_file(tmp_path, few_files):
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, stop=12)
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["x-0-of-3.safetensors"], "nothing half written"
    made = []
    assert make(tmp_path, made=made)[:].equal(ROWS) and made == [8, 12, 16, 20]
    made.clear()
    assert make(tmp_path, made=made)[:].equal(ROWS) and not made


def test_rows_of_another_key_or_number_are_made_anew(tmp_path, few_files):
    make(tmp_path)
    assert make(tmp_path, "b", ROWS + 1)[:].equal(ROWS + 1)
    assert make(tmp_path, "b", ROWS[:6])[:].equal(ROWS[:6])
    assert len(list(tmp_path.iterdir())) == 2, "what is of no use is removed"


def test_too_little_room_is_told_before_the_first_file(tmp_path, few_files, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 300}))
    with pytest.raises(OSError, match="No room on the disk: 0.0 MB needed"):
        make(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_is_made_of_rows_lies_where_they_lie(tmp_path):
    x = make(tmp_path).select(slice(3, 20))
    doubled = derive(x, "doubled", 4, lambda part: part * 2)
    assert isinstance(doubled, MappedTensor) and doubled[:].equal(ROWS[3:20] * 2)
    assert derive(ROWS, "doubled", 4, lambda part: part * 2).equal(ROWS * 2)
    assert derive(x.select([0]), "doubled", 4, lambda part: part * 2)[:].equal(ROWS[3:4] * 2), "of other rows: anew"


def test_the_next_part_is_made_while_one_is_used():
    second = Event()
    parts = ahead(range(3), lambda i: i * 10 if i != 1 else second.set() or 10)
    assert next(parts) == 0 and second.wait(10)
    assert list(parts) == [10, 20]

    def broken(i):
        raise ValueError(f"broken image {i}")

    with pytest.raises(ValueError, match="broken image 0"):
        list(ahead(range(3), broken))


def test_images_on_disk_are_those_in_memory(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("minim_pipeline.data.mapped_images.IMAGES_AT_ONCE", 2)
    lines = ["path,Text,modality"]
    for i in range(5):  # of 16 bits, so that all are scaled alike
        grey = np.random.default_rng(i).integers(0, 9000 + 9000 * i, (32, 40), dtype=np.uint16)
        Image.fromarray(grey).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,case {i},CXR")
    csv = tmp_path / "data.csv"
    csv.write_text("\n".join(lines) + "\n")
    rows = read_dataset(csv)
    whole = load_images(rows, csv, 16)
    told = capsys.readouterr().err
    assert map_images(tmp_path / "images", rows, csv, 16)[:].equal(whole)
    assert capsys.readouterr().err == told and "5 of 5 images: 16 bits a pixel scaled to 8" in told
    grey = np.zeros((32, 40), dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "3.png")
    assert map_images(tmp_path / "images", rows, csv, 16)[3].max() == 0, "a changed image is read anew"
