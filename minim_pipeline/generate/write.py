"""A plan of images drawn into a folder, in batches, with provenance, and gone on with where it was stopped.

torch and diffusers are imported by `generate` only, after everything that can be checked without them has been.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..data.sources import DatasetWriter, other_settings
from ..loading import load_pipeline, lora_identity, model_identity, unet_identity
from ..locking import locked
from ..provenance import save_png
from .options import GenerateOptions
from .plan import Item
from .shortfall import Shortfall


GRID_IMAGES = 64  # a grid shows so many at most
# Of data.csv, after path, Text, modality and seed.
COLUMNS = ("synthetic", "model", "revision", "steps", "guidance", "scheduler", "negative_prompt", "lora")
# Why a candidate of the filter does not come back: as `minim_filter.funnel` has them, without importing torch.
REASONS = ("quality", "finding", "copy", "realism")
# After those, where a filter ran; `drawn_seed` is that of the candidate that came back.
FILTER_COLUMNS = ("score", "accepted", "candidates", "drawn_seed", *(f"rejected_{name}" for name in REASONS[:3]))


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
    from accelerate import PartialState

    state = PartialState(cpu=options.device == "cpu")
    device = str(state.device) if state.num_processes > 1 else options.device
    pipe = load_pipeline(options.model, options.scheduler, options.lora, device, options.dtype, options.unet)
    filtering = pipe.filter_head is not None and not options.no_filter
    if options.steering and not filtering:
        raise ValueError(f"{', '.join(options.steering)}: {options.model} has no filter to choose with.")
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


def settings_of(pipe, options: GenerateOptions, filtering: bool) -> dict[str, object]:
    """With the prompt, the modality and the seed all that it takes to draw an image again."""
    name, revision = model_identity(options.model)
    config, size = pipe.config, pipe.learned_size
    settings = {
        "model": name,
        "revision": revision,
        "steps": options.num_inference_steps or config.num_inference_steps,
        "guidance": config.guidance_scale if options.guidance_scale is None else options.guidance_scale,
        "guidance_rescale": config.guidance_rescale,
        "guidance_interval": list(config.guidance_interval),
        "scheduler": type(pipe.scheduler).__name__,
        "negative_prompt": options.negative_prompt,
        "lora": options.lora and lora_identity(options.lora),
        "dtype": options.dtype,
        "height": options.height or size[0],
        "width": options.width or size[1],
    }
    if options.unet is not None:
        settings["unet"] = unet_identity(options.unet)
    if not config.modalities:
        # Whoever reads the files has to know that the modality was asked for and not learned.
        settings["modality_learned"] = "false"
    if not filtering:
        return settings
    arguments = call_arguments(pipe, options, filtering)
    settings |= {name: arguments[name] for name in ("num_candidates", "max_rounds", "filter_threshold")}
    settings["keep_copies"] = options.keep_copies
    if options.accepted_only:
        if settings["num_candidates"] == 1 and options.rounds == 1:
            one = "accepted_only draws one candidate a round here, and goes on in others"
            raise ValueError(f"{one}: max_rounds has to be at least 2, got 1.")
        # An accepted image is the same whatever the bound, which may be raised to go on.
        del settings["max_rounds"]
        settings["accepted_only"] = True
    return settings


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
    batch_size = options.batch_size or (4 if pipe.device.type == "cpu" else 8)
    arguments = call_arguments(pipe, options, filtering)
    bar = tqdm(
        total=len(share),
        disable=options.quiet or not share or not state.is_local_main_process,
        bar_format="{percentage:3.0f}% |{bar}| {n:.1f}/{total:.0f} images [{elapsed}<{remaining}]",
    )
    with bar, logging_redirect_tqdm():  # the pipeline's warnings, on lines of their own
        for start in range(0, len(share), batch_size):
            batch = share[start : start + batch_size]

            def progress(done: float, start: int = start, size: int = len(batch)) -> None:
                bar.update(start + done * size - bar.n)

            output = draw(pipe, batch, progress, **arguments)
            for i, item in enumerate(batch):
                if options.accepted_only and not output.accepted[i]:
                    short.add(item, options.rounds, output.candidates[i], output.rejected[i])
                else:
                    writer.add(item.index, output.images[i], *describe(item, output, i, writer.settings))

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


def call_arguments(pipe, options: GenerateOptions, filtering: bool) -> dict[str, object]:
    """What `options` say, as arguments of a call of the pipeline."""
    names = ("num_inference_steps", "guidance_scale", "negative_prompt", "height", "width")
    arguments = {name: getattr(options, name) for name in names} | {"use_filter": filtering}
    if filtering:
        arguments |= {"num_candidates": options.num_candidates or pipe.config.num_candidates}
        arguments |= {"max_rounds": options.rounds, "filter_threshold": options.filter_threshold}
        arguments |= {"reject_copies": not options.keep_copies}
    return arguments


def draw(pipe, batch: Sequence[Item], progress: Callable[[float], object], **arguments):
    """What the pipeline gives for `batch`, each from a generator of its own; `progress` is told the share of steps.

    Raises ValueError as the pipeline does, and if the images do not fit into memory.
    """
    import torch

    def on_step_end(pipe, step, timestep, tensors):
        progress((step + 1) / pipe.num_timesteps)
        return tensors

    try:
        return pipe(
            [item.text for item in batch],
            modality=[item.modality.id for item in batch],
            generator=[torch.Generator("cpu").manual_seed(item.seed) for item in batch],
            callback_on_step_end=on_step_end,
            **arguments,
        )
    except RuntimeError as error:
        if "out of memory" not in str(error) and "allocate memory" not in str(error):
            raise
        height, width = pipe.learned_size
        size = f"{arguments.get('width') or width} x {arguments.get('height') or height}"
        what = f"{len(batch)} images of {size} px at once do not fit into the memory of {str(pipe.device)!r}"
        raise ValueError(f"{what}: choose a smaller batch size, height or width.") from error


def describe(item: Item, output, i: int, settings: dict[str, object]) -> tuple[dict, dict]:
    """What `data.csv` and the file itself say of image `i` of a `MinimPipelineOutput`: a row, and provenance."""
    # Empty rather than absent: a column of that name in the CSV of prompts speaks of another image.
    made = {key: "" if value is None else value for key, value in settings.items()}
    row = item.extra | {"synthetic": "true"} | made
    row |= {"Text": item.text, "modality": item.modality.name, "seed": item.seed}
    metadata = settings | {"modality": item.modality.id, "prompt": item.text, "seed": output.seeds[i]}
    if output.scores[i] is not None:
        rated = {"score": round(output.scores[i], 4), "accepted": str(output.accepted[i]).lower()}
        metadata |= rated
        row |= rated | {"candidates": output.candidates[i], "drawn_seed": output.seeds[i]}
        row |= {f"rejected_{reason}": count for reason, count in output.rejected[i].items()}
    return row, metadata


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
