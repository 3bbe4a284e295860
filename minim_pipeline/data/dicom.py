"""DICOM files as images: values rescaled, shown through their own window, black where they mean black.

pydicom, the extra `dicom`, is imported when the first such file is read.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from .image_files import opened, read_bytes
from .image_pixels import AS_ASKED, CLIPPED, scaled


SUFFIXES = (".dcm", ".dicom")
# Percentiles that become black and white where a file names no window.
PERCENTILES = (0.5, 99.5)


def is_dicom(path: str | Path) -> bool:
    """Whether a file calls itself DICOM, by its ending or by the mark behind its preamble."""
    if Path(path).suffix.lower() in SUFFIXES:
        return True
    return read_bytes(path, 132)[128:] == b"DICM"


def read_dicom(path: str | Path, window: tuple[float, float] | None = None) -> tuple[Image.Image, list[str]]:
    """The first frame of a DICOM file as an image of mode L or RGB, and notes on what was done and what it says.

    Rescale slope and intercept are applied, then `window`, or the file's first VOI window (or table), or else its
    percentiles; at 8 bits a pixel and without any of these, values are taken as they are. Raises ImportError without
    pydicom, ValueError for a file with no image that it can decode.
    """
    try:
        from pydicom import dcmread
        from pydicom.pixels import pixel_array
        from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian
    except ImportError as error:
        raise ImportError(f"{path} is DICOM, which needs pydicom: pip install 'minim-pipeline[dicom]'.") from error
    data = dcmread(opened(path), force=True)  # force: files without the mark are DICOM by their ending
    if "PixelData" not in data:
        raise ValueError("DICOM without an image")
    if "TransferSyntaxUID" not in data.file_meta:
        implicit, little = data.original_encoding
        syntaxes = {(True, True): ImplicitVRLittleEndian, (False, False): ExplicitVRBigEndian}
        data.file_meta.TransferSyntaxUID = syntaxes.get((bool(implicit), bool(little)), ExplicitVRLittleEndian)
    values = pixel_array(data, index=0)  # YBR becomes RGB there
    notes = []
    frames = int(data.get("NumberOfFrames") or 1)
    if frames > 1:
        notes.append(f"the first of {frames} frames taken")
    colour = data.get("PhotometricInterpretation", "")
    if colour == "PALETTE COLOR":
        from pydicom.pixels import apply_color_lut

        values = apply_color_lut(values, data)
        image = Image.fromarray(scaled(values, 0, np.iinfo(values.dtype).max))
        notes.append("DICOM: palette applied")
    elif values.ndim == 3:
        image = Image.fromarray(scaled(values, 0, 2 ** int(data.BitsStored) - 1))
        if colour != "RGB":
            notes.append(f"DICOM: {colour} converted to RGB")
    else:
        image, more = _grey(values, data, window)
        notes += more
    # What a caption may have to say, and is not put there.
    if data.get("BurnedInAnnotation", "NO") != "NO":
        notes.append("DICOM: it says that writing is burned into the image")
    if side := data.get("ImageLaterality") or data.get("Laterality"):
        notes.append(f"DICOM: it names a side ({side}), which is not put into the caption")
    return image, notes


def _grey(values: np.ndarray, data, window: tuple[float, float] | None) -> tuple[Image.Image, list[str]]:
    from pydicom.pixels import apply_modality_lut, apply_voi, apply_windowing

    padding = values == data.PixelPaddingValue if data.get("PixelPaddingValue") is not None else np.zeros_like(values)
    rescaled = float(data.get("RescaleSlope") or 1) != 1 or float(data.get("RescaleIntercept") or 0) != 0
    rescaled = rescaled or bool(data.get("ModalityLUTSequence"))
    values = apply_modality_lut(values, data).astype(np.float64)
    # Both ends of what comes out of a window, whose arithmetic is pydicom's.
    ends = np.array([-1e9, 1e9])
    if window is not None:
        low, high, note = *window, f"values from {window[0]:g} to {window[1]:g} shown, {AS_ASKED}"
    elif data.get("WindowCenter") is not None and data.get("WindowWidth") is not None:
        with np.errstate(over="ignore"):  # a sigmoid's far end
            values, (low, high) = (apply_windowing(part, data, index=0) for part in (values, ends))
        note = "DICOM: shown through its first window"
    elif data.get("VOILUTSequence"):
        values = apply_voi(values.astype(np.int64), data, index=0).astype(np.float64)
        low, high = 0, 2 ** int(data.VOILUTSequence[0].LUTDescriptor[2]) - 1
        note = "DICOM: shown through its first VOI table"
    elif int(data.BitsStored) <= 8 and int(data.get("PixelRepresentation") or 0) == 0 and not rescaled:
        low, high, note = 0, 2 ** int(data.BitsStored) - 1, None
    else:
        seen = values[padding == 0] if (padding == 0).any() else values
        low, high = np.percentile(seen, PERCENTILES)
        high = max(high, low + 1e-6)
        note = f"DICOM: it names no window; its {PERCENTILES[0]} to {PERCENTILES[1]} % of values are shown"
    grey, notes = scaled(values, low, high), [note] if note else []
    if window is not None and (np.mean(values > high) > 0.5 or np.mean(values < low) > 0.95):
        notes.append(CLIPPED)
    if data.get("PhotometricInterpretation") == "MONOCHROME1":
        grey = 255 - grey
        notes.append("DICOM: MONOCHROME1 inverted")
    grey[padding != 0] = 0
    return Image.fromarray(grey), notes
