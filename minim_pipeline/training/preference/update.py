"""What a step learns from the images that it has drawn: reward feedback learning (arXiv 2304.05977) on latents."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DConditionModel

from ... import FilterHead
from ...finite import check_loss
from ..denoising import clean_estimate, loss_weights, squared_error
from ..randomness import step_generator
from .config import PreferenceConfig
from .rewards import finding_reward, spread
from .sampling import Replay, Samples, Texts


@dataclass
class Objective:
    """What the U-Net is trained for: the frozen head's rating, near `reference`, the network that it began with."""

    head: FilterHead
    reference: UNet2DConditionModel
    scheduler: DDPMScheduler
    config: PreferenceConfig

    def losses(
        self,
        unet: torch.nn.Module,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        noise: torch.Tensor,
        text: torch.Tensor,
        filter_ids: torch.Tensor,
        group: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """By name: `reward`, `anchor` and `diversity` of n drawn images, [n] each; `replay` of real ones, [B - n].

        Args:
            unet: the one that is trained.
            latents: finished images [B, C, h, w], scaled as the U-Net takes them: n that were drawn, then real ones.
            timesteps: int64 [B], the same within a group.
            text: hidden states [B, L, D].
            filter_ids: what the head is to find, [n, T].
            group: int64 [n]; images of one prompt.
        """
        n = len(group)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        # In one pass, which is what several processes expect between two steps.
        new = unet(noisy, timesteps, text, return_dict=False)[0].float()
        with torch.no_grad():
            old = self.reference(noisy[:n], timesteps[:n], text[:n], return_dict=False)[0].float()
        before, angle = clean_estimate(self.scheduler, noisy[:n], old, timesteps[:n])
        after, _ = clean_estimate(self.scheduler, noisy[:n], new[:n], timesteps[:n])
        rated = self.head(noisy[:n], after, angle, text=filter_ids)
        real = squared_error(self.scheduler, new[n:], latents[n:], noise[n:], timesteps[n:])
        return {
            "reward": finding_reward(rated).clamp(max=self.config.enough),
            "anchor": (new[:n] - old).square().mean((1, 2, 3)),
            # How much less unlike they are, as a share of what they were.
            "diversity": spread(after, group) / spread(before, group).clamp(min=1e-3) - 1,
            "replay": real * loss_weights(self.scheduler, timesteps[n:], self.config.snr_gamma),
        }

    def total(self, parts: dict[str, torch.Tensor], counted: torch.Tensor) -> torch.Tensor:
        """The loss, a number, of what `losses` gave; only where `counted` [n] is 1 the reward and diversity count."""
        config = self.config
        wanted = parts["reward"] + config.diversity_weight * parts["diversity"].clamp(max=0)
        loss = (config.anchor_weight * parts["anchor"] - wanted * counted).mean()
        return loss + config.replay_weight * parts["replay"].mean() if len(parts["replay"]) else loss


def shuffle_groups(groups: int, config: PreferenceConfig, g: torch.Generator) -> list[torch.Tensor]:
    """The batches of an update, each some prompts' numbers: whole groups of images, which are compared."""
    rounds = [torch.randperm(groups, device=g.device, generator=g) for _ in range(config.timesteps_per_image)]
    batches = torch.cat(rounds).split(max(1, config.train_batch_size // config.images_per_prompt))
    # Whole batches: what does not fill one was seen in another order already.
    return [batch for batch in batches if len(batch) == len(batches[0])]


def update(
    unet: torch.nn.Module,
    objective: Objective,
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer,
    drawn: Samples,
    texts: Texts,
    step: int,
    replay: Replay | None = None,
) -> dict[str, float]:
    """Learns from each image `timesteps_per_image` times, with new noise each time; returns means of the losses.

    Of real images, `replay`, as many are learned from.
    """
    config, scheduler, device = objective.config, objective.scheduler, drawn.latents.device
    g = step_generator(config.seed, step, accelerator.process_index + 10_000, device)
    size, trained_steps = config.images_per_prompt, scheduler.config.num_train_timesteps
    batches = shuffle_groups(len(drawn.prompt) // size, config, g)
    totals: dict[str, float] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for batch in batches:
        index = (batch[:, None] * size + torch.arange(size, device=device)).flatten()
        n, count = len(index), len(batch)
        group = torch.arange(count, device=device).repeat_interleave(size)
        guided = torch.rand(count, device=device, generator=g) >= config.drop_text
        # The negative side is anchored at all noise levels.
        levels = trained_steps * torch.where(guided, config.reward_until, 1.0)
        timesteps = (torch.rand(count, device=device, generator=g) * levels).long()[group]
        guided, prompt = guided[group], drawn.prompt[index]
        latents = drawn.latents[index]
        text = torch.where(guided[:, None, None], texts.conditional[prompt], texts.unconditional[prompt])
        if replay is not None:
            latents, text = (torch.cat(pair) for pair in zip((latents, text), replay.draw(n, g), strict=True))
            timesteps = torch.cat([timesteps, torch.randint(trained_steps, (n,), device=device, generator=g)])
        noise = torch.randn(latents.shape, device=device, generator=g)
        with accelerator.autocast():
            parts = objective.losses(unet, latents, timesteps, noise, text, texts.filter_ids[prompt], group)
        loss = objective.total(parts, (guided & drawn.counts[index]).float())
        if replay is None:
            del parts["replay"]
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        for name, value in {"loss": loss, **parts, "grad_norm": norm}.items():
            totals[name] = totals.get(name, 0.0) + float(value.detach().mean()) / len(batches)
    check_loss(totals["loss"], step + 1)
    # The reward of estimates; that of finished images is told by `score`.
    totals["estimated_reward"] = totals.pop("reward")
    return totals
