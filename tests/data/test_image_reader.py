"""One reader for all: whatever mode, depth or format pixels come in, by every door the same comes out, and is told."""

import argparse
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT, write_csv
from PIL import Image, ImageOps

from minim_pipeline.data.image_loading import check_values, key_of, load_images
from minim_pipeline.data.image_pixels import convert_pictures
from minim_pipeline.data.image_reader import Reading, read_image
from minim_pipeline.data.sources import read_dataset
from minim_pipeline.modalities import MODALITIES
from minim_pipeline.options import ReadingOptions, add_options, options_from


SIDE = 64
RAMP = np.linspace(0, 4080, SIDE * SIDE).reshape(SIDE, SIDE).astype(np.uint16)  # 12 bits, as many scanners have


def data_set(folder, images: dict, modality="CXR", **columns):
    """A CSV of images, each a PIL image or an array, by file name."""
    folder.mkdir(exist_ok=True)
    for name, image in images.items():
        (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(folder / name)
    rows = [{"path": name, "Text": "normal", "modality": modality, **columns} for name in images]
    return write_csv(folder / "data.csv", rows)


def load(csv, size=SIDE, **options) -> np.ndarray:
    """Grey values [N, H, W]."""
    return load_images(read_dataset(csv), csv, size, trim=False, **options)[:, 0].numpy()


def test_the_depth_in_use_is_that_of_the_data_set(tmp_path, capsys):
    dark = RAMP // 16
    csv = data_set(tmp_path, {"bright.png": RAMP, "dark.png": dark, "plain.png": (RAMP // 16).astype(np.uint8)})
    bright, low, plain = load(csv)
    assert abs(bright.mean() - 127) < 1 and bright.min() == 0 and bright.max() == 254
    assert low.max() == 16, "scaled as its neighbour is, not by a range of its own"
    assert np.array_equal(plain, RAMP // 16), "what has 8 bits stays as it is"
    told = capsys.readouterr().err
    assert told.count("12 bits a pixel scaled to 8") == 1 and "2 of 3 images: 12 bits" in told
    assert "1 of 3 images comes out nearly flat: dark.png" in told
    assert read_image(tmp_path / "dark.png", "cxr")[0].getextrema() == (0, 255), "alone, it has its own"


def test_rows_of_other_splits_and_batches_do_not_change_the_scale(tmp_path):
    csv = data_set(tmp_path, {"a.png": RAMP // 8, "b.png": RAMP})
    rows = read_dataset(csv)
    whole = load_images(rows, csv, SIDE)
    assert whole.equal(torch.cat([load_images([row], csv, SIDE) for row in rows]))


def test_a_modality_has_a_scale_of_its_own(tmp_path):
    for name, values in (("a.png", RAMP), ("b.png", RAMP * 16)):
        Image.fromarray(values).save(tmp_path / name)
    rows = [{"path": "a.png", "Text": "x", "modality": "CXR"}, {"path": "b.png", "Text": "x", "modality": "BrainMRI"}]
    cxr, mri = load(write_csv(tmp_path / "data.csv", rows))
    assert np.abs(cxr.astype(int) - mri).max() <= 1


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_the_same_picture_at_any_depth(tmp_path, bits):
    full = np.linspace(0, 2**bits - 1, SIDE * SIDE).reshape(SIDE, SIDE)
    csv = data_set(tmp_path, {"deep.png": full.astype(np.uint16)})
    assert np.abs(load(csv)[0] - full / (2**bits - 1) * 255).max() < 0.8


@pytest.mark.parametrize("white", [1, 255])
def test_floating_point_pixels(tmp_path, white, capsys):
    ramp = (RAMP / 4080 * white).astype(np.float32)
    assert abs(load(data_set(tmp_path, {"a.tif": ramp}))[0].mean() - 127.5) < 1
    assert f"1 of 1 images: floating-point values from 0 to {white} brought to 8 bits" in capsys.readouterr().err


def test_hounsfield_units_are_windowed(tmp_path, capsys):
    units = np.linspace(-1024, 3071, SIDE * SIDE).reshape(SIDE, SIDE).astype(np.int32)
    csv = data_set(tmp_path, {"a.tif": units}, "ChestCT")
    lung = load(csv)[0]
    assert np.abs(lung - ((units + 1350) * 255 / 1500).clip(0, 255)).max() <= 0.51
    told = capsys.readouterr().err
    assert "Hounsfield units from -1350 to 150 shown" in told and "mostly clipped: a.tif" in told
    soft = load(csv, reading=Reading(window=(-160, 240)))[0]
    assert np.abs(soft - ((units + 160) * 255 / 400).clip(0, 255)).max() <= 0.51
    assert "values from -160 to 240 shown, as asked for" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (RAMP.astype(np.int32) - 1000, "from -1000 to 3080"),
        (RAMP.astype(np.int32) * 100, "from 0 to 408000"),
        (RAMP.astype(np.float32), "from 0 to 4080"),
        (RAMP.astype(np.float32) / 2040 - 1, "from -1 to 1"),
    ],
)
def test_values_that_nobody_can_know_are_refused(tmp_path, values, found):
    csv = data_set(tmp_path, {"a.tif": values})
    with pytest.raises(ValueError, match=f"data.csv: cxr images hold values {found}, .*--window LOW HIGH"):
        load(csv)
    ends = float(values.min()), float(values.max())
    assert abs(load(csv, reading=Reading(window=ends))[0].mean() - 127) < 1


def test_pixels_that_are_no_numbers_are_a_bad_row(tmp_path):
    values = np.full((8, 8), np.nan, np.float32)
    csv = data_set(tmp_path, {"good.tif": np.zeros((8, 8), np.float32), "bad.tif": values})
    with pytest.raises(ValueError, match=r"row 2 .*bad.tif \(pixels that are no finite numbers"):
        read_dataset(csv)


def test_what_exif_says_of_the_orientation_is_done(tmp_path, capsys):
    upright = Image.fromarray((RAMP // 16).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned = upright.rotate(180)
    images = {}
    for name in ("a.png", "a.jpg", "a.tif"):
        turned.save(tmp_path / name, exif=exif, **({"quality": 100} if name == "a.jpg" else {}))
        images[name] = turned
    rows = [{"path": name, "Text": "normal", "modality": "CXR"} for name in images]
    for picture in load(write_csv(tmp_path / "data.csv", rows)):
        assert np.abs(picture.astype(int) - np.asarray(upright)).max() <= 2
    assert "3 of 3 images: turned upright" in capsys.readouterr().err


def test_hidden_pixels_do_not_come_back(tmp_path, capsys):
    grey = np.full((SIDE, SIDE), 200, np.uint8)
    alpha = np.full((SIDE, SIDE), 255, np.uint8)
    alpha[:32], alpha[32:40] = 0, 128
    palette = Image.fromarray((alpha == 0).astype(np.uint8), "L").convert("P")
    palette.putpalette([200, 200, 200, 90, 90, 90])
    palette.save(tmp_path / "palette.png", transparency=1)
    Image.fromarray(np.where(alpha == 0, 3000, 2000).astype(np.uint16)).save(tmp_path / "deep.png", transparency=3000)
    images = {
        "rgba.png": Image.merge("RGBA", [Image.fromarray(x) for x in (grey, grey, grey, alpha)]),
        "la.png": Image.merge("LA", [Image.fromarray(x) for x in (grey, alpha)]),
        "opaque.png": Image.merge("LA", [Image.fromarray(x) for x in (grey, alpha | 255)]),
    }
    csv = data_set(tmp_path, images)
    with open(csv, "a") as file:
        file.write("palette.png,normal,CXR\ndeep.png,normal,CXR\n")
    pictures = load(csv)
    for name, picture in zip([*images, "palette", "deep"], pictures):
        assert picture[:32].max() == (200 if name == "opaque.png" else 0), name
        assert picture[45].min() == (round(2000 * 255 / 4095) if name == "deep" else 200), name
    assert (pictures[0][35] == 100).all() and (pictures[1][35] == 100).all()
    assert "4 of 5 images: transparent pixels laid on black" in capsys.readouterr().err


def test_other_modes_come_out_right(tmp_path, capsys):
    grey = Image.fromarray((RAMP // 16).astype(np.uint8))
    images = {
        "bits.png": grey.point(lambda v: 255 * (v > 127), "1"),
        "palette.png": grey.convert("P"),
        "cmyk.tif": grey.convert("RGB").convert("CMYK"),
    }
    bits, palette, cmyk = load(data_set(tmp_path, images))
    assert set(np.unique(bits)) == {0, 255} and np.array_equal(palette, np.asarray(grey))
    assert np.abs(cmyk.astype(int) - np.asarray(grey)).max() <= 1
    assert "1 of 3 images: CMYK converted to RGB" in capsys.readouterr().err


def png(values: np.ndarray, kind: int) -> bytes:
    """A PNG of 16 bits a channel, which Pillow does not write: colour type 2 RGB, 4 grey and alpha, 6 RGBA."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = values.shape[:2]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("channels", "kind"), [(3, 2), (2, 4), (4, 6)])
def test_sixteen_bits_a_channel(tmp_path, channels, kind):
    """Pillow reads the upper half of each value: a 12-bit image would be black."""
    values = np.repeat(RAMP[:, :, None], channels, 2)
    if channels % 2 == 0:
        values[:, :, -1] = 65535
        values[:8, :, -1] = 0
    (tmp_path / "a.png").write_bytes(png(values, kind))
    csv = write_csv(tmp_path / "data.csv", [{"path": "a.png", "Text": "normal", "modality": "Fundus"}])
    expected = (RAMP * (255 / 4095)).round()
    if channels % 2 == 0:
        expected[:8] = 0
    assert np.array_equal(load(csv)[0], expected)

    # The same picture opened by the user and given to `score`; without a file to go back to, what is lost is told.
    with Image.open(tmp_path / "a.png") as image:
        (mine,), told = convert_pictures([image], [MODALITIES["fundus"]], (SIDE, SIDE))
    assert np.array_equal(np.asarray(mine)[:, :, 0], expected) and "12 bits a pixel scaled to 8" in " ".join(told)
    with Image.open(io.BytesIO((tmp_path / "a.png").read_bytes())) as image:
        told = convert_pictures([image], [MODALITIES["fundus"]], (SIDE, SIDE))[1]
    assert "the upper 8 of 16 bits a channel taken" in " ".join(told)


def test_a_tiff_in_which_white_is_zero(tmp_path):
    values = (RAMP * 16).astype("<u2")
    fields = [(256, SIDE), (257, SIDE), (258, 16), (259, 1), (262, 0), (273, 122), (277, 1), (278, SIDE)]
    fields.append((279, values.nbytes))
    head = b"II*\0" + struct.pack("<IH", 8, len(fields))
    head += b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in fields)
    (tmp_path / "a.tif").write_bytes(head + struct.pack("<I", 0) + values.tobytes())
    image, notes = read_image(tmp_path / "a.tif", "cxr")
    assert np.array_equal(np.asarray(image), 255 - (values * (255 / 65535)).round())
    assert "inverted, since 0 is white in it" in notes


def test_the_first_frame_is_taken_and_told(tmp_path, capsys):
    frames = [Image.new("L", (SIDE, SIDE), value) for value in (60, 90, 120)]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    csv = write_csv(tmp_path / "data.csv", [{"path": "a.tif", "Text": "normal", "modality": "CXR"}])
    assert (load(csv) == 60).all() and "1 of 1 images: the first of 3 frames taken" in capsys.readouterr().err


def test_images_that_are_not_square(tmp_path, capsys):
    wide = np.zeros((SIDE, 2 * SIDE), np.uint8)
    wide[:, SIDE // 2 : -SIDE // 2] = 200  # the middle square
    csv = data_set(tmp_path, {"wide.png": wide})
    stretched, cropped, padded = (load(csv, reading=Reading(fit))[0] for fit in ("stretch", "crop", "pad"))
    assert (stretched[:, :8] == 0).all() and stretched[:, 32].min() == 200
    assert cropped.min() > 150, "the middle alone, and of its own proportions"
    assert (padded[:12] == 0).all() and (padded[:, :12] == 0).all() and padded[32, 32] == 200
    told = capsys.readouterr().err
    for words in ("stretched (fit crop or pad keeps", "cropped to its middle", "padded with black"):
        assert f"1 of 1 images: not square: {words}" in told
    with pytest.raises(ValueError, match="one of stretch, crop, pad, got 'squeeze'"):
        Reading("squeeze")


def test_windows_that_are_none_are_told_at_once():
    parser = argparse.ArgumentParser()
    add_options(parser, ReadingOptions)
    for window in (("5", "1"), ("nan", "1"), ("0", "inf")):
        with pytest.raises(ValueError, match="two finite numbers, the lower first"):
            options_from(ReadingOptions, parser.parse_args(["--window", *window]))
    assert parser.parse_args(["--window", "-1350", "150"]).window == [-1350, 150]


def test_a_window_that_changes_nothing_is_told(tmp_path, capsys):
    load(data_set(tmp_path, {"a.png": (RAMP // 16).astype(np.uint8)}), reading=Reading(window=(0, 100)))
    assert "no image has more than 8 bits a pixel, so the window changed nothing" in capsys.readouterr().err


def test_a_picture_all_white_is_named(tmp_path, capsys):
    white = (RAMP // 16).astype(np.uint8)
    white[10:] = 255
    load(data_set(tmp_path, {"good.png": 255 - white, "white.png": white}))
    assert "warning: 1 of 2 images comes out mostly clipped: white.png" in capsys.readouterr().err


def test_what_is_kept_of_images_is_known_by_them(tmp_path):
    csv = data_set(tmp_path, {"a.png": RAMP, "b.png": RAMP // 2})
    rows = read_dataset(csv)
    key = key_of(rows, csv)
    assert key == key_of(rows, csv) != key_of(rows[:1], csv)
    assert key != key_of(rows, csv, Reading("pad")) != key_of(rows, csv, Reading(window=(0, 4095)))
    ImageOps.invert(Image.fromarray((RAMP // 16).astype(np.uint8))).save(tmp_path / "b.png")
    assert key != key_of(rows, csv)


def test_broken_images_of_other_rows_do_not_matter_here(tmp_path):
    csv = data_set(tmp_path, {"a.png": RAMP})
    with open(csv, "a") as file:
        file.write("missing.png,normal,CXR\n")
    rows = read_dataset(csv, check_images=False)[:1]
    assert check_values([(rows, csv)])["cxr"].whole == (0, 4080)


def test_no_image_goes_by_a_way_of_its_own():
    """Pixels are read by the reader alone; elsewhere only the project's own drawings are opened."""
    root = ROOT
    found = set()
    for folder in ("minim_pipeline", "space", "train", "research"):
        for file in (root / folder).rglob("*.py"):
            if "Image.open(" in file.read_text(encoding="utf-8"):
                found.add(file.relative_to(root).as_posix())
    # Of the last two, the metadata of our own PNGs, and their overview.
    allowed = {"data/image_reader", "data/image_pixels", "provenance", "generate/write"}
    assert found == {f"minim_pipeline/{name}.py" for name in allowed}
