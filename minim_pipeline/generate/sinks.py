"""A shard of images in a format that others read: folders of PNG or DICOM files, Parquet, WebDataset.

Of every image there is a row, with the same columns in all of them, and in the image itself its provenance.
"""

import csv
import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .storage import TABLE


# How an image's file ends, and how a shard; a shard without an ending is a folder.
FORMATS = {"png": (".png", ""), "parquet": (".png", ".parquet"), "webdataset": (".png", ".tar"), "dicom": (".dcm", "")}
ROW_GROUP = 100  # images: what the Hub's viewer reads at once

Row = Mapping[str, Any]


class FolderSink:
    """`0000007.png` and the like, and `metadata.csv` as Hugging Face's `imagefolder` has it: `file_name` first.

    Args:
        folder: where to; it has to exist.
        columns: of the rows, and their types as `datasets` names them: `string`, `int64`, `float32`, `bool`.
    """

    def __init__(self, folder: Path, columns: Mapping[str, str]):
        self.folder, self.columns, self.rows = folder, columns, list[dict]()

    def add(self, name: str, image: bytes, row: Row, provenance: Row) -> None:
        """Writes the file `name` and notes its row. `provenance` stands in the image already."""
        (self.folder / name).write_bytes(image)
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()}
        self.rows.append({"file_name": name} | texts)

    def close(self) -> None:
        for name in self.columns:
            if self.rows and not any(row.get(name) for row in self.rows):
                # pandas, and so `imagefolder`, takes a column that is empty here and nowhere else for one of numbers.
                self.rows[0][name] = " "
        with open(self.folder / TABLE, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["file_name", *self.columns], restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)


class ParquetSink:
    """Columns `image` (struct of `bytes` and `path`), those of the rows, and `provenance`, JSON.

    What the schema says to `datasets` makes images of the first. Arguments as of `FolderSink`; `file` is a path.
    """

    def __init__(self, file: Path, columns: Mapping[str, str]):
        import pyarrow as pa
        from pyarrow import parquet

        kinds = {"string": pa.string(), "int64": pa.int64(), "float32": pa.float32(), "bool": pa.bool_()}
        columns = {**columns, "provenance": "string"}
        picture = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        features = {name: {"dtype": kind, "_type": "Value"} for name, kind in columns.items()}
        told = {"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}} | features}})}
        fields = [("image", picture), *((name, kinds[kind]) for name, kind in columns.items())]
        self.schema, self.rows = pa.schema(fields, told), list[dict]()
        self.file = open(file, "wb")  # noqa: SIM115  by Python, whose errors say what the system said
        self.writer = parquet.ParquetWriter(self.file, self.schema, use_dictionary=list(columns))

    def add(self, name: str, image: bytes, row: Row, provenance: Row) -> None:
        told = json.dumps(dict(provenance), ensure_ascii=False)
        self.rows.append({"image": {"bytes": image, "path": name}, **row, "provenance": told})
        if len(self.rows) == ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        self.writer.write_table(pa.Table.from_pylist(self.rows, self.schema))
        self.rows.clear()

    def close(self) -> None:
        if self.rows:
            self._flush()
        self.writer.close()
        self.file.close()


class TarSink:
    """WebDataset: of each image `NNNN.png`, `NNNN.txt`, its caption, and `NNNN.json`, its row with `provenance`.

    Arguments as of `FolderSink`; `file` is a path.
    """

    def __init__(self, file: Path, columns: Mapping[str, str]):
        self.columns, self.tar = columns, tarfile.open(file, "w")  # noqa: SIM115

    def add(self, name: str, image: bytes, row: Row, provenance: Row) -> None:
        # Every key in every sample: what is not known is null, as in Parquet.
        told = {name: row.get(name) for name in self.columns} | {"provenance": dict(provenance)}
        key, _, ending = name.partition(".")
        self._file(f"{key}.json", json.dumps(told, ensure_ascii=False).encode())
        self._file(f"{key}.{ending}", image)
        self._file(f"{key}.txt", row["caption"].encode())

    def _file(self, name: str, content: bytes) -> None:
        member = tarfile.TarInfo(name)  # with neither owner nor time: the same shard has the same bytes
        member.size = len(content)
        self.tar.addfile(member, io.BytesIO(content))

    def close(self) -> None:
        self.tar.close()


@contextmanager
def open_sink(format: str, place: Path, columns: Mapping[str, str]) -> Iterator[FolderSink | ParquetSink | TarSink]:
    """The sink of a format, one of `FORMATS`, which writes a shard to `place` and is closed at the end."""
    kinds: dict[str, type[FolderSink | ParquetSink | TarSink]] = {"parquet": ParquetSink, "webdataset": TarSink}
    sink = kinds.get(format, FolderSink)(place, columns)
    try:
        yield sink
    except BaseException:
        with suppress(Exception):  # on a full disk closing fails, too
            sink.close()
        raise
    sink.close()
