"""Pixels as they are stored, of any mode of Pillow's, to 8 bits: the same for a file, and for an image in memory.

Which values are black and white is decided over all images of a data set (`Found`), so that none of them is scaled
in a way of its own. What was done is told in notes, and what cannot be known is refused.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ..modalities import Modality


# Bits a pixel that scanners use: the least that hold the greatest value are taken for the range.
DEPTHS = (8, 10, 12, 14, 16)
# Black and white in Hounsfield units, for modalities whose signed values can be nothing else: a lung window, centre
# -600 and width 1500.
HOUNSFIELD_WINDOWS = {"chest_ct": (-1350.0, 150.0)}
ORIENTATION = 0x0112  # tag of EXIF, and of TIFF
# What becomes of an image of other proportions, and how it is told.
FITS = {
    "stretch": "stretched (fit crop or pad keeps proportions)",
    "crop": "cropped to its middle",
    "pad": "padded with black",
}
# Channels of a grey picture differ by so much after lossy compression in colour.
GREY_TOLERANCE = 24
# Notes that are looked for.
TRANSPARENT, WHITE_IS_ZERO = "transparent pixels laid on black", "inverted, since 0 is white in it"
AS_ASKED, RESIZED = "as asked for", "resized from "
FLAT, CLIPPED = "comes out nearly flat", "comes out mostly clipped"


@dataclass(frozen=True)
class Found:
    """Least and greatest value in the pixels of more than 8 bits of a data set; None where there are none."""

    whole: tuple[float, float] | None = None  # of whole numbers
    real: tuple[float, float] | None = None  # of floating-point numbers

    def __or__(self, other: "Found") -> "Found":
        pairs = zip((self.whole, self.real), (other.whole, other.real))
        return Found(*((min(a[0], b[0]), max(a[1], b[1])) if a and b else a or b for a, b in pairs))


def found_in(values: np.ndarray) -> Found:
    """That of the values of one image."""
    ends = float(values.min()), float(values.max())
    return Found(real=ends) if values.dtype.kind == "f" else Found(whole=ends)


def black_and_white(
    found: tuple[float, float], real: bool, modality: str, window: tuple[float, float] | None = None
) -> tuple[float, float, str]:
    """Which values become 0 and 255, and a note that says so; ValueError if it cannot be known.

    Args:
        found: the least and the greatest value of the data set.
        real: whether they are floating-point numbers.
        modality: id, e.g. `"chest_ct"`; signed whole numbers are Hounsfield units there.
        window: values that become 0 and 255, whatever was found.
    """
    least, greatest = found
    if window is not None:
        return *window, f"values from {window[0]:g} to {window[1]:g} shown, {AS_ASKED}"
    if real:
        # Resampling and fp16 leave a little more or less.
        for white in (1.0, 255.0):
            if least >= -1e-3 * white and greatest <= (1 + 1e-3) * white:
                return 0.0, white, f"floating-point values from 0 to {white:g} brought to 8 bits"
        allowed = "floating-point pixels have to lie in 0 to 1 or in 0 to 255"
    elif least < 0 and modality in HOUNSFIELD_WINDOWS and least >= -(2**15) and greatest < 2**15:
        low, high = HOUNSFIELD_WINDOWS[modality]
        return low, high, f"Hounsfield units from {low:g} to {high:g} shown (lung window)"
    elif least < 0:
        signed = ", ".join(HOUNSFIELD_WINDOWS)
        allowed = f"whole numbers of more than 8 bits have to lie in 0 to 65535, and signed ones be of {signed}"
    else:
        bits = next((bits for bits in DEPTHS if greatest < 2**bits), 0)
        if bits == 8:
            return 0.0, 255.0, "more than 8 bits a pixel, of which 8 are in use"
        if bits:
            return 0.0, 2.0**bits - 1, f"{bits} bits a pixel scaled to 8"
        allowed = "whole numbers of more than 8 bits have to lie in 0 to 65535"
    raise ValueError(
        f"{modality} images hold values from {least:g} to {greatest:g}, and what is black and white among them cannot "
        f"be known: {allowed}, or --window LOW HIGH (window=(low, high)) has to say it."
    )


def to_8_bits(
    pixels: Image.Image | np.ndarray,
    notes: list[str],
    found: Found,
    modality: str,
    window: tuple[float, float] | None = None,
) -> tuple[Image.Image, list[str]]:
    """What `decode_picture` gave as an image of mode L or RGB, and all notes; raises as `black_and_white`.

    `found`: what lies in the data set that the image is of.
    """
    if isinstance(pixels, Image.Image):
        return pixels, notes
    real, least, greatest = pixels.dtype.kind == "f", float(pixels.min()), float(pixels.max())
    others = (found.real if real else found.whole) or (least, greatest)
    ends = min(least, others[0]), max(greatest, others[1])
    low, high, note = black_and_white(ends, real, modality, window)
    image, notes = Image.fromarray(scaled(pixels, low, high)), [*notes, note]
    if np.mean(pixels > high) > 0.5 or np.mean(pixels < low) > 0.95:
        notes.append(CLIPPED)
    return ImageOps.invert(image) if WHITE_IS_ZERO in notes else image, notes


def scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values as uint8: `low` and what is below is 0, `high` and what is above 255."""
    return ((values.astype(np.float64) - low) * (255 / (high - low))).round().clip(0, 255).astype(np.uint8)


def decode_picture(
    image: Image.Image, reopen: Callable[[], Any] | None = None
) -> tuple[Image.Image | np.ndarray, list[str]]:
    """An upright, opaque image of mode L or RGB, or the values [H, W] of one with more than 8 bits; and notes.

    Of a file that is not loaded yet, colour of 16 bits a channel gives values [H, W, 3]; of several frames the one at
    hand is taken. Transparent pixels are laid on black: what they hide is not to come back. Raises ValueError for
    pixels that are not finite.

    Args:
        reopen: opens the image again, as colour of 16 bits needs; by default by the name of its file, if it has one.
    """
    notes: list[str] = []
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        notes.append(f"{f'number {image.tell() + 1}' if image.tell() else 'the first'} of {frames} frames taken")
    path = getattr(image, "filename", "")
    if reopen is None and path:
        reopen = lambda: Image.open(path)  # noqa: E731
    deep = _deep_channels(image, reopen)
    halved = deep is None and is_deep(image) and not image.mode.startswith(("I", "F"))
    turned = image.getexif().get(ORIENTATION, 1) in range(2, 9)
    white_is_zero = image.format == "TIFF" and getattr(image, "tag_v2", {}).get(262) == 0
    image.load()  # of a TIFF, Pillow turns the pixels here
    if turned:
        notes.append("turned upright, as its EXIF orientation says")
        image = ImageOps.exif_transpose(image)
    if halved:
        notes.append("the upper 8 of 16 bits a channel taken")
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        if not np.isfinite(values).all():
            raise ValueError("pixels that are no finite numbers")
        hidden = image.info.get("transparency")
        if white_is_zero:  # which Pillow heeds at 8 bits only
            notes.append(WHITE_IS_ZERO)
        if isinstance(hidden, int):
            values = np.where(values == hidden, 0, values)
            notes.append(TRANSPARENT)
        return values, notes
    if image.has_transparency_data:
        rgba = image.convert({"La": "LA"}.get(image.mode, "RGBA")).convert("RGBA")
        if np.asarray(rgba)[:, :, 3].min() < 255:
            notes.append(TRANSPARENT)
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba).convert("RGB")
    elif image.mode == "1":
        image = image.convert("L")
    elif image.mode not in ("L", "RGB"):
        if image.mode not in ("P", "RGBX"):
            notes.append(f"{image.mode} converted to RGB")
        image = image.convert("RGB")
    return (image if deep is None else deep), notes


def is_deep(file: Image.Image) -> bool:
    """Whether an image has more than 8 bits a pixel, or a channel in its file, if that is not loaded yet."""
    return file.mode.startswith(("I", "F")) or _raw_mode(file).endswith((";16B", ";16L", ";16N"))


def _raw_mode(file: Image.Image) -> str:
    tiles = getattr(file, "tile", None)
    arguments = tiles[0].args if tiles else ""
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def _deep_channels(file: Image.Image, reopen: Callable[[], Any] | None) -> np.ndarray | None:
    """The values [H, W, 3], or [H, W] of grey with alpha, of 16 bits a channel, of which Pillow reads the upper 8.

    None if it has none, or cannot be opened again to read the lower ones.
    """
    mode = _raw_mode(file)
    if reopen is None or file.tell() or mode[:-1] not in ("RGB;16", "RGBX;16", "RGBA;16", "LA;16"):
        return None

    def read(raw: str) -> np.ndarray:
        with reopen() as again:
            tiles = [(tile, (raw, *tile.args[1:]) if isinstance(tile.args, tuple) else raw) for tile in again.tile]
            again.tile = [tile._replace(args=args) for tile, args in tiles]
            again.load()
            if again.format == "TIFF":  # which Pillow has turned already
                return np.asarray(again).astype(np.uint16)
            again.getexif()[ORIENTATION] = file.getexif().get(ORIENTATION, 1)
            return np.asarray(ImageOps.exif_transpose(again)).astype(np.uint16)

    if mode == "LA;16B":
        parts = read("RGBA")  # byte for byte: grey and alpha, the upper half first
        values = parts[:, :, ::2] * 256 + parts[:, :, 1::2]
    else:
        # Read in the other order of bytes, what Pillow takes for the upper half is the lower.
        other = mode[:-1] + ("L" if mode.endswith("B") else "B")
        values = read(mode) * 256 + read(other)
    if values.shape[2] in (2, 4):
        alpha = values[:, :, -1:].astype(np.float64) / 65535
        values = (values[:, :, :-1] * alpha).round().astype(np.uint16)
    return values[:, :, 0] if values.shape[2] == 1 else values


def oddities(image: Image.Image) -> list[str]:
    """Notes on an 8-bit image in which little can be seen: `FLAT`, `CLIPPED`."""
    shares = np.asarray(image.convert("L").histogram()) / (image.width * image.height)
    below = shares.cumsum()
    # From the darkest to the brightest half percent.
    spread = np.searchsorted(below, 0.995) - np.searchsorted(below, 0.005)
    return [FLAT] * bool(spread < 20) + [CLIPPED] * bool(shares[255] > 0.5)


def fit_to(image: Image.Image, size: tuple[int, int], fit: str = "stretch") -> tuple[Image.Image, list[str]]:
    """The image at `size`, width and height in pixels, and notes; `fit`: one of `FITS`."""
    width, height = size
    notes: list[str] = []
    if image.size == size:
        return image, notes
    if image.width * height != image.height * width:
        shape = "not square" if width == height else f"not of the proportions {width} to {height}"
        notes.append(f"{shape}: {FITS[fit]}")
    notes.append(f"{RESIZED}{image.width} x {image.height} to {width} x {height} px")
    if fit == "pad":
        return ImageOps.pad(image, size, Image.Resampling.LANCZOS, color=0), notes
    resize = ImageOps.fit if fit == "crop" else Image.Image.resize
    return resize(image, size, Image.Resampling.LANCZOS), notes


def check_reading(fit: str, window: tuple[float, float] | None) -> None:
    """Raises ValueError for a way to read images that there is not."""
    if fit not in FITS:
        raise ValueError(f"`fit` has to be one of {', '.join(FITS)}, got {fit!r}.")
    if window is None:
        return
    pair = isinstance(window, (tuple, list)) and len(window) == 2
    numbers = pair and all(isinstance(end, (int, float, np.number)) and not isinstance(end, bool) for end in window)
    if not (numbers and -np.inf < window[0] < window[1] < np.inf):
        raise ValueError(f"`window` has to be two finite numbers, the lower first, got {window!r}.")


def convert_pictures(
    images: list[Image.Image],
    modalities: list[Modality],
    size: tuple[int, int],
    fit: str = "stretch",
    window: tuple[float, float] | None = None,
) -> tuple[list[Image.Image], list[str]]:
    """Images in memory as those of files are read: RGB, of one size; and sentences that say what was done to them.

    Those of one modality are one data set. Raises as `black_and_white` and `decode_picture`.
    """
    check_reading(fit, window)
    decoded = [decode_picture(image) for image in images]
    found: dict[str, Found] = {}
    for (pixels, _), modality in zip(decoded, modalities):
        if isinstance(pixels, np.ndarray):
            found[modality.id] = found.get(modality.id, Found()) | found_in(pixels)
    made, counted = [], Counter[str]()
    for number, ((pixels, notes), modality) in enumerate(zip(decoded, modalities)):
        picture, notes = to_8_bits(pixels, notes, found.get(modality.id, Found()), modality.id, window)
        picture, notes = as_modality(picture, modality, notes)
        picture, fitted = fit_to(picture, size, fit)
        made.append(picture)
        counted.update(named(notes + fitted, str(number)))
    return made, told((pair for pair in counted.items() if not pair[0].startswith(RESIZED)), len(images))


def as_modality(image: Image.Image, modality: Modality, notes: list[str]) -> tuple[Image.Image, list[str]]:
    """The image in RGB, with equal channels if its modality is grey, and all notes, also of `oddities`."""
    image, coloured, notes = image.convert("RGB"), image.mode != "L", list(notes)
    if modality.grey and coloured:
        if np.ptp(np.asarray(image), axis=2).max() > GREY_TOLERANCE:
            notes.append(f"{modality.name} is grey: colour taken away")
        image = image.convert("L").convert("RGB")
    return image, notes + [odd for odd in oddities(image) if odd not in notes]


def named(notes: list[str], name: str) -> list[str]:
    """The notes as they are counted: oddities are told with the names of their images."""
    return [f"{note}: {name}" if note in (FLAT, CLIPPED) else note for note in notes]


def told(notes: Iterable[tuple[str, int]], total: int, what: str = "images") -> list[str]:
    """Sentences that say what was done to how many of `total` images; those of oddities name the first images.

    Args:
        notes: note -> number of images, as `Counter.items()`; of an oddity it is "oddity: name".
    """
    counts: dict[str, int] = {}
    sizes: dict[str, int] = {}
    odd: dict[str, list[str]] = {}
    for note, count in notes:
        kind, _, name = note.partition(": ")
        if kind in (FLAT, CLIPPED):
            odd.setdefault(kind, []).append(name)
        else:
            (sizes if note.startswith(RESIZED) else counts)[note] = count
    if len(sizes) > 3:
        target = next(iter(sizes)).partition(" to ")[2]
        sizes = {f"resized from {len(sizes)} sizes to {target}": sum(sizes.values())}
    lines = [f"{count} of {total} {what}: {note}" for note, count in (counts | sizes).items()]
    for kind, names in odd.items():
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        verb = kind.replace("comes", "come") if len(names) > 1 else kind
        lines.append(f"warning: {len(names)} of {total} {what} {verb}: {', '.join(names[:5])}{more}")
    return lines
