"""What a batch of a plan is drawn with, drawing it, and what is said of each image.

torch and diffusers are imported by what draws only.
"""

from collections.abc import Callable, Iterator, Sequence

from PIL import Image
from tqdm import tqdm

from ..loading import load_pipeline, lora_identity, model_identity, unet_identity
from ..provenance import single_channel
from .options import GenerateOptions
from .plan import Item


# Of data.csv, after path, Text, modality and seed.
COLUMNS = ("synthetic", "model", "revision", "steps", "guidance", "scheduler", "negative_prompt", "lora")
# Why a candidate of the filter does not come back: as `minim_filter.funnel` has them, without importing torch.
REASONS = ("quality", "finding", "copy", "realism")
# After those, where a filter ran; `drawn_seed` is that of the candidate that came back.
FILTER_COLUMNS = ("score", "accepted", "candidates", "drawn_seed", *(f"rejected_{name}" for name in REASONS[:3]))


def load(options: GenerateOptions):
    """The pipeline that `options` name, accelerate's `PartialState`, and whether the filter runs.

    Raises ValueError for what `load_pipeline` refuses, and for options of a filter that is not there.
    """
    from accelerate import PartialState

    state = PartialState(cpu=options.device == "cpu")
    device = str(state.device) if state.num_processes > 1 else options.device
    pipe = load_pipeline(options.model, options.scheduler, options.lora, device, options.dtype, options.unet)
    filtering = pipe.filter_head is not None and not options.no_filter
    if options.steering and not filtering:
        raise ValueError(f"{', '.join(options.steering)}: {options.model} has no filter to choose with.")
    return pipe, state, filtering


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


def call_arguments(pipe, options: GenerateOptions, filtering: bool) -> dict[str, object]:
    """What `options` say, as arguments of a call of the pipeline."""
    names = ("num_inference_steps", "guidance_scale", "negative_prompt", "height", "width")
    arguments = {name: getattr(options, name) for name in names} | {"use_filter": filtering}
    if filtering:
        arguments |= {"num_candidates": options.num_candidates or pipe.config.num_candidates}
        arguments |= {"max_rounds": options.rounds, "filter_threshold": options.filter_threshold}
        arguments |= {"reject_copies": not options.keep_copies}
    return arguments


def batch_size(pipe, options: GenerateOptions) -> int:
    return options.batch_size or (4 if pipe.device.type == "cpu" else 8)


def draw_all(pipe, items: Sequence[Item], size: int, bar: tqdm, **arguments) -> Iterator[tuple]:
    """Each of `items`, drawn in batches of `size`, with the output that it is in, and its place there."""
    for start in range(0, len(items), size):
        batch, before = items[start : start + size], round(bar.n)

        def progress(done: float, before: int = before, size: int = len(batch)) -> None:
            bar.update(before + done * size - bar.n)

        output = draw(pipe, batch, progress, **arguments)
        for i, item in enumerate(batch):
            yield item, output, i


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


def stored(image: Image.Image, item: Item) -> Image.Image:
    """`image` as files hold it: of a grey modality one channel."""
    return single_channel(image) if item.modality.grey else image


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
