"""DICOM files read as images: what their tags say is done, and what a caption may have to say is told."""

import sys

import numpy as np
import pytest
from conftest import write_csv
from PIL import Image

from minim_pipeline.data.image_loading import load_images
from minim_pipeline.data.image_reader import Reading, read_image
from minim_pipeline.data.sources import read_dataset


pytest.importorskip("pydicom")
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import pixel_array
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid


SIDE = 32
RAMP = np.linspace(0, 4080, SIDE * SIDE).reshape(SIDE, SIDE).astype(np.uint16)


def write_dicom(path, values: np.ndarray, colour="MONOCHROME2", bits=12, frames=None, **tags):
    """A DICOM file of values [H, W], [H, W, 3] or, with `frames`, [N, H, W]."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    data.Rows, data.Columns = values.shape[1:3] if frames else values.shape[:2]
    data.SamplesPerPixel = 3 if values.ndim == 3 and not frames else 1
    if data.SamplesPerPixel == 3:
        data.PlanarConfiguration = 0
    data.PhotometricInterpretation = colour
    data.BitsAllocated, data.BitsStored, data.HighBit = values.dtype.itemsize * 8, bits, bits - 1
    data.PixelRepresentation = int(values.dtype.kind == "i")
    if frames:
        data.NumberOfFrames = frames
    for name, value in tags.items():
        setattr(data, name, value)
    data.PixelData = values.tobytes()
    data.save_as(path, enforce_file_format=True)
    return path


def grey(path, **options) -> np.ndarray:
    return np.asarray(read_image(path, "cxr", **options)[0])


def near(picture, expected) -> bool:
    return bool(np.abs(picture - np.clip(expected, 0, 255)).max() <= 1)


def test_rescaled_and_shown_through_the_first_window(tmp_path):
    window = {"WindowCenter": [40, 500], "WindowWidth": [400, 2000]}
    path = write_dicom(tmp_path / "a.dcm", RAMP, RescaleSlope=2, RescaleIntercept=-1024, **window)
    units = RAMP * 2.0 - 1024
    assert near(grey(path), ((units - 39.5) / 399 + 0.5) * 255)
    assert near(grey(path, window=(-1024, 3000)), (units + 1024) / 4024 * 255)
    exact = write_dicom(tmp_path / "b.dcm", RAMP, WindowCenter=2000, WindowWidth=1000, VOILUTFunction="SIGMOID")
    assert near(grey(exact), 255 / (1 + np.exp(-4 * (RAMP - 2000.0) / 1000)))
    falling = write_dicom(tmp_path / "c.dcm", RAMP, RescaleSlope=-1, RescaleIntercept=4080, **window)
    assert near(grey(falling), ((4080 - RAMP - 39.5) / 399 + 0.5) * 255)


def test_without_a_window_percentiles_are_shown(tmp_path):
    values = RAMP.copy()
    values[0, 0] = 4095
    path = write_dicom(tmp_path / "a.dcm", values, PixelPaddingValue=4095)
    low, high = np.percentile(np.delete(values.ravel(), 0), (0.5, 99.5))
    expected = (values - low) / (high - low) * 255
    expected[0, 0] = 0  # padding is black
    assert near(grey(path), expected)
    assert any("names no window" in note for note in read_image(path, "cxr")[1])


def test_monochrome1_is_inverted(tmp_path, capsys):
    """As the issue has it: the same X-ray, black on white."""
    windows = {"WindowCenter": 2048, "WindowWidth": 4096}
    write_dicom(tmp_path / "a.dcm", RAMP, **windows)
    write_dicom(tmp_path / "b.dcm", 4095 - RAMP, "MONOCHROME1", **windows)
    rows = [{"path": name, "Text": "normal", "modality": "CXR"} for name in ("a.dcm", "b.dcm")]
    csv = write_csv(tmp_path / "data.csv", rows)
    a, b = load_images(read_dataset(csv), csv, SIDE, trim=False)[:, 0].numpy().astype(int)
    assert abs(a.mean() - 127) < 1 and np.abs(a - b).max() <= 1
    assert "1 of 2 images: DICOM: MONOCHROME1 inverted" in capsys.readouterr().err


def test_eight_bits_are_as_they_are_in_a_png(tmp_path):
    values = (RAMP // 32).astype(np.uint8)
    path = write_dicom(tmp_path / "a.dcm", values, bits=8)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert np.array_equal(grey(path), grey(tmp_path / "a.png"))


def test_no_ending_is_needed(tmp_path):
    path = write_dicom(tmp_path / "IM0001", RAMP, WindowCenter=2048, WindowWidth=4096)
    csv = write_csv(tmp_path / "data.csv", [{"path": "IM0001", "Text": "normal", "modality": "CXR"}])
    assert len(read_dataset(csv)) == 1 and abs(grey(path).mean() - 127) < 1


def test_colour_and_palette(tmp_path):
    rgb = np.zeros((SIDE, SIDE, 3), np.uint8)
    rgb[:, :, 0], rgb[:, 16:, 1] = 200, 90
    image, notes = read_image(write_dicom(tmp_path / "rgb.dcm", rgb, "RGB", bits=8), "fundus")
    assert np.array_equal(np.asarray(image), rgb) and not notes
    ybr = np.asarray(Image.fromarray(rgb).convert("YCbCr"))
    image, notes = read_image(write_dicom(tmp_path / "ybr.dcm", ybr, "YBR_FULL", bits=8), "fundus")
    assert np.abs(np.asarray(image).astype(int) - rgb).max() <= 2 and notes == ["DICOM: YBR_FULL converted to RGB"]
    table = {f"{name}PaletteColorLookupTableDescriptor": [2, 0, 16] for name in ("Red", "Green", "Blue")}
    table |= {
        f"{name}PaletteColorLookupTableData": np.array([0, value], np.uint16).tobytes()
        for name, value in (("Red", 65535), ("Green", 25700), ("Blue", 0))
    }
    index = (RAMP > 2000).astype(np.uint8)
    image, notes = read_image(write_dicom(tmp_path / "p.dcm", index, "PALETTE COLOR", bits=8, **table), "fundus")
    assert np.asarray(image)[-1, -1].tolist() == [255, 100, 0] and np.asarray(image)[0, 0].tolist() == [0, 0, 0]


def test_what_a_caption_may_have_to_say_is_told(tmp_path, capsys):
    stack = np.stack([RAMP, RAMP * 0])
    tags = {"BurnedInAnnotation": "YES", "ImageLaterality": "L", "WindowCenter": 2048, "WindowWidth": 4096}
    write_dicom(tmp_path / "a.dcm", stack, frames=2, **tags)
    csv = write_csv(tmp_path / "data.csv", [{"path": "a.dcm", "Text": "normal", "modality": "CXR"}])
    assert load_images(read_dataset(csv), csv, SIDE)[0].max() == 254
    told = capsys.readouterr().err
    for words in ("writing is burned into", r"names a side (L), which is not put into", "the first of 2 frames taken"):
        assert f"{words}" in told


def test_files_that_scanners_wrote():
    """Small ones that come with pydicom, among them a CT without a window and an MR with one."""
    ct, mr = get_testdata_file("CT_small.dcm"), get_testdata_file("MR_small.dcm")
    image, notes = read_image(ct, "chest_ct")
    assert image.size == (128, 128) and np.asarray(image).std() > 50 and "names no window" in notes[0]
    values = dcmread(mr).pixel_array
    assert near(np.asarray(read_image(mr, "brain_mri")[0]), ((values - 599.5) / 1599 + 0.5) * 255)
    for name in ("MR_small_implicit.dcm", "MR_small_bigendian.dcm", "MR_small_RLE.dcm"):
        assert np.array_equal(np.asarray(read_image(get_testdata_file(name), "brain_mri")[0]), grey(mr))


def test_a_file_without_its_head(tmp_path):
    """As some archives keep them: no preamble, no mark, no transfer syntax."""
    data = dcmread(write_dicom(tmp_path / "a.dcm", RAMP, WindowCenter=2048, WindowWidth=4096))
    del data.file_meta
    data.preamble = None
    data.save_as(tmp_path / "b.dcm", implicit_vr=True, little_endian=True)
    assert (tmp_path / "b.dcm").read_bytes()[128:132] != b"DICM"
    assert np.array_equal(grey(tmp_path / "a.dcm"), grey(tmp_path / "b.dcm"))


def test_what_cannot_be_read_is_a_bad_row_and_says_why(tmp_path, monkeypatch):
    (tmp_path / "report.dcm").write_bytes(open(get_testdata_file("test-SR.dcm"), "rb").read())
    (tmp_path / "text.dcm").write_text("no DICOM at all")
    write_dicom(tmp_path / "good.dcm", RAMP)
    rows = [{"path": f"{name}.dcm", "Text": "x", "modality": "CXR"} for name in ("report", "text", "good")]
    csv = write_csv(tmp_path / "data.csv", rows)
    with pytest.raises(ValueError, match="2 bad rows") as error:
        read_dataset(csv)
    assert "report.dcm (DICOM without an image)" in str(error.value) and "row 2" in str(error.value)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ImportError, match="pip install 'minim-pipeline\\[dicom\\]'"):
        read_dataset(csv)


def test_a_window_of_ones_own(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", RAMP, WindowCenter=100, WindowWidth=10)
    csv = write_csv(tmp_path / "data.csv", [{"path": "a.dcm", "Text": "normal", "modality": "CXR"}])
    mine = load_images(read_dataset(csv), csv, SIDE, trim=False, reading=Reading(window=(0, 4080)))[0, 0].numpy()
    assert near(mine, RAMP / 16.0) and pixel_array(path).max() == 4080
