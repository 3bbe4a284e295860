"""A generated image as DICOM: valid, read back to the same pixels, and synthetic by all that it says."""

import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread

from minim_pipeline import save_dicom
from minim_pipeline.data.dicom import read_dicom
from minim_pipeline.dicom import KINDS
from minim_pipeline.provenance import read_provenance


MADE = {
    "model": "minim-256",
    "revision": "sha256-abc",
    "modality": "oct",
    "prompt": "Ödem \\ left\neye" + ", more" * 20,
    "seed": 2**63 - 1,
    "steps": 25,
    "guidance": 2.5,
    "guidance_interval": [0.0, 1.0],
    "negative_prompt": None,
}


def noise(mode, size=(31, 17)):
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(values if mode == "RGB" else values[..., 0])


@pytest.mark.parametrize("modality", [*KINDS, "oct"])
def test_pydicom_and_our_reader_see_the_same_pixels_and_what_it_is(tmp_path, modality):
    image = noise("RGB" if modality == "fundus" else "L")  # an odd number of bytes in both
    save_dicom(image, tmp_path / "a.dcm", MADE | {"modality": modality}, number=7)
    data = dcmread(tmp_path / "a.dcm")
    assert np.array_equal(data.pixel_array, np.asarray(image))
    again, notes = read_dicom(tmp_path / "a.dcm")
    assert again.mode == image.mode and again.tobytes() == image.tobytes() and notes == []
    assert (data.Modality, data.BodyPartExamined) == KINDS[modality]
    assert (data.SyntheticData, data.ConversionType, data.ImageType) == ("YES", "SYN", ["DERIVED", "SECONDARY"])
    assert (data.PatientIdentityRemoved, str(data.PatientName)) == ("YES", "SYNTHETIC^NO PATIENT")
    assert data.ImageComments == MADE["prompt"] and 60 < len(data.SeriesDescription.encode()) <= 64
    assert data.SeriesDescription.startswith("Ödem left eye, more")
    assert f"model minim-256, revision sha256-abc, seed {2**63 - 1}" in data.DerivationDescription
    assert data.InstanceNumber == 7 and data.BurnedInAnnotation == "NO"


def test_a_grey_modality_has_one_channel(tmp_path):
    save_dicom(noise("L").convert("RGB"), tmp_path / "a.dcm", MADE)
    assert dcmread(tmp_path / "a.dcm").PhotometricInterpretation == "MONOCHROME2"
    save_dicom(noise("RGB"), tmp_path / "a.dcm", MADE)  # of a model that has not learned it
    assert dcmread(tmp_path / "a.dcm").PhotometricInterpretation == "RGB"


def test_provenance_is_read_back(tmp_path):
    save_dicom(noise("L"), tmp_path / "a.dcm", MADE)
    found = read_provenance(tmp_path / "a.dcm")
    assert found.items() >= {name: value for name, value in MADE.items() if value is not None}.items()
    assert found["synthetic"] is True and found["software"] == "minim-pipeline" and "negative_prompt" not in found


def test_uids_follow_from_what_drew_the_image(tmp_path):
    def uids(**other):
        save_dicom(noise("L"), tmp_path / "a.dcm", MADE | other)
        data = dcmread(tmp_path / "a.dcm")
        return [data.StudyInstanceUID, data.SeriesInstanceUID, data.SOPInstanceUID]

    first = uids()
    assert uids() == first and all(re.fullmatch(r"2\.25\.[1-9]\d{0,38}", uid) for uid in first)
    assert len(set(first)) == 3
    assert [a == b for a, b in zip(uids(seed=1), first)] == [True, True, False], "another image of the series"
    assert [a == b for a, b in zip(uids(prompt="normal"), first)] == [True, False, False], "another series"
    assert [a == b for a, b in zip(uids(steps=9), first)] == [False, False, False], "another model"
    assert uids(score=2.5, accepted="true") == first


def test_what_is_missing_is_an_error_and_no_file(tmp_path):
    with pytest.raises(ValueError, match="Unknown modality 'PET'"):
        save_dicom(noise("L"), tmp_path / "a.dcm", MADE | {"modality": "PET"})
    with pytest.raises(KeyError, match="prompt"):
        save_dicom(noise("L"), tmp_path / "a.dcm", {"modality": "oct"})
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not shutil.which("dciodvfy"), reason="dicom3tools is not installed")
@pytest.mark.parametrize(
    ("modality", "kind"), [*((name, "SCImage") for name in KINDS), ("cxr", "CRImage"), ("breast_us", "USImage")]
)
def test_a_validator_finds_nothing_but_the_tag_that_it_does_not_know(tmp_path, modality, kind):
    image = noise("RGB" if modality == "fundus" else "L", (32, 32))
    # It reads no deflated files.
    save_dicom(image, tmp_path / "a.dcm", MADE | {"modality": modality}, deflate=False, native=kind != "SCImage")
    said = subprocess.run(["dciodvfy", tmp_path / "a.dcm"], capture_output=True, text=True).stderr
    errors = [line for line in said.splitlines() if "Error" in line]
    assert len(errors) == 1 and "(0x0008,0x001c)" in errors[0], said  # Synthetic Data, of 2023
    assert f"\n{kind}\n" in said


def test_on_request_cr_and_us_are_what_they_are_and_others_stay_secondary_captures(tmp_path):
    kinds = {}
    for modality in KINDS:
        save_dicom(noise("L"), tmp_path / "a.dcm", MADE | {"modality": modality}, native=True)
        data = dcmread(tmp_path / "a.dcm")
        kinds[modality] = data.SOPClassUID.keyword.removesuffix("ImageStorage")
        assert data.SyntheticData == "YES" and data.ImageType[0] == "DERIVED"
    assert kinds.pop("cxr") == "ComputedRadiography" and kinds.pop("breast_us") == "Ultrasound"
    assert set(kinds.values()) == {"SecondaryCapture"}
