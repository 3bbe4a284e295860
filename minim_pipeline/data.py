"""MINIM's data format, `path,Text,modality` in a CSV beside its images: one reader and one writer.

What the writer makes is what the reader takes, so that a folder of generated images is a training set at once.
"""

import csv
import errno
import io
import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from .modalities import resolve_modality
from .provenance import atomic_path, save_png


# Other spellings of a column; MINIM's README says `modality`, its example CSV `modal`.
COLUMN_ALIASES = {"modal": "modality"}


def resolve_path(row: Mapping[str, str], csv_path: str | Path, image_root: str | Path | None = None) -> Path:
    """Where the image of `row` lies: its `path`, relative to `image_root` or else to the folder of the CSV."""
    root = Path(csv_path).parent if image_root is None else Path(image_root)
    return root / row["path"]


def read_csv(
    path: str | Path,
    split: str | None = None,
    image_root: str | Path | None = None,
    skip_bad_rows: bool = False,
    require: Sequence[str] = ("path", "Text", "modality"),
    check_images: bool = True,
    check: Callable[[dict[str, str]], object] | None = None,
) -> list[dict[str, str]]:
    """Reads a CSV in MINIM's format.

    Spaces around names and values, a byte-order mark and empty lines are left out; `modal` is read as `modality`.

    Args:
        path: the CSV file, UTF-8.
        split: keeps only the rows whose `split` column says so.
        image_root: folder that `path` is relative to; by default the CSV's own.
        skip_bad_rows: leaves bad rows out, with one warning that lists them, instead of raising.
        require: columns that have to be there, and filled in every row.
        check_images: decodes every image of the rows kept, in threads (6,000 of 256 px take some 10 s on 2 cores).
        check: called with every row kept; raises ValueError, with what is wrong, for a bad one.

    Returns:
        One dict a row, from column names to strings: those of `require`, and all other columns as they are.
        `modality` is as written; `resolve_modality` understands it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a required column is missing, nothing is left, or rows are bad. The message lists every bad row
            with its number (from 1, without the header), its line in the file, and what is wrong with it: a number
            of fields other than the header's (mostly an unquoted comma), an empty required value, an unknown or
            ambiguous modality, a missing or broken image.
    """
    path = Path(path)
    columns, records = _read_records(path)
    missing = [name for name in require if name not in columns]
    if split is not None and "split" not in columns:
        missing.append("split")
    if missing:
        raise ValueError(
            f"{path} lacks the column{'s' * (len(missing) > 1)} {', '.join(map(repr, missing))}; "
            f"found: {', '.join(map(repr, columns))}."
        )

    bad: dict[int, tuple[int, str]] = {}  # row number -> file line, what is wrong
    kept: list[tuple[int, int, dict[str, str]]] = []
    splits = set()
    for number, (line, values) in enumerate(records, start=1):
        if len(values) != len(columns):
            text = ",".join(values)
            guess = "an unquoted comma? " if len(values) > len(columns) else "an open quote? " if "\n" in text else ""
            shown = repr(text if len(text) <= 100 else text[:100] + "…")
            bad[number] = line, f"{len(values)} fields, the header has {len(columns)} ({guess}{shown})"
            continue
        row = {name: value for name, value in zip(columns, values) if name}
        splits.add(row.get("split"))
        if split is not None and row["split"] != split:
            continue
        problem = _problem(row, require, check)
        if problem:
            bad[number] = line, problem
        else:
            kept.append((number, line, row))

    if check_images:
        images = {resolve_path(row, path, image_root) for _, _, row in kept}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            broken = {image: why for image, why in zip(images, pool.map(_image_problem, images)) if why}
        for number, line, row in kept:
            why = broken.get(resolve_path(row, path, image_root))
            if why:
                bad[number] = line, why

    if bad:
        listed = "\n".join(f"  row {number} (line {bad[number][0]}): {bad[number][1]}" for number in sorted(bad))
        message = f"{path} has {len(bad)} bad row{'s' * (len(bad) > 1)}:\n{listed}"
        if not skip_bad_rows:
            raise ValueError(message)
        warnings.warn(f"Left out: {message}", stacklevel=2)
    rows = [row for number, _, row in kept if number not in bad]
    if not rows:
        of_split = f" of split {split!r}; splits found: {', '.join(map(repr, sorted(filter(None, splits))))}"
        raise ValueError(f"{path} has no usable rows{of_split if split is not None else ''}.")
    return rows


def read_columns(path: str | Path) -> list[str]:
    """The names of a CSV's columns, as `read_csv` gives them."""
    return _read_records(Path(path))[0]


def _read_records(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The column names, and each record's first line in the file (from 1) with its values; all of it stripped."""
    records, line = [], 1
    try:
        # utf-8-sig: the reference's files may start with a byte-order mark.
        with open(path, encoding="utf-8-sig", newline="") as file:
            # skipinitialspace: without it a quote after ", " is not read as one.
            reader = csv.reader(file, skipinitialspace=True)
            for values in reader:
                if any(map(str.strip, values)):
                    records.append((line, [value.strip() for value in values]))
                line = reader.line_num + 1
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error.reason} at byte {error.start}.") from error
    except csv.Error as error:
        raise ValueError(f"{path} is no CSV from line {line} on: {error} (an open quote?).") from error
    if not records:
        raise ValueError(f"{path} is empty: a header such as 'path,Text,modality' is needed.")
    columns = records[0][1]
    for alias, name in COLUMN_ALIASES.items():
        if name not in columns:
            columns = [name if column == alias else column for column in columns]
    twice = sorted({name for name in columns if name and columns.count(name) > 1})
    if twice:
        raise ValueError(f"{path} has columns of the same name: {', '.join(map(repr, twice))}.")
    return columns, records[1:]


def _problem(row: dict[str, str], require: Sequence[str], check: Callable | None) -> str | None:
    empty = [name for name in require if not row[name]]
    if empty:
        return f"no value for {', '.join(map(repr, empty))}"
    try:
        if "modality" in require:
            resolve_modality(row["modality"])
        if check is not None:
            check(row)
    except ValueError as error:
        return str(error)
    return None


def _image_problem(path: Path) -> str | None:
    if not path.is_file():
        return f"no image {path}"
    try:
        with Image.open(path) as image:
            image.load()  # verify() looks at PNG checksums only
    except Exception as error:  # decoders raise many types: OSError, SyntaxError, ValueError, struct.error, ...
        return f"broken image {path} ({error})"
    return None


class DatasetWriter:
    """Writes images as a folder and a CSV in MINIM's format, and goes on where an earlier run was stopped.

    The folder holds `NNNN.png`, `data.csv` (`path,Text,modality,seed`, then `columns`) and `run.json` (`settings`).
    The names of more than 10,000 images have more digits, so that they sort in the order of the images; a folder that
    holds images goes on with names as theirs.
    Images appear whole or not at all, and a row only after its image, so that at any moment all rows of the CSV are
    true. Nothing is written, and no folder made, before the first `add`.

    Args:
        output_dir: the folder; made if missing.
        columns: names of the columns after `path,Text,modality,seed`.
        settings: what all of the run's images have in common, as JSON types; compared with those of the run that the
            folder already holds.
        part: with several processes, the index of this one: rows go to `data-NNNNN.csv` until `finish` merges them.
        count: of the run's images, as far as it is known: it says how many digits their names need.

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
        self._opened = False
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

        `row` has values for `Text`, `modality`, `seed` and any of `columns`; `path` is set here.
        """
        if not self._opened:
            self._open()
        path = self.output_dir / self.name(index)
        save_png(image, path, metadata)
        line = {name: str(row.get(name, "")) for name in self.columns} | {"path": path.name}
        _append(self._csv, _csv_text([line], self.columns))
        self.rows[path.name] = line
        return path

    def finish(self) -> None:
        """Merges the parts of all processes into `data.csv`, in the order of the images. For one process only."""
        parts = [file for file in self._csv_files() if file.name != "data.csv"]
        rows = {row["path"]: row for file in self._csv_files() for row in _whole_rows(file)}
        if rows:
            _write_rows(self.output_dir / "data.csv", _in_order(rows.values()), self.columns)
        for file in parts:
            file.unlink()

    def _open(self) -> None:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.output_dir / "run.json") as temporary:
            temporary.write_text(json.dumps(self.settings, indent=2) + "\n")
        # Written anew, so that half a row, or a row without its image, is gone before more is appended.
        rows = [row for row in _whole_rows(self._csv) if row["path"] in self.rows]
        _write_rows(self._csv, rows, self.columns)
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
                raise ValueError(
                    f"{self.output_dir} holds files that no run has written ({own[0].name}): choose another folder."
                )
            return
        earlier = read_json(file)
        names = [name for name in {**earlier, **self.settings} if earlier.get(name) != self.settings.get(name)]
        if names:
            differing = [f"{name}: {earlier.get(name)!r} there, {self.settings.get(name)!r} now" for name in names]
            raise ValueError(
                f"{self.output_dir} holds a run of other settings ({'; '.join(differing)}): "
                "choose another folder, or the same settings."
            )


def image_name(index: int, digits: int) -> str:
    return f"{index:0{digits}d}.png"


def name_digits(folder: Path, count: int) -> int:
    """How many digits the names of `count` images have: those of the images in `folder`, or at least 4."""
    names = (path.stem for path in folder.glob("[0-9][0-9][0-9][0-9]*.png"))
    return min((len(name) for name in names if name.isdigit()), default=max(4, len(str(count - 1))))


def read_json(path: Path) -> dict:
    """The object in a JSON file.

    Raises:
        ValueError: it holds anything else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object, but {str(value)[:40]!r}.")
    return value


def _in_order(rows: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    return sorted(rows, key=lambda row: (len(row["path"]), row["path"]))  # 9999.png before 10000.png


def _csv_text(rows: Iterable[Mapping[str, str]], columns: Sequence[str], header: bool = False) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _write_rows(path: Path, rows: Iterable[Mapping[str, str]], columns: Sequence[str]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(_csv_text(rows, columns, header=True), encoding="utf-8")


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
