"""A plan of any size drawn shard by shard, by as many processes as there are, with no word between them.

A shard is written whole or not at all, and its content follows from the plan and the settings alone, bit for bit on
devices of one class: so that processes may die, start again anywhere, and even draw the same shard, and every image is
there once.
"""

import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..data.sources import check_settings, other_settings
from ..dicom import encode_dicom
from ..provenance import complete, encode_png
from .draw import FILTER_COLUMNS, batch_size, call_arguments, describe, draw_all, load, settings_of, stored
from .options import GenerateOptions, ShardOptions
from .plan import Item
from .plan_table import TAKEN, Plan, difference, read_plan, setting_differences, write_plan
from .shortfall import entry_of
from .sinks import FORMATS, open_sink
from .storage import Storage
from .write import progress_bar, work_beside


PLAN = "plan.parquet"
RUN = "run.json"
MOST_SHARDS = 99_999  # whose names the Hub's libraries know


@dataclass
class Progress:
    """What came of a run: of this process's shards how many were there, were drawn, or are another process's now.

    Attributes:
        images: written by this process; `counts` has how many were accepted, and candidates drawn and left out.
        short: names of the files that list what fell short, of all shards that this process has come by.
    """

    there: int = 0
    drawn: int = 0
    others: int = 0
    images: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    short: list[str] = field(default_factory=list)

    def add(self, other: "Progress") -> None:
        """Counts what came of another part of the run, too."""
        for part in fields(self):
            setattr(self, part.name, getattr(self, part.name) + getattr(other, part.name))


@dataclass(frozen=True)
class Run:
    """What all shards of a run have in common.

    Attributes:
        settings: what images are drawn with.
        files: `batch_size`, `format` and `shard_size`; with plan and settings all that decides what the files hold.
        columns: of the rows, with their types as `datasets` names them.
    """

    pipe: Any
    plan: Plan
    storage: Storage
    options: GenerateOptions
    settings: dict[str, Any]
    files: dict[str, Any]
    columns: dict[str, str]

    @property
    def filtering(self) -> bool:
        return "score" in self.columns

    @property
    def count(self) -> int:
        """How many shards there are."""
        return -(-len(self.plan) // self.files["shard_size"])

    def rows(self, index: int) -> range:
        """Those of the plan that are in a shard."""
        return range(len(self.plan))[index * self.files["shard_size"] :][: self.files["shard_size"]]

    def name(self, index: int) -> str:
        """`data/train-00000-of-00123.parquet`: as on the Hub, so that `load_dataset` finds what is data here."""
        return f"data/train-{index:05d}-of-{self.count:05d}{FORMATS[self.files['format']][1]}"

    def short_name(self, index: int) -> str:
        """Of the file that lists what fell short in a shard."""
        return f"fell_short/{index:05d}-of-{self.count:05d}.jsonl"


def generate_shards(
    plan: Plan, output: str | Path, options: GenerateOptions | None = None, shards: ShardOptions | None = None
) -> Progress:
    """Draws the shards of a plan that are not there yet, or this process's share of them, into a folder or a URL.

    `plan.parquet` and `run.json` say what it is a run of, and `data/` has the shards. With `--accepted-only`,
    `fell_short/` lists what is missing in them.

    Args:
        plan: of `make_plan` or `read_plan`.
        output: a folder, made if missing, or a URL that fsspec knows.
        options: how to draw and to choose; by default as the embedded model has it.
        shards: the files' format and size, and which share of them is this process's. Under `accelerate launch` each
            process has a part of that.

    Raises:
        ValueError: the pipeline refuses its arguments, a prompt or a modality; the plan is one of another model or of
            other settings; `output` holds a run of another plan or of other settings.
        OSError: the disk is full, or the storage does not take what is sent there.
    """
    options, shards = options or GenerateOptions(), shards or ShardOptions()
    run, state = prepare(plan, output, options, shards)
    begin(run)
    part, parts = shards.part
    part, parts = part * state.num_processes + state.process_index, parts * state.num_processes
    return draw_shards(run, range(part, run.count, parts), options.quiet or not state.is_local_main_process)


def prepare(plan: Plan, output: str | Path, options: GenerateOptions, shards: ShardOptions) -> tuple[Run, Any]:
    """Loads the pipeline for a run, which is still to begin; also accelerate's `PartialState`. Raises as above."""
    storage = Storage(output)
    pipe, state, filtering = load(options)
    prompts, modalities = plan.distinct()
    pipe.resolve_prompts(prompts, modalities, len(prompts))
    settings = settings_of(pipe, options, filtering)
    if differing := setting_differences(plan.settings, settings):
        raise ValueError(f"the plan is one of other settings ({'; '.join(differing)}): make another one.")
    # The same images in other batches differ in their last bits.
    files = {"batch_size": batch_size(pipe, options), "format": shards.format, "shard_size": shards.size}
    run = Run(pipe, plan, storage, options, settings, files, _columns(pipe, plan, settings, filtering))
    if shards.native_dicom:
        files["native_dicom"] = True
    if run.count > MOST_SHARDS:
        least = -(-len(plan) // MOST_SHARDS)
        raise ValueError(f"--shard-size has to be at least {least} for {len(plan)} images, got {shards.size}.")
    return run, state


def begin(run: Run) -> None:
    """Writes what it is a run of, or finds the same there; raises ValueError for another."""
    settings, storage = json.loads(json.dumps(run.settings)), run.storage
    if storage.exists("data.csv"):
        raise ValueError(f"{storage.root} holds data.csv, and so no run in shards: choose another folder.")
    if (there := storage.read(RUN)) is not None:
        check_settings(storage.root, json.loads(there), settings | run.files)
    else:
        storage.write(RUN, (json.dumps(settings | run.files, indent=2) + "\n").encode())
    if (there := storage.read(PLAN)) is not None:
        if differing := difference(read_plan(io.BytesIO(there), name=f"{storage.root}/{PLAN}"), run.plan):
            raise other_settings(storage.root, f"another plan: {differing}")
    else:
        file = io.BytesIO()
        write_plan(Plan(run.plan.table, settings), file)
        storage.write(PLAN, file.getvalue())


def draw_shards(run: Run, indices: range, quiet: bool) -> Progress:
    """Draws those of the shards `indices` that are not there and that no other process is drawing now."""
    result = Progress()
    with progress_bar(sum(len(run.rows(index)) for index in indices), quiet) as bar:
        for index in indices:
            before = bar.n
            with run.storage.only_here(run.name(index)) as free:
                if not free:
                    result.others += 1
                elif is_done(run, index):
                    result.there += 1
                else:
                    draw_shard(run, index, bar, result)
                    result.drawn += 1
            if run.options.accepted_only and run.storage.read(run.short_name(index)):
                result.short.append(run.short_name(index))
            bar.update(before + len(run.rows(index)) - bar.n)
    return result


def is_done(run: Run, index: int) -> bool:
    """Whether the shard is there, and nothing fell short in it that more rounds might find."""
    if not run.storage.exists(run.name(index)):
        return False
    short = run.storage.read(run.short_name(index)) if run.options.accepted_only else None
    return all(json.loads(line)["rounds"] >= run.options.rounds for line in (short or b"").decode().splitlines())


def draw_shard(run: Run, index: int, bar: tqdm, result: Progress) -> None:
    """Draws a shard and writes it, whole or not at all."""
    (ending, of_shard), digits = FORMATS[run.files["format"]], run.plan.digits
    items, short = run.plan.items(run.rows(index).start, run.rows(index).stop), list[dict]()
    # A grey image takes a third of a byte a pixel: a disk that is too small is told of before they are drawn.
    size = len(items) * run.settings["height"] * run.settings["width"] // 4
    with run.storage.shard(run.name(index), folder=not of_shard, size=size) as place:
        with open_sink(run.files["format"], place, run.columns) as sink:

            def add(item: Item, image: bytes, row: dict, metadata: dict) -> None:
                sink.add(f"{item.index:0{digits}d}{ending}", image, row, complete(metadata))
                result.images += 1
                result.counts += _counts(row)

            work_beside(_encoded, _drawn(run, items, bar, short), add)
        _write_short(run, index, short)
    for entry in short:
        result.counts["candidates"] += entry["candidates"]
        result.counts += {f"rejected_{reason}": count for reason, count in entry["rejected"].items()}


def _drawn(run: Run, items: list[Item], bar: tqdm, short: list[dict]) -> Iterator[tuple]:
    arguments = call_arguments(run.pipe, run.options, run.filtering)
    for item, output, i in draw_all(run.pipe, items, run.files["batch_size"], bar, **arguments):
        if run.options.accepted_only and not output.accepted[i]:
            short.append(entry_of(item, run.options.rounds, output.candidates[i], output.rejected[i]))
            continue
        told, metadata = describe(item, output, i, run.settings)
        told |= {"id": item.index, "caption": item.text}
        if "accepted" in told:
            told["accepted"] = told["accepted"] == "true"
        row = {name: told[name] for name in run.columns if told.get(name) not in ("", None)}
        yield item, output.images[i], row, metadata, run.files


def _encoded(item: Item, image, row: dict, metadata: dict, files: dict) -> tuple[Item, bytes, dict, dict]:
    image = stored(image, item)
    if files["format"] == "dicom":
        number = (item.index + 1) % 2**31  # more is none in DICOM
        encoded = encode_dicom(image, metadata, number, native="native_dicom" in files)
    else:
        encoded = encode_png(image, metadata)
    return item, encoded, row, metadata


def _columns(pipe, plan: Plan, settings: dict, filtering: bool) -> dict[str, str]:
    columns = {"id": "int64", "caption": "string", "modality": "string", "seed": "int64"}
    if filtering:
        counts = [*FILTER_COLUMNS[2:], *["rejected_realism"] * ("realism" in pipe.reject_reasons)]
        columns |= {"score": "float32", "accepted": "bool"} | dict.fromkeys(counts, "int64")
    # A column that is named as what is said of an image here speaks of another one.
    carried = [name for name in plan.carried if name not in TAKEN | {"synthetic", *columns, *settings}]
    return columns | dict.fromkeys(carried, "string")


def _counts(row: dict) -> Counter[str]:
    names = [name for name in row if name in ("accepted", "candidates") or name.startswith("rejected_")]
    return Counter({name: int(row[name]) for name in names})


def _write_short(run: Run, index: int, short: list[dict]) -> None:
    """Notes what fell short in a shard that is about to take its place.

    One that was there with fewer images goes first: else, were the process to die now, it would stay and be taken for
    the new one.
    """
    if short or run.storage.exists(run.short_name(index)):
        run.storage.remove(run.name(index))
        lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in short)
        run.storage.write(run.short_name(index), "".join(lines).encode())
