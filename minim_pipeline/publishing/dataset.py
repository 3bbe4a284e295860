"""A generated set of images to the Hub, flat or in shards, with a card that is made of what its files say."""

import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from ..contact_sheet import contact_sheet
from ..data.image_reader import read_image
from ..data.sources import read_dataset, resolve_paths
from ..generate.draw import REASONS
from ..modalities import resolve_modality
from ..provenance import save_png
from .leaks import check_folder, path_problems, picture_problems
from .upload import check_target, connect, upload


CARD = Path(__file__).with_name("dataset_card.md").read_text(encoding="utf-8")
FILES = re.compile(
    r"run\.json|plan\.parquet|(?:meta)?data\.csv|fell_short(?:\.jsonl|/[\w-]+\.jsonl)"
    r"|data/[\w-]+(?:\.parquet|\.tar|/metadata\.csv)"
)
# What stays here: notes of a run that may go on, and a picture of what may be the whole set.
LEFT_OUT = (".*", "plan.parquet", "fell_short*", "grid.png")
SHARD = re.compile(r"train-\d{5}-of-(\d{5})(?:\.parquet|\.tar)?")
MOST_FILES = 100_000  # that the Hub wants in a repository
SAMPLES = 4  # of each modality
SIZES = {1000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M", 10_000_000: "1M<n<10M"}

Row = dict[str, str]


def publish_dataset(folder: str | Path, repo_id: str, license: dict[str, str], private: bool | None = None) -> str:
    """Uploads a set that `minim generate` has drawn, in one commit, and returns the commit's address.

    Everything is looked at before the repository is touched: every image has to say that it is synthetic, and nothing
    may name a place on somebody's machine.

    Args:
        folder: of PNGs, or of shards in any format.
        repo_id: `"owner/name"`; made if it is not there yet. What it holds of an earlier set is replaced.
        license: `license`, and `license_name` if that is `other`, as in a card's front matter.
        private: makes a new repository private.

    Raises:
        ValueError: the folder holds no run, or one that is not complete, or something that must not be uploaded; there
            is no token, or none that may write there. Nothing was uploaded then.
        OSError: the Hub could not be reached, or the connection broke.
    """
    api = connect()
    check_target(api, repo_id, "dataset")
    with staged_dataset(folder, repo_id, license) as staged:
        commit: dict[str, Any] = {"private": private, "commit_message": "Upload images of minim generate"}
        commit["replaced"] = ["data/*", "*.png", "data.csv", "metadata.csv", "run.json"]
        return upload(api, staged, repo_id, "dataset", **commit)


@contextmanager
def staged_dataset(folder: str | Path, repo_id: str, license: dict[str, str]) -> Iterator[Path]:
    """A temporary folder with all that would be uploaded, checked; arguments and errors as for `publish_dataset`."""
    folder = Path(folder).absolute()
    check_complete(folder)
    check_folder(folder, FILES)
    rows = read_dataset(folder, check_images=False)
    paths = resolve_paths(rows, folder)
    check_rows(rows, paths)
    settings = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(prefix="minim-") as temporary:
        staged = Path(temporary) / "set"
        left_out = shutil.ignore_patterns(*LEFT_OUT)
        shutil.copytree(folder, staged, ignore=left_out, copy_function=os.symlink)
        save_samples(rows, paths, staged / "samples.png", settings)
        (staged / "README.md").write_text(dataset_card(rows, settings, repo_id, license), encoding="utf-8")
        yield staged


def check_complete(folder: Path) -> None:
    """Raises ValueError if a folder does not hold a run, and all of its shards."""
    if not (folder / "run.json").is_file():
        raise ValueError(f"{folder} holds no run.json, and so no images of minim generate.")
    files = sum(len(names) for _, _, names in os.walk(folder))
    if files > MOST_FILES:
        raise ValueError(
            f"{folder} has {files} files, more than {MOST_FILES}: --format parquet or webdataset has few."
        )
    if (folder / "data").is_dir():
        found = [match for path in (folder / "data").iterdir() if (match := SHARD.fullmatch(path.name))]
        count = int(found[0][1]) if found else 0
        if not found or len(found) < count:
            there = f"{len(found)} of {count or 'its'} shards"
            raise ValueError(f"{folder} holds {there}: the same minim generate command draws the others.")


def check_rows(rows: Sequence[Row], paths: Sequence[str]) -> None:
    """Raises ValueError for images that do not say they are synthetic, and for texts that name a place."""
    found = []
    for row, path in zip(rows, paths):
        found += [f"{row['path']} {why}" for why in picture_problems(path)]
        found += [f"the row of {row['path']} {why}" for why in path_problems("\n".join(row.values()))]
    if found:
        more = f", and {len(found) - 20} more" if len(found) > 20 else ""
        raise ValueError(f"Nothing was uploaded, because of {len(found)} problems: {'; '.join(found[:20])}{more}.")


def save_samples(rows: Sequence[Row], paths: Sequence[str], file: Path, settings: dict) -> None:
    """Writes the first images of each modality, of different captions, as one picture."""
    chosen: dict[str, dict[str, str]] = {}
    for row, path in zip(rows, paths):
        own = chosen.setdefault(resolve_modality(row["modality"]).id, {})
        if len(own) < SAMPLES:
            own.setdefault(row["Text"], path)
    pictures = [read_image(path, id)[0].convert("RGB") for id, own in chosen.items() for path in own.values()]
    told = {name: settings.get(name) for name in ("model", "revision")} | {"modality": ", ".join(chosen)}
    told["prompt"] = " | ".join(text for own in chosen.values() for text in own)
    save_png(contact_sheet(pictures, SAMPLES), file, told)


def dataset_card(rows: Sequence[Row], settings: dict, repo_id: str, license: dict[str, str]) -> str:
    """The text of README.md: generator, settings, acceptance, and counts by modality and finding."""
    images, accepted = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for row in rows:
        key = resolve_modality(row["modality"]).id, row.get("finding", "").strip() or "-"
        images[key] += 1
        accepted[key] += row.get("accepted", "").lower() == "true"
    filtered = any(row.get("accepted") for row in rows)
    counts = [
        f"| {modality} | {finding} | {count} | {accepted[modality, finding] if filtered else '-'} |"
        for (modality, finding), count in sorted(images.items())
    ]
    size = next((name for most, name in SIZES.items() if len(rows) < most), "n>10M")
    modalities = sorted({modality for modality, _ in images})
    fields = {**license, "tags": ["medical", "synthetic", "minim", *modalities], "size_categories": [size]}
    fields |= {"task_categories": ["text-to-image", "image-classification"], "pretty_name": repo_id.split("/")[-1]}
    facts = {
        "name": fields["pretty_name"],
        "images": f"{len(rows):,}",
        "settings": "\n".join(f"| {name} | {value} |" for name, value in settings.items() if value is not None),
        "acceptance": acceptance(rows, sum(accepted.values())) if filtered else "No filter has chosen among them.",
        "counts": "\n".join(counts),
    }
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---\n\n{CARD.format(**facts)}"


def acceptance(rows: Sequence[Row], accepted: int) -> str:
    """What the model's filter made of the images, in words."""
    candidates = sum(int(row["candidates"]) for row in rows if row.get("candidates"))
    why = {reason: sum(int(row.get(f"rejected_{reason}") or 0) for row in rows) for reason in REASONS}
    left_out = ", ".join(f"{reason} {count}" for reason, count in why.items() if count) or "none"
    return (
        f"The model's filter accepted {accepted} of {len(rows)} images ({accepted / len(rows):.0%}), chosen among"
        f" {candidates} candidates; left out: {left_out}."
    )
