"""Generated images as DICOM: Secondary Capture of the true modality, which says that it is synthetic wherever it can.

DICOM PS3.3 A.8.1 (Secondary Capture Image IOD), C.12.1 (Synthetic Data, in SOP Common). pydicom, of the extra
`dicom`, is imported when the first file is written.
"""

import io
import json
import uuid
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from .files import atomic_path
from .modalities import resolve_modality
from .provenance import SOFTWARE, complete, printable, single_channel


# Modality and Body Part Examined by our modality; of others it is OT, other.
KINDS = {
    "oct": ("OPT", "EYE"),
    "fundus": ("OP", "EYE"),
    "cxr": ("CR", "CHEST"),
    "chest_ct": ("CT", "CHEST"),
    "brain_mri": ("MR", "BRAIN"),
    "breast_mri": ("MR", "BREAST"),
    "breast_us": ("US", "BREAST"),
}
PAIRED = ("EYE", "BREAST")  # of which a file has to say that it does not know the side
PRIVATE_GROUP, PROVENANCE = 0x0099, 0x01  # of the provenance, as JSON
_SPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://dicom.nema.org/minim-pipeline")


def save_dicom(
    image: Image.Image,
    path: str | Path,
    metadata: Mapping[str, object],
    number: int = 1,
    deflate: bool = True,
    native: bool = False,
) -> None:
    """Writes `image` as a DICOM file that says it is synthetic; the file appears whole or not at all.

    Secondary Capture with the true Modality, Synthetic Data YES, Conversion Type SYN, Image Type DERIVED, Patient
    Identity Removed YES and a patient that is called synthetic. The prompt stands in Image Comments and is the
    series' description. All UIDs follow from `metadata`, so that the same image has the same anywhere: the instance's
    from all of it, the series' from what is no matter of the seed, the study's from neither seed nor prompt.

    Args:
        image: of mode L or RGB; other modes become RGB. Of a grey modality one channel is written.
        path: where to; the folder has to exist.
        metadata: how it was made, with `modality` and `prompt` at least, as of `provenance.save_png`;
            `read_provenance` reads it back.
        number: of the image in its series.
        deflate: compresses the file without loss, to less than half. What reads no Deflated Explicit VR Little Endian,
            such as dciodvfy, wants it off. (RLE, pydicom's other way, makes most of these images no smaller.)
        native: a chest X-ray is no Secondary Capture but a Computed Radiography Image, an ultrasound image an
            Ultrasound Image. The other modalities' own kinds ask for what a drawn image has not: 16 bits, a plane, a
            source.

    Raises:
        ImportError: pydicom is not there.
        KeyError, ValueError: `metadata` has no `modality` or `prompt`, or an unknown modality.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(encode_dicom(image, metadata, number, deflate, native))


def encode_dicom(
    image: Image.Image,
    metadata: Mapping[str, object],
    number: int = 1,
    deflate: bool = True,
    native: bool = False,
) -> bytes:
    """`image` as the bytes of what `save_dicom` would write."""
    try:
        from pydicom import Dataset, uid
        from pydicom.dataset import FileMetaDataset
    except ImportError as error:
        raise ImportError("DICOM needs pydicom: pip install 'minim-pipeline[dicom]'.") from error
    told = complete(metadata)
    data = Dataset()
    data.SpecificCharacterSet = "ISO_IR 192"
    _add_patient_and_study(data, told, number)
    _add_image(data, told, number)
    image = image if image.mode in ("L", "RGB") else image.convert("RGB")
    _add_pixels(data, single_channel(image) if resolve_modality(str(told["modality"])).grey else image)
    kind = data.Modality if native else None
    if kind == "CR":
        data.SOPClassUID, data.ViewPosition = uid.ComputedRadiographyImageStorage, ""
        data.ImageType = ["DERIVED", "PRIMARY"]
    elif kind == "US":
        data.SOPClassUID = uid.UltrasoundImageStorage
        data.ImageType = ["DERIVED", "PRIMARY", data.BodyPartExamined, "0001"]  # 2D
    else:
        data.SOPClassUID, data.ConversionType = uid.SecondaryCaptureImageStorage, "SYN"
        data.ImageType = ["DERIVED", "SECONDARY"]
    data.file_meta = FileMetaDataset()
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    syntax = uid.DeflatedExplicitVRLittleEndian if deflate else uid.ExplicitVRLittleEndian
    data.file_meta.TransferSyntaxUID = syntax
    file = io.BytesIO()
    data.save_as(file, enforce_file_format=True)
    return file.getvalue()


def _add_patient_and_study(data, told: Mapping[str, object], number: int) -> None:
    kind, part = KINDS.get(resolve_modality(str(told["modality"])).id, ("OT", ""))
    # Who wrote it when, and how it was rated, is no matter of which image it is.
    made = {name: told[name] for name in told if name not in ("software", "version", "score", "accepted")}
    data.SOPInstanceUID = _uid("instance", made | {"number": number})
    data.SeriesInstanceUID = _uid("series", {name: made[name] for name in made if name != "seed"})
    data.StudyInstanceUID = _uid("study", {name: made[name] for name in made if name not in ("seed", "prompt")})
    data.PatientName, data.PatientID = "SYNTHETIC^NO PATIENT", f"SYNTHETIC-{data.StudyInstanceUID[-12:]}"
    data.PatientIdentityRemoved = "YES"
    data.DeidentificationMethod = "Generated by a model: there is no patient"
    data.PatientBirthDate = data.PatientSex = data.StudyDate = data.StudyTime = ""
    data.StudyID, data.AccessionNumber, data.ReferringPhysicianName = "SYNTHETIC", "", ""
    data.StudyDescription, data.SeriesDescription = "Synthetic images", _line(told["prompt"])
    data.Modality, data.SeriesNumber = kind, 1
    if part:
        data.BodyPartExamined = part
    if part in PAIRED:
        data.Laterality = ""
    data.Manufacturer, data.ManufacturerModelName = SOFTWARE, _line(told.get("model", ""))
    data.SoftwareVersions = _line(told["version"])


def _add_image(data, told: Mapping[str, object], number: int) -> None:
    data.SyntheticData = "YES"
    data.InstanceNumber, data.PatientOrientation = number, ""
    data.BurnedInAnnotation, data.LossyImageCompression = "NO", "00"
    data.ImageComments = _cut(printable(told["prompt"]), 10240)
    names = [name for name in ("model", "revision", "seed", "steps", "guidance") if name in told]
    drawn = ", ".join(f"{name} {printable(told[name])}" for name in names)
    data.DerivationDescription = _cut(f"Synthetic: drawn by a text-to-image model ({drawn})", 1024)
    block = data.private_block(PRIVATE_GROUP, SOFTWARE, create=True)
    block.add_new(PROVENANCE, "UT", json.dumps(dict(told)))


def _add_pixels(data, image: Image.Image) -> None:
    pixels = np.asarray(image)
    data.Rows, data.Columns = pixels.shape[:2]
    data.SamplesPerPixel = 1 if pixels.ndim == 2 else 3
    data.PhotometricInterpretation = "MONOCHROME2" if pixels.ndim == 2 else "RGB"
    if pixels.ndim == 3:
        data.PlanarConfiguration = 0
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 8, 8, 7, 0
    content = pixels.tobytes()
    data.PixelData = content + b"\0" * (len(content) % 2)
    data["PixelData"].VR = "OB"


def provenance_of(path: str | Path) -> dict[str, object]:
    """What `save_dicom` wrote into the file at `path`, typed; empty if it is not one of this package's."""
    from pydicom import dcmread

    data = dcmread(path, stop_before_pixels=True, force=True)
    try:
        told = data.private_block(PRIVATE_GROUP, SOFTWARE)[PROVENANCE].value
    except KeyError:
        return {}
    return json.loads(told) | {"synthetic": data.get("SyntheticData") == "YES"}


def _line(text: object) -> str:
    """DICOM's long string: a line without backslashes, which part values."""
    return _cut(" ".join(printable(text).replace("\\", " ").split()), 64)


def _cut(text: str, most: int) -> str:
    """`text` in at most so many bytes: there are readers that count bytes where DICOM counts characters."""
    return text.encode()[:most].decode(errors="ignore")


def _uid(level: str, told: Mapping[str, object]) -> str:
    """A UID of the kind 2.25, which needs no root of one's own, from the level and what is told (PS3.5 B.2)."""
    return f"2.25.{uuid.uuid5(_SPACE, level + json.dumps(dict(told), sort_keys=True)).int}"
