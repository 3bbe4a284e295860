"""Every written image says that it is synthetic, and how it was made, in places that common tools read.

PNG text chunks hold the details; an XMP packet holds IPTC's digital source type `trainedAlgorithmicMedia`, which is
how image archives and search engines recognise generated pictures, and IPTC's properties for generative AI:
https://iptc.org/std/photometadata/specification/IPTC-PhotoMetadata
"""

import io
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from . import __version__
from .data.image_files import opened
from .files import atomic_path


SOFTWARE = "minim-pipeline"
DIGITAL_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"

_TYPES: dict[str, Callable[[str], Any]] = dict.fromkeys(("seed", "steps", "height", "width"), int)
_TYPES |= {"guidance": float, "guidance_rescale": float, "guidance_interval": json.loads}
_XMP_KEY = "XML:com.adobe.xmp"
_XMP = Path(__file__).with_name("provenance.xmp").read_text(encoding="utf-8").rstrip()
# Characters that neither XML nor a PNG text chunk may hold.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def complete(metadata: Mapping[str, object]) -> dict[str, object]:
    """All that a file says of how it was made: `metadata` without `None`, `synthetic`, `software` and `version`."""
    given = {name: value for name, value in metadata.items() if value is not None}
    return {"synthetic": "true"} | given | {"synthetic": "true", "software": SOFTWARE, "version": __version__}


def single_channel(image: Image.Image) -> Image.Image:
    """One channel of an image whose channels are all equal; any other image as it is.

    A grey modality's are equal, unless the model has not learned it.
    """
    first, *others = (channel.tobytes() for channel in image.split())
    return image.getchannel(0) if all(other == first for other in others) else image


def printable(value: object) -> str:
    """`value` as text, with spaces for what neither XML, PNG nor DICOM may hold."""
    return _CONTROL.sub(" ", str(value))


def _png_info(metadata: Mapping[str, object]) -> PngInfo:
    texts = {name: printable(value) for name, value in complete(metadata).items()}
    info = PngInfo()
    for name, value in texts.items():
        info.add_text(name, value)  # becomes iTXt, UTF-8, where Latin-1 does not do
    fields = {name: escape(texts.get(name, "")) for name in ("model", "revision", "prompt")}
    fields |= {"software": escape(f"{SOFTWARE} {texts['version']}"), "source_type": DIGITAL_SOURCE_TYPE}
    info.add_itxt(_XMP_KEY, _XMP.format(bom="\ufeff", **fields))
    return info


def encode_png(image: Image.Image, metadata: Mapping[str, object]) -> bytes:
    """`image` as the bytes of what `save_png` would write."""
    file = io.BytesIO()
    image.save(file, format="PNG", pnginfo=_png_info(metadata))
    return file.getvalue()


def save_png(image: Image.Image, path: str | Path, metadata: Mapping[str, object]) -> None:
    """Writes `image` as a PNG that says it is synthetic; the file appears whole or not at all.

    Args:
        image: any mode that PNG knows.
        path: where to, mostly `NNNN.png`; the folder has to exist.
        metadata: how it was made: `model`, `revision`, `modality`, `prompt`, `seed`, `steps`, `guidance`, `scheduler`,
            and whatever else; each becomes a text chunk, `None` is left out. `synthetic`, `software` and `version`
            are added here.
    """
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=_png_info(metadata))


def read_provenance(path: str | Path) -> dict[str, object]:
    """What `save_png` or `dicom.save_dicom` wrote into a file, or a part of a larger one; empty if it is not of here.

    Returns:
        The metadata, with `synthetic` a bool, `seed`, `steps`, `height` and `width` ints, `guidance` and
        `guidance_rescale` floats, `guidance_interval` a list of two floats and all else strings, and
        `digital_source_type`, IPTC's term. Of a DICOM file as it was given, without that.
    """
    if Path(path).suffix == ".dcm":
        from .dicom import provenance_of

        return provenance_of(path)
    with Image.open(opened(path)) as image:
        texts = dict(getattr(image, "text", {}))
    if texts.get("software") != SOFTWARE:
        return {}
    xmp = texts.pop(_XMP_KEY, "")
    result: dict[str, object] = {name: _TYPES.get(name, str)(value) for name, value in texts.items()}
    result["synthetic"] = texts["synthetic"] == "true"
    result["digital_source_type"] = DIGITAL_SOURCE_TYPE if DIGITAL_SOURCE_TYPE in xmp else None
    return result
