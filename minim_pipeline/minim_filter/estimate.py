"""What any step of sampling tells of the finished image, whatever the scheduler."""

import torch


def noise_angles(alphas_cumprod: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """arctan(sigma / alpha) of timesteps (N,), in [0, pi / 2]; between whole timesteps by interpolation.

    The angle of arXiv 2202.00512, appendix D: it runs from the image to noise without a pole, also where the
    terminal SNR is zero.
    """
    angles = torch.arccos(alphas_cumprod.double().clamp(0, 1).sqrt()).float()
    t = timesteps.float().clamp(0, len(angles) - 1)
    low = t.floor().long()
    high = (low + 1).clamp(max=len(angles) - 1)
    return angles[low].lerp(angles[high], t - low)


def estimate_clean(
    noisy: torch.Tensor, prediction: torch.Tensor, angle: torch.Tensor, prediction_type: str
) -> torch.Tensor:
    """The clean latents (N, C, h, w), in fp32, that a U-Net's prediction stands for.

    Args:
        noisy: cos(angle) * clean + sin(angle) * noise: what the U-Net was given, also by schedulers that scale it.
        prediction: what it answered, without guidance.
        angle: (N,), see `noise_angles`.
        prediction_type: "v_prediction", "epsilon" or "sample"; ValueError for another.
    """
    alpha, sigma = angle.cos()[:, None, None, None], angle.sin()[:, None, None, None]
    noisy, prediction = noisy.float(), prediction.float()
    if prediction_type == "v_prediction":
        return alpha * noisy - sigma * prediction
    if prediction_type == "epsilon":
        return (noisy - sigma * prediction) / alpha.clamp(min=1e-4)
    if prediction_type == "sample":
        return prediction
    raise ValueError(f"prediction_type has to be v_prediction, epsilon or sample, got {prediction_type!r}.")
