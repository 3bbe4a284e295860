"""What must never be uploaded: pickles, training states, real images, paths that tell of a machine and its people."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError, safe_open

from ..provenance import read_provenance


# All that a published model or a part of one consists of, and all of a Space; everything else is refused.
MODEL_FILES = re.compile(
    r"(?:model_index|report|judges)\.json|pipeline\.py|README\.md|evaluation/report\.html|samples/[\w-]+\.png"
    r"|pytorch_lora_weights\.safetensors"
    r"|\w+/(?:[\w.-]+\.json|[\w.-]+\.safetensors|vocab\.txt|merges\.txt|minim_filter\.py)"
)
SPACE_FILES = re.compile(r"(?:[\w-]+/)*(?:[\w.-]+\.(?:py|md|txt|html|js|css|jinja|xmp|csv|json|png)|py\.typed)")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz")
STATES = re.compile(r"optimizer|random_states|scaler|sampler|trainer_state|log\.jsonl|arguments\.json")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".dcm", ".nii", ".gz")
# An absolute path, as it stands in quotes or after a space: not the path of an address, nor one within a repository.
LOCAL_PATH = re.compile(
    r"(?<![\w:/.<)\]])/(?:home|Users|root|mnt|tmp|work|workspace|scratch|data|media|srv|var|opt|usr)/[\w.-]+[\w./-]*"
    r"|(?<!\w)[A-Za-z]:\\\\?[\w.-]+\\|file:/{3}\w"
)
# A page of `minim evaluate` that was made without --no-real-images.
REAL_PICTURE = re.compile(r'alt="training image [^"]')


def check_folder(folder: str | Path, allowed: re.Pattern = MODEL_FILES) -> None:
    """Raises ValueError that names everything in `folder` which is not to be uploaded.

    `allowed`: names of files, relative to the folder, that may be there at all.
    """
    folder = Path(folder)
    files = sorted(path for path in folder.rglob("*") if not path.is_dir())
    found = []
    for path in files:
        name = path.relative_to(folder).as_posix()
        found += [f"{name} {why}" for why in problems(path, name, allowed)]
    if found:
        raise ValueError(f"Nothing was uploaded, because of {len(found)} problems: {'; '.join(found)}.")


def problems(path: Path, name: str, allowed: re.Pattern) -> Iterator[str]:
    """Why a file, which would have `name` in the repository, is not to be uploaded."""
    suffix = path.suffix.lower()
    if path.is_symlink():
        yield "is a link"
    elif suffix in PICKLES:
        yield "is a pickle, which runs code when it is loaded: save as safetensors"
    elif STATES.search(path.name):
        yield "is a state of training"
    elif suffix in PICTURES:
        yield from picture_problems(path)
    elif not allowed.fullmatch(name):
        yield "has no place in the repository"
    elif suffix in (".parquet", ".tar"):
        return  # `dataset.check_rows` looks at all that is in it
    elif suffix == ".safetensors":
        yield from weight_problems(path)
    else:
        text = path.read_text(encoding="utf-8")
        yield from path_problems(text)
        if suffix == ".html" and REAL_PICTURE.search(text):
            yield "shows real images: make it with --no-real-images"


def picture_problems(path: str | Path) -> Iterator[str]:
    try:
        synthetic = read_provenance(path).get("synthetic", False)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
        synthetic = False
    if not synthetic:
        yield "does not say that it is synthetic, and may be a real image"


def weight_problems(path: Path) -> Iterator[str]:
    try:
        with safe_open(path, "pt") as file:
            yield from path_problems(json.dumps(file.metadata() or {}))
    except SafetensorError:
        yield "is no safetensors file"


def path_problems(text: str) -> Iterator[str]:
    if places := sorted({match[0] for match in LOCAL_PATH.finditer(text)}):
        yield f"names {', '.join(map(repr, places[:3]))}, a place on somebody's machine"
