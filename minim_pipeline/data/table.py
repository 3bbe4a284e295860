"""Reads a CSV file into columns and records, mends commas that nobody quoted, and says what else a file may be."""

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


# Other spellings of a column. MINIM's README says `modality`, its example CSV `modal`; its ratings have the last two.
COLUMN_ALIASES = {"modal": "modality", "image_path": "path", "prompt": "Text"}
# And those of other formats, as data sets on the Hub have them.
FIELD_ALIASES = COLUMN_ALIASES | {"file_name": "path", "image": "path", "text": "Text", "caption": "Text"}
FIELD_ALIASES |= {"txt": "Text", "label": "finding", "cls": "finding"}

# How files begin that are taken for CSV.
_KINDS = {
    b"PK\x03\x04": "an Excel or LibreOffice file (.xlsx, .ods)",
    b"\xd0\xcf\x11\xe0": "an old Excel file (.xls)",
    b"\xff\xfe": "UTF-16, which Excel calls 'Unicode text'",
    b"\xfe\xff": "UTF-16, which Excel calls 'Unicode text'",
    b"PAR1": "a Parquet file",
    b"\x1f\x8b": "a gzip file",
}
_SAVE = "save it as 'CSV UTF-8', with commas between the columns"
_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}


@dataclass(frozen=True, slots=True)
class Record:
    """A line of the table: its first line in the file (from 1), its values, stripped, and how it is written there."""

    line: int
    values: list[str]
    text: str


class Columns(NamedTuple):
    """How a table calls the columns that have a meaning; None for the usual name, or another spelling of it."""

    image: str | None = None
    caption: str | None = None
    modality: str | None = None
    finding: str | None = None


AS_USUAL = Columns()
USUAL = "path", "Text", "modality", "finding"


def usual_names(found: Sequence[str], wanted: Columns, aliases: Mapping[str, str], file: str | Path) -> list[str]:
    """The names of the columns of `file` by their usual spelling, empty for one whose name another was given.

    Raises ValueError if one that is `wanted` is not there.
    """
    names = list(found)
    for option, given, usual in zip(Columns._fields, wanted, USUAL):
        if given is None:
            continue
        if given not in found:
            listed = ", ".join(map(repr, found))
            raise ValueError(f"{file} has no column {given!r}, which --{option}_column names; found: {listed}.")
        names = ["" if name == usual else name for name in names]
        names[list(found).index(given)] = usual
    for alias, name in aliases.items():
        if name not in names:
            names = [name if column == alias else column for column in names]
    return names


def read_table(
    path: Path, wanted: Columns = AS_USUAL, aliases: Mapping[str, str] = COLUMN_ALIASES
) -> tuple[list[str], list[Record]]:
    """The column names, by their usual spelling (`usual_names`), and the records; empty lines are left out.

    Raises ValueError if the file is empty, lacks a column that is `wanted`, has two columns of one name, or is no
    UTF-8 text with commas between columns; the message says what it is instead.
    """
    with open(path, "rb") as binary:
        start = binary.read(4096)
    found = next((kind for magic, kind in _KINDS.items() if start.startswith(magic)), None)
    if found is None and b"\0" in start:
        found = "UTF-16 or a binary file"
    if found is not None:
        raise ValueError(f"{path} is {found}, no CSV in UTF-8: {_SAVE}.")
    records, line = [], 1
    try:
        # utf-8-sig: the reference's files may start with a byte-order mark.
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines: list[str] = []
            # skipinitialspace: without it a quote after ", " is not read as one.
            reader = csv.reader(_noting(file, lines), skipinitialspace=True)
            for values in reader:
                if any(map(str.strip, values)):
                    records.append(Record(line, [value.strip() for value in values], "".join(lines).strip("\r\n")))
                lines.clear()
                line = reader.line_num + 1
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error.reason} at byte {error.start}; {_SAVE}.") from error
    except csv.Error as error:
        raise ValueError(f"{path} is no CSV from line {line} on: {error} (an open quote?).") from error
    if not records:
        raise ValueError(f"{path} is empty: a header such as 'path,Text,modality' is needed.")
    header, columns = records[0].text, records[0].values
    if re.match(r"sep=", header, re.IGNORECASE):
        raise ValueError(f"{path} begins with the line {header!r}, which only Excel understands: {_SAVE}.")
    found = next((name for separator, name in _SEPARATORS.items() if separator in header), None)
    if found is not None and "," not in header:
        raise ValueError(f"{path} has {found} between its columns, not commas ({header[:100]!r}): {_SAVE}.")
    # Images beside a table with `file_name` are an ImageFolder, by whatever name the table is given.
    columns = usual_names(columns, wanted, FIELD_ALIASES if "file_name" in columns else aliases, path)
    twice = sorted({name for name in columns if name and columns.count(name) > 1})
    if twice:
        raise ValueError(f"{path} has columns of the same name: {', '.join(map(repr, twice))}.")
    return columns, records[1:]


def _noting(lines: Iterable[str], noted: list[str]) -> Iterator[str]:
    for line in lines:
        noted.append(line)
        yield line


def mend_commas(record: Record, columns: list[str], is_modality: Callable[[str], bool]) -> list[str] | None:
    """The values of a record with more fields than columns, of which only the caption can hold the surplus commas.

    That is so where the columns are `path,Text,modality` or a part of them in this order, the record has no quotes,
    and its last field is a modality if that column is there; else it cannot be told what belongs where: `None`.
    """
    if columns != [name for name in ("path", "Text", "modality") if name in columns] or "Text" not in columns:
        return None
    if '"' in record.text or len(record.values) <= len(columns):
        return None
    values = record.text.split(",", columns.index("Text"))
    if columns[-1] == "modality":
        values[-1:] = values[-1].rsplit(",", 1)
        if not is_modality(values[-1].strip()):
            return None
    return [value.strip() for value in values]


def guess(record: Record, columns: list[str]) -> str:
    """Why a record may not have as many fields as the header, in words that end with a space, or nothing."""
    if len(record.values) > len(columns):
        return "an unquoted comma? "
    if "\n" in ",".join(record.values):
        return "an open quote? "
    found = [name for separator, name in _SEPARATORS.items() if record.text.count(separator) == len(columns) - 1 > 0]
    return f"{found[0]} instead of commas? " if found else ""
