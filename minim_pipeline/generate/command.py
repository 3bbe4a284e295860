"""What `minim generate` does: a plan of images, drawn in batches, written with provenance, resumed where stopped.

torch and diffusers are imported by `generate` only, after everything that can be checked without them has been.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from .. import EMBEDDED_CHECKPOINT
from ..data.sources import DatasetWriter, read_csv, read_json
from ..loading import load_with_unet, unet_folder, unet_identity
from ..locking import locked
from ..modalities import Modality, register_definitions, resolve_modality
from ..provenance import save_png
from .shortfall import MAX_ROUNDS, Shortfall


# Names on the command line, and diffusers' classes.
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
}
GRID_IMAGES = 64  # a grid shows so many at most
# Of data.csv, after path, Text, modality and seed.
COLUMNS = ("synthetic", "model", "revision", "steps", "guidance", "scheduler", "negative_prompt", "lora")
# Why a candidate of the filter does not come back: as `minim_filter.funnel` has them, without importing torch.
REASONS = ("quality", "finding", "copy")
# After those, where a filter ran; `drawn_seed` is that of the candidate that came back.
FILTER_COLUMNS = ("score", "accepted", "candidates", "drawn_seed", *(f"rejected_{name}" for name in REASONS))
DTYPES = ("float32", "float16", "bfloat16")
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Item:
    """One image to draw: its number in the folder, what it shows, its seed, and columns to carry through."""

    index: int
    text: str
    modality: Modality
    seed: int
    extra: dict[str, str] = field(default_factory=dict)


def plan_prompt(text: str, modality: Modality, num_images: int, seed: int) -> list[Item]:
    """`num_images` images of one prompt; image i has seed `seed + i`."""
    _check_seeds(seed, num_images)
    return [Item(i, text, modality, seed + i) for i in range(num_images)]


def plan_file(
    path: str | Path,
    num_images: int,
    seed: int,
    trained: Sequence[str] | None = None,
    skip_bad_rows: bool = False,
    modality: str | None = None,
) -> list[Item]:
    """The images that a CSV of prompts asks for, in the order of its rows.

    Columns: `Text,modality`; optional `num_images` (default: the argument) and `seed`. Image i of a row has the row's
    seed + i; without one, `seed` + the image's number in the whole run, so that no two rows share seeds. Other columns
    are carried through; `path`, which names the generated image there, as `source_path`. `modality` is that of all
    rows, where there is no such column.

    Raises:
        ValueError: as `read_csv`; for it a row is bad, too, if its modality is not among `trained`, or `num_images`
            or `seed` is no number or out of range.
    """

    def number_of(row: dict[str, str]) -> int:
        return _whole_number("num_images", row.get("num_images") or num_images, 1)

    def check(row: dict[str, str]) -> None:
        resolve_modality(row["modality"], trained)
        _check_seeds(_whole_number("seed", row.get("seed") or seed, 0), number_of(row))

    items = []
    options = {"require": ("Text", "modality"), "check_images": False, "check": check, "modality": modality}
    for row in read_csv(path, skip_bad_rows=skip_bad_rows, **options):
        count = number_of(row)
        first = int(row.get("seed") or seed + len(items))
        known = ("Text", "modality", "num_images", "seed", "path")
        extra = {name: value for name, value in row.items() if name not in known}
        if row.get("path"):
            extra["source_path"] = row["path"]
        kind = resolve_modality(row["modality"], trained)
        items += [Item(len(items) + i, row["Text"], kind, first + i, extra) for i in range(count)]
    _check_seeds(seed, len(items))
    return items


def _check_seeds(first: int, count: int) -> None:
    if first + count - 1 > MAX_SEED:
        raise ValueError(f"seed has to be at most {MAX_SEED} for the last image too, got {first} for {count} images.")


def _whole_number(name: str, value: str | int, least: int) -> int:
    try:
        number = int(value)
    except ValueError:
        number = None
    if number is None or not least <= number <= MAX_SEED:
        raise ValueError(f"{name} has to be a whole number from {least}, got {value!r}.")
    return number


def read_model_index(model: str) -> dict:
    """The `model_index.json` of a pipeline: which modalities and findings it has learned, among others.

    Args:
        model: a folder, or an id on the Hub.

    Raises:
        ValueError: neither of them holds a pipeline, or the Hub cannot be reached.
    """
    file = Path(model) / "model_index.json"
    if Path(model) == EMBEDDED_CHECKPOINT and not file.is_file():
        raise ValueError(f"the embedded model is missing ({file}): name another one with --model.")
    if not file.is_file():
        if Path(model).exists() or Path(model).is_absolute():
            if unet_folder(model):
                raise ValueError(
                    f"{model!r} holds a U-Net alone, as MINIM's training leaves it in checkpoint/unet. Name the Stable"
                    f" Diffusion that it was trained from, too: minim generate --model BASE --unet {model} (the prompt"
                    " is then the bare caption, as in that training), or train_text_to_image.py"
                    f" --pretrained_model_name_or_path BASE --unet {model}."
                )
            raise ValueError(f"{model!r} is no model: it holds no model_index.json.")
        from huggingface_hub import hf_hub_download

        try:
            file = Path(hf_hub_download(model, "model_index.json"))
        except (OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"{model!r} is neither a folder nor a model that the Hub gives: {reason}") from error
    index = read_json(file)
    if isinstance(index.get("modalities"), str):
        index["modalities"] = index["modalities"].split()
    return index


def register_modalities(model: str) -> dict:
    """Registers the modalities that a pipeline defines, so that rows of them are read; returns its index.

    Args, errors: as `read_model_index`.
    """
    index = read_model_index(model)
    register_definitions(index.get("custom_modalities") or {})
    return index


def model_identity(model: str) -> tuple[str, str]:
    """The name and the revision that provenance gives of `model`.

    On the Hub: its id and its commit. A folder: its name (never its path, which may tell of people), and a digest of
    the files of its components.
    """
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        return model, Path(try_to_load_from_cache(model, "model_index.json")).parent.name
    components = [name for name, value in read_model_index(model).items() if isinstance(value, list)]
    files = [folder / "model_index.json", *(file for name in components for file in (folder / name).glob("*"))]
    return folder.resolve().name, _digest(file for file in files if file.is_file())


def _digest(files: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for path in sorted(files):
        with open(path, "rb") as file:
            total.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return f"sha256-{total.hexdigest()[:16]}"


def _lora_identity(lora: str) -> str:
    path = Path(lora)
    if not path.exists():
        return lora
    weights = [path] if path.is_file() else path.glob("*.safetensors")
    # PEFT's own adapters have their weight in a file beside.
    beside = (path.parent if path.is_file() else path).glob("adapter_config.json")
    return f"{path.name} {_digest([*weights, *beside])}"


def generate(
    items: Sequence[Item],
    output_dir: str | Path,
    model: str = str(EMBEDDED_CHECKPOINT),
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    height: int | None = None,
    width: int | None = None,
    scheduler: str | None = None,
    lora: str | None = None,
    device: str | None = None,
    dtype: str = "float32",
    batch_size: int | None = None,
    no_filter: bool = False,
    num_candidates: int | None = None,
    filter_threshold: float | None = None,
    max_rounds: int | None = None,
    accepted_only: bool = False,
    keep_copies: bool = False,
    quiet: bool = False,
    unet: str | Path | None = None,
) -> int:
    """Draws the images of a plan into a folder: `NNNN.png`, `data.csv` in MINIM's format, `grid.png`, `run.json`.

    An image depends on its own seed only, whatever the batch and the number of processes. Images that the folder holds
    already are not drawn again. Under `accelerate launch` each process draws its share. One run at a time has the
    folder (`locking.locked`).

    Args:
        items: what to draw, see `plan_prompt` and `plan_file`.
        output_dir: made if missing; left as it was if nothing is drawn.
        model: a folder or an id on the Hub; by default the embedded model.
        num_inference_steps, guidance_scale, negative_prompt, height, width: as of `MinimPipeline`; `None` takes the
            model's own.
        scheduler: a key of `SCHEDULERS`; `None` keeps the model's.
        lora: a file, folder or Hub id of LoRA weights.
        device: e.g. `"cuda"`; by default a GPU if there is one.
        dtype: `"float32"`, `"float16"` or `"bfloat16"`.
        batch_size: images drawn together; by default 4 on a CPU, 8 elsewhere.
        no_filter: leave the model's filter out. Otherwise it chooses among `num_candidates` for each image, draws what
            falls short again in up to `max_rounds` rounds, and `data.csv` gets `FILTER_COLUMNS`. An image that was not
            accepted is written too, and says so.
        num_candidates, filter_threshold, max_rounds: as of `MinimPipeline`.
        accepted_only: write accepted images alone, drawn in up to `max_rounds` rounds (default 16). What falls short
            is in `fell_short.jsonl`, and drawn again where `max_rounds` is larger than it was.
        keep_copies: let the filter accept copies of the model's training images.
        quiet: no progress bar.
        unet: folder of a U-Net to draw with instead of the model's own. If the model names no modalities it has
            learned, prompts are then read as they stand: MINIM's training reads the caption alone.

    Returns:
        How many images this process has drawn.

    Raises:
        ValueError: there is nothing to draw, the pipeline refuses its arguments, the images do not fit into memory,
            the folder holds a run of other settings, or another run is writing to it.
    """
    if not items:
        raise ValueError("there is nothing to draw: the plan has no images.")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size has to be at least 1, got {batch_size}.")
    max_rounds = max_rounds or (MAX_ROUNDS if accepted_only else 1)
    choice = {"accepted_only": accepted_only or None}
    choice |= {"num_candidates": num_candidates, "filter_threshold": filter_threshold}
    choice |= {"max_rounds": max_rounds if max_rounds > 1 else None, "keep_copies": keep_copies or None}
    choice = {key: value for key, value in choice.items() if value is not None}
    if no_filter and choice:
        raise ValueError(f"{', '.join(choice)} would steer the filter, but no_filter leaves it out.")
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu")
    if state.num_processes > 1:
        device = str(state.device)
    pipe = load_pipeline(model, scheduler, lora, device, dtype, unet)
    filtering = pipe.filter_head is not None and not no_filter
    if choice and not filtering:
        raise ValueError(f"{', '.join(choice)}: {model} has no filter to choose with.")
    # All of them before the first is drawn: an error in the last line of a long list is found now.
    pipe.resolve_prompts([item.text for item in items], [item.modality.id for item in items], len(items))

    name, revision = model_identity(model)
    # With the prompt, the modality and the seed all that it takes to draw an image again.
    settings = {
        "model": name,
        "revision": revision,
        "steps": num_inference_steps or pipe.config.num_inference_steps,
        "guidance": pipe.config.guidance_scale if guidance_scale is None else guidance_scale,
        "guidance_rescale": pipe.config.guidance_rescale,
        "guidance_interval": list(pipe.config.guidance_interval),
        "scheduler": type(pipe.scheduler).__name__,
        "negative_prompt": negative_prompt,
        "lora": lora and _lora_identity(lora),
        "dtype": dtype,
        "height": pipe.learned_size[0] if height is None else height,
        "width": pipe.learned_size[1] if width is None else width,
    }
    if unet is not None:
        settings["unet"] = unet_identity(unet)
    if not pipe.config.modalities:
        # Whoever reads the files has to know that the modality was asked for and not learned.
        settings["modality_learned"] = "false"
    if filtering:
        defaults = {"num_candidates": pipe.config.num_candidates, "max_rounds": 1, "filter_threshold": None}
        settings |= defaults | {"keep_copies": False} | choice
        if choice.pop("accepted_only", False):
            if settings["num_candidates"] == 1 and max_rounds == 1:
                raise ValueError(
                    "accepted_only draws one candidate a round here, and goes on in others: max_rounds has to be at"
                    " least 2, got 1."
                )
            # An accepted image is the same whatever the bound, which may be raised to go on.
            del settings["max_rounds"]
        reject_copies = not choice.pop("keep_copies", False)
        choice = defaults | choice | {"reject_copies": reject_copies}
    columns = dict.fromkeys(
        [
            *COLUMNS,
            *(name for name in ("unet", "modality_learned") if name in settings),
            *FILTER_COLUMNS * filtering,
            *(column for item in items for column in item.extra),
        ]
    )
    options = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    options |= {"negative_prompt": negative_prompt, "height": height, "width": width, "use_filter": filtering} | choice
    with locked(output_dir, state):
        part = state.process_index if state.num_processes > 1 else None
        writer = DatasetWriter(output_dir, columns, settings, part, count=len(items))
        return draw_missing(pipe, items, writer, state, options, accepted_only, batch_size, quiet)


def draw_missing(
    pipe,
    items: Sequence[Item],
    writer: DatasetWriter,
    state,
    options: dict[str, object],
    accepted_only: bool = False,
    batch_size: int | None = None,
    quiet: bool = False,
) -> int:
    """Draws what `writer` has not found in its folder with the `options` of a call; the rest is as of `generate`."""
    settings, filtering, rounds = writer.settings, options["use_filter"], options.get("max_rounds", 1)
    check_rows(writer, items)
    short = Shortfall(writer.output_dir)
    missing = [item for item in items if writer.name(item.index) not in writer.rows]
    if accepted_only:
        missing = [item for item in missing if not short.holds(item, rounds)]
    state.wait_for_everyone()  # all have read what is there before any of them adds to it

    mine = missing[state.process_index :: state.num_processes]
    batch_size = batch_size or (4 if pipe.device.type == "cpu" else 8)
    bar = tqdm(
        total=len(mine),
        disable=quiet or not mine or not state.is_local_main_process,
        bar_format="{percentage:3.0f}% |{bar}| {n:.1f}/{total:.0f} images [{elapsed}<{remaining}]",
    )
    with bar, logging_redirect_tqdm():  # the pipeline's warnings, on lines of their own
        for start in range(0, len(mine), batch_size):
            batch = mine[start : start + batch_size]
            try:
                output = draw(
                    pipe,
                    batch,
                    lambda done, start=start, batch=batch: bar.update(start + done * len(batch) - bar.n),
                    **options,
                )
            except RuntimeError as error:
                if "out of memory" not in str(error) and "allocate memory" not in str(error):
                    raise
                size = f"{settings['width']} x {settings['height']}"
                raise ValueError(
                    f"{len(batch)} images of {size} px at once do not fit into the memory of {str(pipe.device)!r}: "
                    "choose a smaller batch size, height or width."
                ) from error
            for i, item in enumerate(batch):
                if accepted_only and not output.accepted[i]:
                    short.add(item, rounds, output.candidates[i], output.rejected[i])
                    continue
                row = {"Text": item.text, "modality": item.modality.name, "seed": item.seed}
                # Empty rather than absent: a column of that name in the CSV of prompts speaks of another image.
                made = {"synthetic": "true"} | {key: "" if v is None else v for key, v in settings.items()}
                metadata = settings | {"modality": item.modality.id, "prompt": item.text, "seed": output.seeds[i]}
                if filtering:
                    score = round(output.scores[i], 4)
                    row |= {"score": score, "accepted": str(output.accepted[i]).lower()}
                    row |= {"candidates": output.candidates[i], "drawn_seed": output.seeds[i]}
                    row |= {f"rejected_{reason}": count for reason, count in output.rejected[i].items()}
                    metadata |= {"score": score, "accepted": row["accepted"]}
                writer.add(item.index, output.images[i], item.extra | made | row, metadata)

    state.wait_for_everyone()
    if state.is_main_process:
        writer.finish()
        written = [item for item in items if (writer.output_dir / writer.name(item.index)).is_file()]
        if accepted_only:
            short.finish(items, {item.index for item in written}, rounds)
        if written:
            save_grid(writer, written)
    state.wait_for_everyone()
    return len(mine)


def load_pipeline(
    model: str,
    scheduler: str | None = None,
    lora: str | None = None,
    device: str | None = None,
    dtype: str = "float32",
    unet: str | Path | None = None,
):
    """The `MinimPipeline` that the options of `generate` describe, without progress bars of its own.

    `scheduler` may also be the name of diffusers' class, as provenance has it; `unet` as of `generate`.
    """
    names = {key: key for key in SCHEDULERS} | {value: key for key, value in SCHEDULERS.items()}
    if scheduler is not None and scheduler not in names:
        raise ValueError(f"scheduler has to be one of {', '.join(SCHEDULERS)}, got {scheduler!r}.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype has to be one of {', '.join(DTYPES)}, got {dtype!r}.")
    import diffusers
    import torch
    import transformers
    from safetensors import SafetensorError

    from .. import MinimPipeline

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device {device!r} cannot be used here: {reason}") from error

    try:
        if unet is None:
            pipe = MinimPipeline.from_pretrained(model, dtype=getattr(torch, dtype))
        else:
            bare = not read_model_index(model).get("modalities")
            pipe = load_with_unet(model, unet, bare, getattr(torch, dtype))
        pipe.to(device)
    except SafetensorError as error:
        raise ValueError(f"{model!r} has broken weights: {error}.") from error
    if scheduler is not None:
        scheduler = names[scheduler]
        # DDIM and DDPM clip to [-1, 1] unless told otherwise, which is right for pixels and wrong for latents.
        options = {"ddim": {"clip_sample": False}, "ddpm": {"clip_sample": False}}.get(scheduler, {})
        if scheduler == "dpmsolver++":
            options["algorithm_type"] = "dpmsolver++"
        pipe.scheduler = getattr(diffusers, SCHEDULERS[scheduler]).from_config(pipe.scheduler.config, **options)
    if lora is not None:
        try:
            pipe.load_lora_weights(lora)
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split()).partition(": copying a param")[0]
            raise ValueError(f"{lora!r} holds no LoRA for this model: {reason}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, batch: Sequence[Item], progress: Callable[[float], object], **options):
    """What the pipeline gives for `batch`, each from a generator of its own; `progress` is told the share of steps."""
    import torch

    def on_step_end(pipe, step, timestep, tensors):
        progress((step + 1) / pipe.num_timesteps)
        return tensors

    return pipe(
        [item.text for item in batch],
        modality=[item.modality.id for item in batch],
        generator=[torch.Generator("cpu").manual_seed(item.seed) for item in batch],
        callback_on_step_end=on_step_end,
        **options,
    )


def check_rows(writer: DatasetWriter, items: Sequence[Item]) -> None:
    """Raises ValueError if an image that `writer` found in its folder is another than the plan says."""
    for item in items:
        row = writer.rows.get(writer.name(item.index))
        if row is None:
            continue
        planned = {"Text": item.text, "modality": item.modality.name, "seed": str(item.seed)}
        differing = [
            f"{key}: {row[key]!r} there, {value!r} now" for key, value in planned.items() if row[key] != value
        ]
        if differing:
            raise ValueError(
                f"{writer.output_dir} holds a run of other settings ({row['path']} has {'; '.join(differing)}): "
                "choose another folder, or the same settings."
            )


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
