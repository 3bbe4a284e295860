"""What the pipeline's arguments may be, and what its networks and callbacks may give back: each check says what was
given and what is allowed."""

import inspect
import itertools
import math
from numbers import Integral, Real

import numpy as np
import PIL.Image
import torch

from .captions import check_caption
from .minim_filter.funnel import Batch


OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def is_whole(value) -> bool:
    """Whether `value` is an integer; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value) -> bool:
    """Whether `value` is a finite number; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def quoted(value) -> str:
    """An argument for an error message: tensors and arrays by their shape, what is long cut."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return f"{type(value).__name__} {value.dtype} of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def check_argument(name: str, value, right: object, allowed: str) -> None:
    """Raises ValueError that says what is `allowed` unless the argument is `right`."""
    if not right:
        raise ValueError(f"`{name}` has to be {allowed}, got {quoted(value)}.")


def check_flags(**flags) -> None:
    """Raises ValueError for an argument that is neither True nor False."""
    for name, value in flags.items():
        check_argument(name, value, isinstance(value, bool), "True or False")


def check_counts(**counts) -> None:
    """Raises ValueError for an argument that is no integer from 1 on."""
    for name, value in counts.items():
        check_argument(name, value, is_whole(value) and value >= 1, "a positive integer")


def check_threshold(filter_threshold) -> None:
    """Raises ValueError for a threshold that no score can be compared with."""
    right = filter_threshold is None or (is_number(filter_threshold) and 1 <= filter_threshold <= 3)
    check_argument("filter_threshold", filter_threshold, right, "a score from 1 to 3")


def check_guidance(guidance_scale, guidance_rescale, guidance_interval, eta) -> None:
    """Raises ValueError for a number that steers the steps and is none, or out of its range."""
    right = is_number(guidance_scale) and guidance_scale >= 0
    check_argument("guidance_scale", guidance_scale, right, "a number from 0 on")
    for name, value in (("guidance_rescale", guidance_rescale), ("eta", eta)):
        check_argument(name, value, is_number(value) and 0 <= value <= 1, "a number from 0 to 1")
    pair = isinstance(guidance_interval, (list, tuple)) and len(guidance_interval) == 2
    right = pair and all(map(is_number, guidance_interval)) and 0 <= guidance_interval[0] <= guidance_interval[1] <= 1
    check_argument("guidance_interval", guidance_interval, right, "two fractions in ascending order")


def check_encoding(clip_skip, cross_attention_kwargs, text_encoder) -> None:
    """Raises ValueError for more layers to leave out than there are, or a LoRA's scale that is no number."""
    layers = text_encoder.config.num_hidden_layers if text_encoder is not None else 0
    right = clip_skip is None or (is_whole(clip_skip) and 0 <= clip_skip <= layers)
    check_argument("clip_skip", clip_skip, right, f"None, or layers to leave out, 0 to {layers}")
    given = cross_attention_kwargs
    check_argument("cross_attention_kwargs", given, given is None or isinstance(given, dict), "None or a dict")
    if given and "scale" in given:
        check_argument("cross_attention_kwargs['scale']", given["scale"], is_number(given["scale"]), "a number")


def check_size(height, width, factor: int) -> None:
    """Raises ValueError for a height or width that is no positive multiple of `factor`."""
    for name, value in (("height", height), ("width", width)):
        right = is_whole(value) and value >= 1 and value % factor == 0
        check_argument(name, value, right, f"a positive multiple of {factor}")


def check_output_type(output_type) -> None:
    """Raises ValueError for a form of images that there is not."""
    right = isinstance(output_type, str) and output_type in OUTPUT_TYPES
    check_argument("output_type", output_type, right, f"one of {', '.join(map(repr, OUTPUT_TYPES))}")


def prompt_list(prompt: str | list[str]) -> list[str]:
    """The prompts as a list; ValueError if they are not text."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    right = isinstance(prompts, list) and prompts and all(isinstance(p, str) for p in prompts)
    check_argument("prompt", prompt, right, "a string or a list of strings")
    return prompts


def check_negative_prompt(negative_prompt, batch_size: int) -> None:
    """Raises ValueError if it is neither None nor one text for all prompts, nor one for each."""
    if negative_prompt is None:
        return
    each = isinstance(negative_prompt, (list, tuple))
    texts = negative_prompt if each else [negative_prompt]
    right = all(isinstance(text, str) for text in texts)
    check_argument("negative_prompt", negative_prompt, right, "a string or a list of strings")
    if each and len(texts) != batch_size:
        raise ValueError(f"`negative_prompt` has {len(texts)} entries for {batch_size} prompts: {negative_prompt!r}.")
    for text in texts:
        check_caption(text)


def check_steps(scheduler, timesteps, sigmas) -> None:
    """Raises ValueError for timesteps or noise levels of the caller's that `scheduler` cannot take."""
    if timesteps is not None and sigmas is not None:
        raise ValueError("Pass `timesteps` or `sigmas`, not both.")
    last = scheduler.config.num_train_timesteps - 1
    for name, values, most in (("timesteps", timesteps, last), ("sigmas", sigmas, math.inf)):
        if values is None:
            continue
        if name not in inspect.signature(scheduler.set_timesteps).parameters:
            raise ValueError(f"{type(scheduler).__name__} takes no `{name}` of the caller's.")
        right = isinstance(values, (list, tuple, np.ndarray)) and len(values) > 0 and all(map(is_number, values))
        right = right and all(0 <= value <= most for value in values)
        right = right and all(first > second for first, second in itertools.pairwise(values))
        limit = f"from 0 to {most}" if most < math.inf else "from 0 on"
        check_argument(name, values, right, f"a list of numbers {limit} in descending order")


def check_tensor(name: str, value, shape: tuple[int | None, ...]) -> None:
    """Raises ValueError if `value` is no tensor of finite floats of this shape, in which None is any size."""
    wanted = f"({', '.join('N' if size is None else str(size) for size in shape)})"
    right = isinstance(value, torch.Tensor) and value.is_floating_point()
    check_argument(name, value, right, f"a tensor of floats of shape {wanted}")
    if value.ndim != len(shape) or any(size not in (None, given) for size, given in zip(shape, value.shape)):
        raise ValueError(f"`{name}` has shape {tuple(value.shape)}, but {wanted} is needed.")
    if not value.isfinite().all():
        raise ValueError(f"`{name}` has to be finite, got nan or infinity.")


def check_prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, hidden) -> int:
    """The number of prompts; ValueError if they are no text, or embeddings (N, L, hidden) of another form.

    Where `hidden`, the U-Net's `cross_attention_dim`, is a number for each block, any size is taken.
    """
    if (prompt is None) == (prompt_embeds is None):
        raise ValueError("Pass exactly one of `prompt` and `prompt_embeds`.")
    if negative_prompt is not None and negative_prompt_embeds is not None:
        raise ValueError("Pass `negative_prompt` or `negative_prompt_embeds`, not both.")
    hidden = hidden if isinstance(hidden, int) else None
    if prompt is None:
        check_tensor("prompt_embeds", prompt_embeds, (None, None, hidden))
    batch_size = len(prompt_list(prompt) if prompt is not None else prompt_embeds)
    if negative_prompt_embeds is not None:
        length = None if prompt_embeds is None else prompt_embeds.shape[1]
        check_tensor("negative_prompt_embeds", negative_prompt_embeds, (batch_size, length, hidden))
    check_negative_prompt(negative_prompt, batch_size)
    return batch_size


def check_noise(generator, seeds, latents, shape: tuple[int, int, int, int]) -> None:
    """Raises ValueError for a source of noise that is none of latents of this shape (N, C, h, w)."""
    count = shape[0]
    if seeds is not None:
        if generator is not None or latents is not None:
            raise ValueError("`seeds` replaces `generator` and `latents`; pass only one of the three.")
        right = isinstance(seeds, (list, tuple, range, np.ndarray)) and len(seeds) == count
        check_argument("seeds", seeds, right, f"a list with one seed for each of {count} images")
        for seed in seeds:
            if not is_whole(seed) or not -(2**63) <= seed < 2**63:
                raise ValueError(f"`seeds` have to be integers of 64 bits with a sign, got {seed!r}.")
    each = generator if isinstance(generator, list) else [generator]
    right = generator is None or all(isinstance(one, torch.Generator) for one in each)
    check_argument("generator", generator, right, "a torch.Generator or a list of them")
    if isinstance(generator, list) and len(generator) != count:
        raise ValueError(f"`generator` has {len(generator)} entries for {count} images.")
    if latents is not None:
        check_tensor("latents", latents, shape)


def check_wishes(why, num_candidates, max_rounds, filter_threshold, use_filter, seeds, latents) -> None:
    """Raises ValueError for what only a filter can do where none runs, and for candidates where the noise is given.

    `why`: no filter runs, as the rest of a sentence; None if one does.
    """
    wishes = {"num_candidates": num_candidates, "max_rounds": max_rounds, "filter_threshold": filter_threshold}
    wishes["use_filter"] = use_filter or None
    redraws = [name for name in ("num_candidates", "max_rounds") if wishes[name] is not None and wishes[name] > 1]
    asked = [*redraws, *(name for name in ("filter_threshold", "use_filter") if wishes[name] is not None)]
    if asked and why is not None:
        raise ValueError(f"`{asked[0]}={wishes[asked[0]]}` needs a filter, {why}.")
    for name, value in (("seeds", seeds), ("latents", latents)):
        if redraws and value is not None:
            raise ValueError(
                f"`{redraws[0]}={wishes[redraws[0]]}` draws images that the filter chooses from, but `{name}` says"
                " which to draw."
            )


def check_callback(callback, tensor_inputs, allowed: list[str]) -> None:
    """Raises ValueError for a callback that cannot be called, or that asks for other tensors than those `allowed`."""
    name = "callback_on_step_end"
    check_argument(name, callback, callback is None or callable(callback), "None or a function")
    listed = isinstance(tensor_inputs, (list, tuple)) and all(isinstance(entry, str) for entry in tensor_inputs)
    check_argument(f"{name}_tensor_inputs", tensor_inputs, listed, f"a list of some of {allowed}")
    for entry in tensor_inputs:
        if entry not in allowed:
            raise ValueError(f"`{name}_tensor_inputs` may name {allowed}, got {entry!r}.")


def replace_tensors(batch: Batch, given, guided: bool) -> None:
    """Puts what a callback gave back in the place of the batch's tensors; ValueError for no dict, or another shape."""
    if not isinstance(given, dict):
        raise ValueError(f"`callback_on_step_end` has to return a dict, got {given!r}.")
    for name in ("latents", "negative_prompt_embeds"):
        if (before := getattr(batch, name)) is None:
            continue
        tensor = given.get(name, before)
        if tensor.shape != before.shape:
            shapes = f"{tuple(tensor.shape)}, {tuple(before.shape)} is needed"
            raise ValueError(f"`callback_on_step_end` gave `{name}` of shape {shapes}.")
        setattr(batch, name, tensor)
    embeds, count = given.get("prompt_embeds", batch.prompt_embeds), len(batch.latents)
    batch.prompt_embeds = callback_embeds(embeds, batch.prompt_embeds, count, guided)


def callback_embeds(given: torch.Tensor, before: torch.Tensor, count: int, guided: bool) -> torch.Tensor:
    """The embeddings to go on with for `count` candidates after a callback gave some in the place of `before`.

    There is one for each candidate or, as with guidance there has to be, two; else ValueError.
    """
    if given.shape == before.shape or (not guided and given.shape == (count, *before.shape[1:])):
        return given
    if not guided and torch.equal(given, before[-1:]):
        # diffusers' own callbacks that end guidance keep the last row alone, which is right for one image only.
        return before[-count:]
    raise ValueError(
        f"`callback_on_step_end` gave `prompt_embeds` of shape {tuple(given.shape)} for {count} candidates; before"
        f" they were {tuple(before.shape)}, the negative side first; once guidance is off, {count} may be left."
    )


def to_pictures(images) -> list[PIL.Image.Image]:
    """Images as pictures: arrays as they would be saved, in 8 bits, so that an image is rated the same in every form.

    `images` are one image or a list of them as `PIL.Image`, or as `np.ndarray` (H, W, 3) or `torch.Tensor` (3, H, W)
    in [0, 1]; arrays and tensors also with a first axis N. ValueError for anything else, and for none.
    """
    arrays = "an np.ndarray (N, H, W, 3) in [0, 1] or a torch.Tensor (N, 3, H, W) in [0, 1]"
    allowed = f"PIL images, {arrays}, at least one image"
    entries = list(images) if isinstance(images, (list, tuple)) else [images]
    pictures = []
    for entry in entries:
        if isinstance(entry, PIL.Image.Image):
            pictures.append(entry)
            continue
        array = entry
        if isinstance(entry, torch.Tensor) and entry.ndim in (3, 4):
            array = entry.detach().float().cpu().movedim(-3, -1).numpy()
        right = isinstance(array, np.ndarray) and array.ndim in (3, 4) and array.shape[-1] in (1, 3) and array.size
        if not right or not (entry.is_floating_point() if array is not entry else array.dtype.kind == "f"):
            raise ValueError(f"`images` have to be {allowed}, got {quoted(entry)}.")
        # Written so that nan fails too.
        if not (array.min() >= 0 and array.max() <= 1):
            raise ValueError(f"`images` have to be in [0, 1], got {array.min():g} to {array.max():g}.")
        levels = (np.asarray(array, np.float32) * 255).round().astype(np.uint8)
        levels = np.broadcast_to(levels, (*levels.shape[:-1], 3))
        pictures += [PIL.Image.fromarray(np.ascontiguousarray(one)) for one in levels.reshape(-1, *levels.shape[-3:])]
    if not pictures:
        raise ValueError(f"`images` have to be {allowed}, got {quoted(images)}.")
    return pictures


def check_finite(values: torch.Tensor, what: str, networks: dict[str, torch.nn.Module | None]) -> None:
    """Raises ValueError if latents or pixels (N, ...) are not finite: no picture is made of them.

    `networks`: by name, those that made them, or None; the first whose weights are not finite is told.
    """
    there = {name: network for name, network in networks.items() if network is not None}
    broken = int((~values.isfinite()).flatten(1).any(1).sum())
    if not broken:
        return
    why = ""
    if there:
        dtypes = " and ".join(dict.fromkeys(str(network.dtype) for network in there.values()))
        why = f": numbers grew too large for {dtypes}; `dtype=torch.float32`, or less guidance, may help"
    for name, network in there.items():
        weights = [p for p in network.parameters() if p.is_floating_point() and p.device.type != "meta"]
        if not all(p.isfinite().all() for p in weights):
            why = f": the weights of `{name}` are not finite, as of a training that has diverged"
            break
    raise ValueError(f"{what} are not finite for {broken} of {len(values)} images{why}.")
