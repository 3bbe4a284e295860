"""A plan of images drawn into a folder, in batches, with provenance, and gone on with where it was stopped.

torch and diffusers are imported by `generate` only, after everything that can be checked without them has been.
"""

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..data.sources import DatasetWriter, other_settings
from ..locking import locked
from ..provenance import save_png
from .draw import COLUMNS, FILTER_COLUMNS, batch_size, call_arguments, describe, draw_all, load, settings_of, stored
from .options import GenerateOptions
from .plan import Item
from .shortfall import Shortfall


GRID_IMAGES = 64  # a grid shows so many at most


def generate(items: Sequence[Item], output_dir: str | Path, options: GenerateOptions | None = None) -> int:
    """Draws the images of a plan into a folder: `NNNN.png`, `data.csv` in MINIM's format, `grid.png`, `run.json`.

    An image depends on its own seed only, whatever the batch and the number of processes. Images that the folder holds
    already are not drawn again. Under `accelerate launch` each process draws its share.

    Args:
        items: what to draw, see `plan_prompt` and `plan_file`.
        output_dir: made if missing; left as it was if nothing is drawn.
        options: by default those of the embedded model.

    Returns:
        How many images this process has drawn.

    Raises:
        ValueError: there is nothing to draw, the pipeline refuses its arguments, the images do not fit into memory,
            the folder holds a run of other settings, or another run is writing to it.
    """
    if not items:
        raise ValueError("there is nothing to draw: the plan has no images.")
    options = options or GenerateOptions()
    pipe, state, filtering = load(options)
    # All of them before the first is drawn: an error in the last line of a long list is found now.
    pipe.resolve_prompts([item.text for item in items], [item.modality.id for item in items], len(items))
    settings = settings_of(pipe, options, filtering)
    columns = [*COLUMNS, *(name for name in ("unet", "modality_learned") if name in settings)]
    columns += FILTER_COLUMNS * filtering
    columns += ["rejected_realism"] * (filtering and "realism" in pipe.reject_reasons)
    columns += [column for item in items for column in item.extra]
    with locked(output_dir, state):
        part = state.process_index if state.num_processes > 1 else None
        writer = DatasetWriter(output_dir, columns, settings, part, count=len(items))
        check_rows(writer, items)
        return draw_missing(pipe, items, writer, state, options, filtering)


def draw_missing(
    pipe, items: Sequence[Item], writer: DatasetWriter, state, options: GenerateOptions, filtering: bool
) -> int:
    """Draws this process's share of what `writer` has not found in its folder, and returns how many images that is."""
    short = Shortfall(writer.output_dir)
    missing = [item for item in items if writer.name(item.index) not in writer.rows]
    if options.accepted_only:
        missing = [item for item in missing if not short.holds(item, options.rounds)]
    state.wait_for_everyone()  # all have read what is there before any of them adds to it

    share = missing[state.process_index :: state.num_processes]
    arguments = call_arguments(pipe, options, filtering)

    def drawn(bar: tqdm) -> Iterator[tuple]:
        for item, output, i in draw_all(pipe, share, batch_size(pipe, options), bar, **arguments):
            if options.accepted_only and not output.accepted[i]:
                short.add(item, options.rounds, output.candidates[i], output.rejected[i])
            else:
                row, metadata = describe(item, output, i, writer.settings)
                yield item, output.images[i], row, metadata

    def write(item: Item, image: Image.Image, row: dict, metadata: dict) -> None:
        writer.add(item.index, stored(image, item), row, metadata)

    with progress_bar(len(share), options.quiet or not state.is_local_main_process) as bar:
        work_beside(write, drawn(bar))

    state.wait_for_everyone()
    if state.is_main_process:
        writer.finish()
        written = [item for item in items if (writer.output_dir / writer.name(item.index)).is_file()]
        if options.accepted_only:
            short.finish(items, {item.index for item in written}, options.rounds)
        if written:
            save_grid(writer, written)
    state.wait_for_everyone()
    return len(share)


@contextmanager
def progress_bar(total: int, disable: bool) -> Iterator[tqdm]:
    """A bar of images; meanwhile the pipeline's warnings are on lines of their own."""
    form = "{percentage:3.0f}% |{bar}| {n:.1f}/{total:.0f} images [{elapsed}<{remaining}]"
    with tqdm(total=total, disable=disable or not total, bar_format=form) as bar, logging_redirect_tqdm():
        yield bar


def work_beside(work: Callable, jobs: Iterable[tuple], then: Callable[..., None] | None = None) -> None:
    """Calls `work` with each of `jobs`, and `then` with what that gives, in their order, while the next are drawn.

    Pillow and zlib free the interpreter, so that files are encoded beside a GPU, which they would slow down else;
    `then` runs in one more thread. If making `jobs` fails, those that there are already are done all the same.
    """
    threads = min(os.cpu_count() or 1, 16)
    waiting: deque[Future] = deque()
    with ThreadPoolExecutor(threads) as pool, ThreadPoolExecutor(1) as last:
        for job in jobs:
            made = pool.submit(work, *job)
            waiting.append(last.submit(_pass_on, made, then) if then else made)
            while waiting and (waiting[0].done() or len(waiting) > 8 * threads):
                waiting.popleft().result()
        while waiting:
            waiting.popleft().result()


def _pass_on(made: Future, then: Callable[..., None]) -> None:
    then(*made.result())


def check_rows(writer: DatasetWriter, items: Sequence[Item]) -> None:
    """Raises ValueError if an image that `writer` found in its folder is another than the plan says."""
    for item in items:
        row = writer.rows.get(writer.name(item.index))
        if row is None:
            continue
        planned = {"Text": item.text, "modality": item.modality.name, "seed": str(item.seed)}.items()
        differing = [f"{key}: {row[key]!r} there, {value!r} now" for key, value in planned if row[key] != value]
        if differing:
            raise other_settings(writer.output_dir, f"{row['path']} has {'; '.join(differing)}")


def save_grid(writer: DatasetWriter, items: Sequence[Item]) -> None:
    """Writes `grid.png`: the first `GRID_IMAGES` images side by side, row after row, with their provenance."""
    from ..contact_sheet import contact_sheet

    items = items[:GRID_IMAGES]
    images = [Image.open(writer.output_dir / writer.name(item.index)) for item in items]
    grid = contact_sheet(images, columns=math.ceil(math.sqrt(len(images))))
    metadata = {
        "modality": ", ".join(dict.fromkeys(item.modality.id for item in items)),
        "prompt": " | ".join(dict.fromkeys(item.text for item in items)),
        "seeds": ", ".join(str(item.seed) for item in items),
    }
    save_png(grid, writer.output_dir / "grid.png", writer.settings | metadata)
