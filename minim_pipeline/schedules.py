"""Which schedulers sample a model as it was trained, with which settings, and at which timesteps."""

import inspect

import diffusers
import numpy as np
import torch

from .notices import warn_once


# The only schedulers of diffusers that know `rescale_betas_zero_snr`; the others drop it without a word.
ZERO_SNR_SCHEDULERS = (
    diffusers.DDIMScheduler,
    diffusers.DDPMScheduler,
    diffusers.DPMSolverMultistepScheduler,
    diffusers.EulerDiscreteScheduler,
    diffusers.EulerAncestralDiscreteScheduler,
    diffusers.UniPCMultistepScheduler,
)
# Settings that keep pixels in their range. Latents have none, and are ruined.
CLIPPING = ("clip_sample", "thresholding")
# Settings that put noise levels elsewhere than timesteps would.
SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas")


def settings_of(scheduler) -> dict:
    """The settings that the scheduler's class acts upon: its config may also hold those of others."""
    known = type(scheduler)._get_init_keys(type(scheduler))
    return {name: value for name, value in scheduler.config.items() if name in known}


def keep_from_clipping(scheduler) -> None:
    """Writes `clip_sample: false` into the config of a scheduler whose class never clips, in place.

    Or `DDIMScheduler.from_config(scheduler.config)`, and DDPM's, would take their own default, which clips.
    """
    if "clip_sample" not in settings_of(scheduler):
        scheduler.register_to_config(clip_sample=False)


def check_scheduler(scheduler, zero_terminal_snr: bool) -> None:
    """Raises ValueError unless `scheduler` can sample a model; warns once of what it was not trained for.

    Args:
        zero_terminal_snr: whether the model's noise schedule ends in pure noise.
    """
    name, config = type(scheduler).__name__, settings_of(scheduler)
    fitting = ", ".join(kind.__name__ for kind in ZERO_SNR_SCHEDULERS)
    if zero_terminal_snr:
        if not isinstance(scheduler, ZERO_SNR_SCHEDULERS):
            raise ValueError(
                f"{name} does not fit this model, whose noise schedule ends in pure noise (zero terminal SNR);"
                f" use one of {fitting}."
            )
        rescaled, predicted = config.get("rescale_betas_zero_snr"), config.get("prediction_type")
        if not rescaled or predicted == "epsilon":
            raise ValueError(
                f"This model has zero terminal SNR, but its {name} has rescale_betas_zero_snr={rescaled} and"
                f" prediction_type={predicted!r}; make it with `{name}.from_config(...)` from the config of the"
                " scheduler that the model was saved with."
            )
    elif not hasattr(scheduler, "init_noise_sigma") or not hasattr(scheduler, "scale_model_input"):
        raise ValueError(f"{name} does not fit this pipeline; use one of {fitting}.")

    for setting in CLIPPING:
        if config.get(setting):
            raise ValueError(
                f"{name} has {setting}=True, which is for pixels and ruins latents; make it with"
                f" `{name}.from_config(pipe.scheduler.config, {setting}=False)`."
            )
    if zero_terminal_snr and config.get("timestep_spacing") == "leading":
        warn_once(
            f"{name} has timestep_spacing='leading', which leaves out the pure noise that this model's noise schedule"
            " ends in (zero terminal SNR), and lowers the scores: make it with timestep_spacing='trailing'."
        )


def model_timesteps(scheduler, own: list[int] | None, count: int) -> list[int] | None:
    """`count` of the timesteps that a model is best sampled at, in descending order, or None for the scheduler's own.

    Where the model names another number, the first stays and the rest are spread over the others, as is usual for
    such lists (arXiv 2404.14507).

    Args:
        own: those of the model, in descending order; None if it has none.
    """
    takes_them = "timesteps" in inspect.signature(scheduler.set_timesteps).parameters
    spaced = any(scheduler.config.get(setting) for setting in SPACINGS)
    if own is None or not takes_them or spaced or count > scheduler.config.num_train_timesteps:
        return None
    if count != len(own):
        places = np.linspace(1, len(own) - 1, max(count - 1, 1))
        own = [own[0], *np.interp(places, range(len(own)), own).round().astype(int).tolist()][:count]
    spread = list(own)
    # Where they are close, some may be rounded to the same: each has to be lower than the one before.
    for i in reversed(range(1, len(spread) - 1)):
        spread[i] = max(spread[i], spread[i + 1] + 1)
    for i in range(1, len(spread)):
        spread[i] = min(spread[i], spread[i - 1] - 1)
    return spread


def karras_timesteps(scheduler, count: int, sigma_max: float, rho: float = 7.0) -> list[int]:
    """Timesteps to sample a model at that begins with pure noise: the first is the last of training's.

    The others are at Karras's noise levels (arXiv 2206.00364, equation 5) from `sigma_max` (sigma/alpha) down to the
    least of training. His start at the highest level would spend half of the steps where there is only noise.

    Raises:
        ValueError: `sigma_max` is not among the levels below pure noise.
    """
    alphas_cumprod = scheduler.alphas_cumprod.double().clamp(min=1e-8)
    sigmas = ((1 - alphas_cumprod) / alphas_cumprod).sqrt().numpy()
    if not sigmas[0] < sigma_max <= sigmas[-2]:
        raise ValueError(f"sigma_max has to be above {sigmas[0]:.3g} and at most {sigmas[-2]:.3g}, got {sigma_max}.")
    first, last = np.array([sigma_max, sigmas[0]]) ** (1 / rho)
    levels = np.linspace(first, last, count - 1) ** rho
    timesteps = np.interp(np.log(levels), np.log(sigmas), np.arange(len(sigmas))).round().astype(int)
    return [len(sigmas) - 1, *timesteps.tolist()]


def retrieve_timesteps(
    scheduler,
    num_inference_steps: int,
    device: torch.device,
    timesteps: list[int] | None = None,
    sigmas: list[float] | None = None,
) -> tuple[torch.Tensor, int]:
    """The timesteps of `scheduler` and their number; `timesteps` or `sigmas` take the place of its own spacing."""
    if timesteps is None and sigmas is None:
        scheduler.set_timesteps(num_inference_steps, device=device)
        return scheduler.timesteps, num_inference_steps
    asked = {"timesteps": timesteps} if timesteps is not None else {"sigmas": sigmas}
    scheduler.set_timesteps(**asked, device=device)
    return scheduler.timesteps, len(scheduler.timesteps)


# Copied from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion, whose import warns of torchvision
def rescale_noise_cfg(noise_cfg, noise_pred_text, guidance_rescale=0.0):
    """Guided predictions (N, C, h, w), brought to the deviation of the text's by a share of `guidance_rescale`.

    Against overexposure: section 3.4 of arXiv 2305.08891.
    """
    std_text = noise_pred_text.std(dim=list(range(1, noise_pred_text.ndim)), keepdim=True)
    std_cfg = noise_cfg.std(dim=list(range(1, noise_cfg.ndim)), keepdim=True)
    # rescale the results from guidance (fixes overexposure)
    noise_pred_rescaled = noise_cfg * (std_text / std_cfg)
    # mix with the original results from guidance by factor guidance_rescale to avoid "plain looking" images
    return guidance_rescale * noise_pred_rescaled + (1 - guidance_rescale) * noise_cfg
