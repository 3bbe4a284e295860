"""Files that appear whole or not at all."""

import csv
import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


# Of the system's errors those for want of room: a full disk, a quota, a limit on the size of files.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

SCHEMA_VERSION = 1  # of reports: another where a key changes its name or its meaning


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, which takes its place at the end, or is removed if anything fails.

    Raises OSError, with where and how much is free, if the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException as error:  # Ctrl-C too
        if isinstance(error, OSError) and error.errno in FULL:
            free = shutil.disk_usage(path.parent).free / 1e6
            temporary.unlink(missing_ok=True)
            raise OSError(error.errno, f"No room on the disk: {free:.1f} MB free", str(path.absolute())) from error
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Writes the file whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Writes figures, and first the version of their keys; these are snake_case, but for names from the data."""
    write_json(path, {"schema_version": SCHEMA_VERSION} | report)


def read_report(path: str | Path) -> dict[str, Any]:
    """What `write_report` was given.

    Raises:
        ValueError: the file is no report, or one of another version.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no report: {error}.") from error
    found = report.pop("schema_version", None) if isinstance(report, dict) else None
    if found != SCHEMA_VERSION:
        raise ValueError(f"{path} is no report of this package: its schema_version is {found}, not {SCHEMA_VERSION}.")
    return report


def write_csv(path: Path, rows: Iterable[Mapping], columns: Sequence[str] | None = None, end: str = "\r\n") -> None:
    """Writes rows whole or not at all; without `columns` those of all rows, which need not have the same."""
    rows = list(rows)
    columns = columns or list(dict.fromkeys(name for row in rows for name in row))
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator=end)
        writer.writeheader()
        writer.writerows(rows)
