"""Tables of images and captions: one reader of all formats, and the writer of MINIM's, `path,Text,modality` in a CSV.

What the writer makes is what the reader takes, so that a folder of generated images is a training set at once.
"""

import csv
import errno
import io
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from threading import Lock

from PIL import Image

from ..captions import check_caption
from ..files import write_csv, write_json
from ..modalities import AMBIGUOUS, resolve_modality, split_prefix
from ..provenance import save_png
from .formats import base_of, find_source, read_source
from .image_files import split_address
from .looks import MANY, problems
from .table import AS_USUAL, USUAL, Columns, Record, guess, mend_commas, read_table


LISTED = 20  # bad rows are listed up to so many, and counted beyond


def resolve_path(row: Mapping[str, str], csv_path: str | Path, image_root: str | Path | None = None) -> Path:
    """Where the image of `row` lies: its `path`, from the folder of the table, or looked for under `image_root`.

    There the whole path is tried, and then without its first folders: `theirs/oct/1.png`, `oct/1.png`, `1.png`. Of an
    image inside of a larger file it is an address (`image_files`).
    """
    if image_root is None:
        return base_of(csv_path) / row["path"]
    root = Path(image_root)
    parts = [part for part in re.split(r"[/\\]+", row["path"]) if part not in ("", ".", "..")]
    # As it is written first: it may be relative, and a name may hold what divides folders elsewhere.
    written = [] if Path(row["path"]).is_absolute() else [root / row["path"]]
    tried = [*written, *(root.joinpath(*parts[i:]) for i in range(len(parts)))]
    return next(filter(Path.is_file, tried), tried[0])


def resolve_paths(rows: Iterable[Mapping[str, str]], csv_path: str | Path) -> list[str]:
    """`resolve_path` of many rows of one table, as strings, which take less memory and time."""
    base = "" if base_of(csv_path) == Path() else str(base_of(csv_path))
    return [os.path.join(base, row["path"]) for row in rows]


def read_dataset(
    path: str | Path,
    split: str | None = None,
    image_root: str | Path | None = None,
    skip_bad_rows: bool = False,
    require: Sequence[str] = ("path", "Text", "modality"),
    check_images: bool = True,
    check: Callable[[dict[str, str]], object] | None = None,
    modality: str | None = None,
    columns: Columns = AS_USUAL,
) -> list[dict[str, str]]:
    """Reads a table of images and captions: a CSV in MINIM's format, or any other that `formats` knows.

    Spaces around names and values, a byte-order mark and empty lines are left out. Commas in captions that nobody
    quoted are understood where the columns are `path,Text,modality` alone, with one warning. A modality that fits
    several is that of the caption's prefix: `CT` with "Chest CT: nodule" is chest CT.

    Args:
        path: a CSV in UTF-8, or a file, folder, glob or id on the Hub of another format (`find_source`).
        split: keeps only the rows whose `split` column says so.
        image_root: folder to look for the images in, see `resolve_path`, by default the table's. With it, `path` of
            the rows returned leads from the table's folder to where the image was found.
        skip_bad_rows: leaves bad rows out, with one warning that lists them, instead of raising.
        require: columns that have to be there, and filled in every row.
        check_images: looks at every image of the rows kept (`looks`; 6,000 of 256 px take some 10 s on 2 cores).
        check: called with every row kept; raises ValueError, with what is wrong, for a bad one.
        modality: that of all rows, where the table has no such column or leaves it empty.
        columns: names of columns that are not called as usual.

    Returns:
        One dict a row, from column names to strings: those of `require`, and all other columns as they are.
        `modality` is as written; `resolve_modality` understands it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no table, a required column is missing, nothing is left, or rows are bad. The message
            counts the bad rows, and lists up to 20 with their number (from 1, without the header), their line or
            address, and what is wrong: a number of fields other than the header's (mostly an unquoted comma), a value
            that is missing or cannot be, an image that is missing or broken, or stands for two different paths.
        ImportError: the format needs a package that is not installed.
    """
    names, records, found = _open(path, columns)
    _check_columns(path, [*require, *(["split"] if split is not None else [])], names, found, modality)

    rows: dict[int, dict[str, str]] = {}
    bad: dict[int, str] = {}
    places: dict[Path, str] = {}  # where images were found under image_root, and by which path
    splits, mended = set(), []
    same: dict[str, str] = {}  # what stands in many rows is held once
    for number, record in enumerate(records, start=1):
        try:
            row = _row_of(record, names) if isinstance(record, Record) else dict(record)
            row |= {name: same.setdefault(value, value) for name, value in row.items() if name != "path"}
            if isinstance(record, Record) and len(record.values) > len(names):
                mended.append((number, row["Text"]))
            _complete(row, modality)
            splits.add(row.get("split", ""))
            if split is None or row["split"] == split:
                _check_row(row, require, check, modality)
                if image_root is not None and "path" in require and split_address(row["path"]) is None:
                    _place(row, path, image_root, places)
                rows[number] = row
        except ValueError as error:
            bad[number] = str(error)
    if check_images:
        images = dict(zip(rows, resolve_paths(rows.values(), path)))
        broken = problems(images.values(), path, skip_bad_rows or len(images) < MANY)
        bad |= {number: broken[image] for number, image in images.items() if image in broken}
    if bad:
        message = _list_bad(path, bad, records, rows if image_root is None else {})
        if not skip_bad_rows:
            raise ValueError(message)
        warnings.warn(f"Left out: {message}", stacklevel=2)
    if mended:
        warnings.warn(_list_mended(path, mended, len(records)), stacklevel=2)
    good = [row for number, row in rows.items() if number not in bad]
    if not good:
        of_split = f" of split {split!r}; splits found: {', '.join(map(repr, sorted(splits - {''})))}"
        raise ValueError(f"{path} has no usable rows{of_split if split is not None else ''}.")
    return good


def read_columns(path: str | Path, columns: Columns = AS_USUAL) -> list[str]:
    """The names of a table's columns, as `read_dataset` gives them."""
    return _open(path, columns)[0]


def _open(path: str | Path, columns: Columns) -> tuple[list[str], Sequence[Record | dict[str, str]], list[str]]:
    """The columns of a table, its rows, of a CSV as records, and the columns as the table calls them."""
    source = find_source(path)
    if source.kind == "csv":
        names, records = read_table(source.files[0], columns)
        return names, records, names
    table = read_source(path, columns)
    return table.columns, table.rows, table.found


def _check_columns(
    path: str | Path, require: Sequence[str], names: Sequence[str], found: Sequence[str], modality: str | None
) -> None:
    """Raises ValueError if a required column is missing, or `modality` is none."""
    if modality is not None:
        resolve_modality(modality)
    missing = [name for name in require if name not in names and not (name == "modality" and modality)]
    if not missing:
        return
    hint = " If all rows are of one modality, name it with --modality." if missing == ["modality"] else ""
    option = next((o for o, name in zip(Columns._fields, USUAL) if name == missing[0] != "modality"), None)
    if option is not None and "path" in require:  # lists of prompts have no such option
        hint = f" If another one is meant, --{option}_column names it."
    raise ValueError(
        f"{path} lacks the column{'s' * (len(missing) > 1)} {', '.join(map(repr, missing))}; "
        f"found: {', '.join(map(repr, found)) or 'none'}.{hint}"
    )


def _list_bad(
    path: str | Path,
    bad: dict[int, str],
    records: Sequence[Record | Mapping[str, str]],
    placed: Mapping[int, Mapping[str, str]],
) -> str:
    """The message on bad rows; `placed`: rows whose images were looked for where their paths say."""

    def place(number: int) -> str:
        record = records[number - 1]
        return f"line {record.line}" if isinstance(record, Record) else record.get("path", "")

    listed = [f"  row {n} ({place(n)}): {bad[n]}" for n in sorted(bad)[:LISTED]]
    listed += [f"  … and {len(bad) - LISTED} more"] * (len(bad) > LISTED)
    if any(re.match(r"[/\\]|[A-Za-z]:", placed[n]["path"]) for n in bad.keys() & placed.keys()):
        listed.append("  Paths of another machine? --image_root names the folder to look for the images in.")
    return f"{path} has {len(bad)} bad row{'s' * (len(bad) > 1)}:\n" + "\n".join(listed)


def _list_mended(path: str | Path, mended: list[tuple[int, str]], total: int) -> str:
    """The message on captions with commas that nobody quoted; `mended`: numbers of rows, and their captions."""
    number, caption = mended[0]
    return (
        f"{path} has captions with commas and without quotes, in {len(mended)} of {total} rows; the commas were taken"
        f" for the captions' own, as in row {number}: {caption!r}."
    )


def _row_of(record: Record, columns: list[str]) -> dict[str, str]:
    """The values of a record by column; raises ValueError where there are more, or fewer, than columns."""
    values = record.values
    if len(values) > len(columns):
        values = mend_commas(record, columns, _is_modality) or values
    if len(values) != len(columns):
        text = ",".join(values)
        shown = repr(text if len(text) <= 100 else text[:100] + "…")
        raise ValueError(f"{len(values)} fields, the header has {len(columns)} ({guess(record, columns)}{shown})")
    return {name: value for name, value in zip(columns, values) if name}


def _is_modality(name: str) -> bool:
    try:
        resolve_modality(name)
    except ValueError:
        return name.lower() in AMBIGUOUS
    return True


def _complete(row: dict[str, str], modality: str | None) -> None:
    """Fills in a modality that is missing, or fits several and is told by the caption's prefix."""
    if modality is not None and not row.get("modality"):
        row["modality"] = modality
    several = AMBIGUOUS.get(row.get("modality", "").lower(), ())
    prefix = split_prefix(row.get("Text", ""))[0] if several else None
    if prefix and _is_modality(prefix) and prefix.lower() not in AMBIGUOUS and resolve_modality(prefix).id in several:
        row["modality"] = prefix


def _place(row: dict[str, str], csv_path: str | Path, image_root: str | Path, places: dict[Path, str]) -> None:
    """Sets `path` to where the image lies; raises ValueError if another row's image is there."""
    given, found = row["path"], resolve_path(row, csv_path, image_root).absolute()
    first = places.setdefault(found, given)
    if os.path.normpath(first) != os.path.normpath(given):
        raise ValueError(f"{given!r} and {first!r} are the same file under the image root, {found}")
    # Relative again, as reports show it. Resolved: behind a link, "../.." leads elsewhere than it reads.
    place = os.path.relpath(found.parent.resolve() / found.name, base_of(csv_path).resolve())
    row["path"] = Path(place).as_posix()


def _check_row(row: dict[str, str], require: Sequence[str], check: Callable | None, modality: str | None) -> None:
    """Raises ValueError with what is wrong."""
    empty = [name for name in require if not row[name]]
    if empty:
        raise ValueError(f"no value for {', '.join(map(repr, empty))}")
    if "modality" in require:
        found = resolve_modality(row["modality"])
        if modality is not None and found != resolve_modality(modality):
            raise ValueError(f"modality {row['modality']!r}, but {modality!r} is asked for all rows")
    if "Text" in require:
        check_caption(row["Text"])
        check_caption(split_prefix(row["Text"])[1] or row["Text"])
    if check is not None:
        check(row)


class DatasetWriter:
    """Writes images as a folder and a CSV in MINIM's format, and goes on where an earlier run was stopped.

    The folder holds `NNNN.png`, `data.csv` (`path,Text,modality,seed`, then `columns`), `run.json` (`settings`) and,
    once it is finished, `metadata.csv`.
    Images appear whole or not at all, and a row only after its image, so that at any moment all rows of the CSV are
    true. Nothing is written, and no folder made, before the first `add`.

    Args:
        output_dir: the folder; made if missing.
        columns: names of the columns after `path,Text,modality,seed`.
        settings: what all of the run's images have in common, as JSON types.
        part: with several processes, the index of this one: rows go to `data-NNNNN.csv` until `finish` merges them.
        count: of the run's images, as far as it is known: it says how many digits their names need (`name_digits`).

    Attributes:
        digits: of the images' names.
        rows: file name -> row (strings), of all images that were there at the start or are added by this writer.

    Raises:
        ValueError: the folder holds a run of other settings (the message names those that differ), or a `data.csv`
            or `run.json` that no run of this writer made.
    """

    def __init__(
        self,
        output_dir: str | Path,
        columns: Iterable[str] = (),
        settings: Mapping[str, object] | None = None,
        part: int | None = None,
        count: int = 0,
    ):
        self.output_dir = Path(output_dir)
        self.columns = list(dict.fromkeys(["path", "Text", "modality", "seed", *columns]))
        # Through JSON and back, so that tuples and lists compare equal to what run.json holds.
        self.settings = json.loads(json.dumps(dict(settings or {})))
        self._check_settings()
        self.digits = name_digits(self.output_dir, count)
        self._csv = self.output_dir / ("data.csv" if part is None else f"data-{part:05d}.csv")
        self._opened, self._opening = False, Lock()
        self.rows: dict[str, dict[str, str]] = {}
        for file in self._csv_files():
            for row in _whole_rows(file):
                if (self.output_dir / row["path"]).is_file():
                    self.rows[row["path"]] = row
        self.columns = list(dict.fromkeys([*self.columns, *(name for row in self.rows.values() for name in row)]))

    def name(self, index: int) -> str:
        """The file name of image `index`: `0007.png`."""
        return image_name(index, self.digits)

    def add(self, index: int, image: Image.Image, row: Mapping[str, object], metadata: Mapping[str, object]) -> Path:
        """Writes image `index` with its provenance `metadata`, then its row, and returns the image's path.

        `row` has values for `Text`, `modality`, `seed` and any of `columns`; `path` is set here. Threads may do so at
        once; `finish` puts the rows in order.
        """
        with self._opening:
            if not self._opened:
                self._open()
        path = self.output_dir / self.name(index)
        save_png(image, path, metadata)
        line = {name: str(row.get(name, "")) for name in self.columns} | {"path": path.name}
        text = io.StringIO()
        csv.DictWriter(text, self.columns, lineterminator="\n").writerow(line)
        _append(self._csv, text.getvalue())
        self.rows[path.name] = line
        return path

    def finish(self) -> None:
        """Merges the parts of all processes into `data.csv`, in the order of the images. For one process only.

        `metadata.csv` beside it says the same in the words of Hugging Face's `imagefolder`.
        """
        parts = [file for file in self._csv_files() if file.name != "data.csv"]
        rows = {row["path"]: row for file in self._csv_files() for row in _whole_rows(file)}
        if rows:
            ordered = sorted(rows.values(), key=lambda row: (len(row["path"]), row["path"]))  # 9999.png before 10000
            write_csv(self.output_dir / "data.csv", ordered, self.columns, end="\n")
            names = {"path": "file_name", "Text": "caption"}
            renamed = [{names.get(name, name): row.get(name, "") for name in self.columns} for row in ordered]
            write_csv(self.output_dir / "metadata.csv", renamed, end="\n")
        for file in parts:
            file.unlink()

    def _open(self) -> None:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        write_json(self.output_dir / "run.json", self.settings)
        # Written anew, so that half a row, or a row without its image, is gone before more is appended.
        rows = [row for row in _whole_rows(self._csv) if row["path"] in self.rows]
        write_csv(self._csv, rows, self.columns, end="\n")
        self._opened = True

    def _csv_files(self) -> list[Path]:
        return [*self.output_dir.glob("data.csv"), *sorted(self.output_dir.glob("data-[0-9]*.csv"))]

    def _check_settings(self) -> None:
        nearest = next(path for path in (self.output_dir, *self.output_dir.absolute().parents) if path.exists())
        if not nearest.is_dir():
            raise ValueError(f"{nearest} is a file, not a folder.")
        file = self.output_dir / "run.json"
        if not file.exists():
            # run.json is the first file of a run, so what lies here without it is somebody's own.
            own = [*self.output_dir.glob("data.csv"), *self.output_dir.glob("[0-9][0-9][0-9][0-9]*.png")]
            if own:
                strange = f"files that no run has written ({own[0].name})"
                raise ValueError(f"{self.output_dir} holds {strange}: choose another folder.")
            return
        check_settings(self.output_dir, read_json(file), self.settings)


def check_settings(place: str | Path, earlier: Mapping[str, object], now: Mapping[str, object]) -> None:
    """Raises ValueError, which names those that differ, if the settings of the run in `place` are other ones now."""
    names = [name for name in {**earlier, **now} if earlier.get(name) != now.get(name)]
    if names:
        differing = [f"{name}: {earlier.get(name)!r} there, {now.get(name)!r} now" for name in names]
        raise other_settings(place, "; ".join(differing))


def other_settings(folder: str | Path, differing: str) -> ValueError:
    """The error for a folder that another run has begun."""
    same = "choose another folder, or the same settings"
    return ValueError(f"{folder} holds a run of other settings ({differing}): {same}.")


def image_name(index: int, digits: int) -> str:
    return f"{index:0{digits}d}.png"


def name_digits(folder: Path, count: int) -> int:
    """How many digits the names of `count` images have: those of the images in `folder`, or at least 4."""
    names = (path.stem for path in folder.glob("[0-9][0-9][0-9][0-9]*.png"))
    return min((len(name) for name in names if name.isdigit()), default=max(4, len(str(count - 1))))


def read_json(path: Path) -> dict:
    """The object in a JSON file; ValueError if it holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object, but {str(value)[:40]!r}.")
    return value


def _append(path: Path, text: str) -> None:
    """Appends `text` in one call of the system, or not at all."""
    data = text.encode()
    file = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        size = os.fstat(file).st_size
        if os.write(file, data) != len(data):  # a full disk
            os.ftruncate(file, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(file)


def _whole_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV that `DatasetWriter` wrote, without one that a crash of the machine has cut."""
    if not path.exists():
        return []
    # As bytes, so that line breaks inside of values stay what they are; a spreadsheet may have put a mark in front.
    text = path.read_bytes().decode("utf-8-sig")
    reader = csv.reader(io.StringIO(text, newline=""))
    header, *rows = [*reader] or [[]]
    missing = [name for name in ("path", "Text", "modality", "seed") if header and name not in header]
    if missing:
        raise ValueError(f"{path} lacks the columns {', '.join(map(repr, missing))}: no run has written it.")
    if not text.endswith("\n"):
        rows = rows[:-1]
    return [dict(zip(header, values)) for values in rows if len(values) == len(header)]
