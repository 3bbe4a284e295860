"""One batch of images of a plan, drawn by the pipeline."""

from collections.abc import Callable, Sequence

from .options import GenerateOptions
from .plan import Item


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

    Raises:
        ValueError: as the pipeline; or the images do not fit into memory.
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
