"""The funnel: many candidates start, the worst are dropped on the way, and what is left is rated at the end.

With N candidates an image and a share f of the steps before all but one are dropped, an image costs f * N + (1 - f)
plain ones instead of N. A U-Net's prediction holds an estimate of the finished image at every step for nothing; the
filter head rates that.
"""

import math
from dataclasses import dataclass

import torch

from ..tokens import tokenize
from .estimate import estimate_clean, noise_angles
from .filter_head import FilterHead, FilterHeadOutput


# Why a candidate does not come back; the last only where the head rates realism.
REASONS = ("quality", "finding", "copy", "realism")


def combine(quality: torch.Tensor, finding: torch.Tensor) -> torch.Tensor:
    """One rating in [1, 3] from two: high only if both are, as a product of two shares would be."""
    return 1 + (quality - 1) * (finding - 1) / 2


def rank(
    quality: torch.Tensor, finding: torch.Tensor, guidance: torch.Tensor, realism: torch.Tensor | None, config
) -> torch.Tensor:
    """By what the candidates of an image are chosen: both ratings as one, what guidance did, and how real they look.

    How far predictions with and without the prompt lie apart, summed over the steps, tells images that show their
    prompt from others (CFG-Rejection, arXiv 2505.23343); it costs nothing, and errs elsewhere than the head does.

    Args:
        quality, finding: ratings (N,), of which each counts only up to `enough` (see `FilterHead`).
        guidance: (N,), the sum so far; only its ratios within an image matter, 0 before guidance acts.
        realism: log ratios (N,), None of a head that does not rate it.
        config: the head's, with `enough`, `guidance_weight` and `realism_weight`.
    """
    ratings = combine(quality.clamp(max=config.enough[0]), finding.clamp(max=config.enough[1]))
    ratings = ratings + config.guidance_weight * guidance.clamp(min=1e-12).log()
    return ratings if realism is None else ratings + config.realism_weight * realism


def accepted_first(scores: torch.Tensor, passed: torch.Tensor) -> torch.Tensor:
    """Scores, of any shape, by which those that `passed` go before all others, each kind in its order."""
    return scores + passed * (1 + scores.max() - scores.min())


def guidance_strength(cond: torch.Tensor, uncond: torch.Tensor) -> torch.Tensor:
    """Mean square (N,) of what guidance adds: predictions (N, C, h, w) for the prompt less the negative side's."""
    return (cond.float() - uncond.float()).square().mean((1, 2, 3))


def weaker(rated: FilterHeadOutput) -> torch.Tensor:
    """Which of both ratings is lower, as an index (N,) into `REASONS`."""
    return (rated.finding < rated.quality).long()


def select_state(scheduler, keep: torch.Tensor, shape: torch.Size) -> None:
    """Cuts what a multistep scheduler remembers of earlier steps to the indices `keep` (K,) of its batch, in place.

    Only what has this very `shape`, that of the latents before the cut, is of the batch: a length alone may be that
    of the schedule.
    """

    def cut(value):
        if torch.is_tensor(value) and value.shape == shape:
            return value[keep.to(value.device)]
        if isinstance(value, (list, tuple)):
            return type(value)(cut(entry) for entry in value)
        return value

    for name, value in vars(scheduler).items():
        if torch.is_tensor(value) or (isinstance(value, (list, tuple)) and any(map(torch.is_tensor, value))):
            setattr(scheduler, name, cut(value))


@dataclass
class Batch:
    """What is denoised together, and cut together when candidates are dropped.

    Args:
        latents: (M, C, h, w).
        prompt_embeds: (M, L, hidden); with guidance (2 M, L, hidden), the negative side first.
        negative_prompt_embeds: (M, L, hidden), None without guidance.
        generator: of the noise that some schedulers add: one for all, one for each, or None.
    """

    latents: torch.Tensor
    prompt_embeds: torch.Tensor
    negative_prompt_embeds: torch.Tensor | None
    generator: torch.Generator | list[torch.Generator] | None

    def select(self, keep: torch.Tensor) -> None:
        """Cuts it down to the indices `keep`, int64 (K,)."""
        halves = self.prompt_embeds.split(len(self.latents))
        self.prompt_embeds = torch.cat([half[keep] for half in halves])
        self.latents = self.latents[keep]
        if self.negative_prompt_embeds is not None:
            self.negative_prompt_embeds = self.negative_prompt_embeds[keep]
        if isinstance(self.generator, list):
            self.generator = [self.generator[k] for k in keep.tolist()]


@dataclass
class Funnel:
    """Which candidates are still on their way, and when the next are dropped.

    Args:
        head: rates them.
        text: what `head.encode_text` made of each candidate's prompt, (M, T).
        image: int64 (M,), the image that each is a candidate for.
        stages: (sigma / alpha, candidates an image left from there on), in the order of sampling.
    """

    head: FilterHead
    text: torch.Tensor
    image: torch.Tensor
    stages: list[tuple[float, int]]

    @classmethod
    def prepare(cls, head: FilterHead, tokenizer, texts: list[str], candidates: int, device: torch.device) -> "Funnel":
        """The funnel of `candidates` for each of the images of `texts`, which are as `prompt_text` gives them."""
        config = head.config
        ids = tokenize(tokenizer, texts, config.max_length)
        # What was added to the tokenizer since, as by a textual inversion, says nothing to the head.
        ids = torch.where(ids < config.vocab_size, ids, config.pad_token_id).to(device)
        image = torch.arange(len(texts), device=device).repeat_interleave(candidates)
        return cls(head, head.encode_text(ids)[image], image, plan_stages(config.stages, candidates))

    def __post_init__(self):
        self.alive = torch.arange(len(self.image), device=self.image.device)
        self.guidance = torch.zeros(len(self.image), device=self.image.device)  # sum over steps, of each candidate
        self.dropped: list[tuple[int, str]] = []  # image and reason of each candidate dropped on the way

    def due(self, scheduler, t: torch.Tensor) -> int | None:
        """How many candidates an image may keep at this timestep, if some are to be dropped."""
        # Pure noise has a level of infinity; rounded to fp32 its angle lies beyond the pole.
        level = self.angle(scheduler, t).clamp(max=1.5707).tan().item()
        count = None
        while self.stages and level <= self.stages[0][0]:
            count = self.stages.pop(0)[1]
        most = int(torch.bincount(self.image[self.alive]).max())
        return count if count is not None and count < most else None

    @staticmethod
    def angle(scheduler, t: torch.Tensor) -> torch.Tensor:
        return noise_angles(scheduler.alphas_cumprod.cpu(), torch.as_tensor(t).cpu().reshape(1))

    def add_guidance(self, cond: torch.Tensor, uncond: torch.Tensor) -> None:
        """Takes note of a step's predictions for the prompt and for the negative side, (m, C, h, w) each."""
        self.guidance[self.alive] += guidance_strength(cond, uncond)

    def prune(self, count: int, noisy: torch.Tensor, prediction: torch.Tensor, scheduler, t) -> torch.Tensor:
        """Drops all but the best `count` of each image; returns the indices of those left into the batch given.

        Args:
            noisy: what the U-Net was given at this step, (m, C, h, w).
            prediction: what it answered for the prompt alone.
        """
        angle = self.angle(scheduler, t).to(noisy.device).expand(len(noisy))
        clean = estimate_clean(noisy, prediction, angle, scheduler.config.prediction_type)
        rated = self.head(noisy, clean, angle, text=self.text[self.alive])
        before, reasons = self.alive, weaker(rated)
        left = self.keep(self.rank(rated), count)
        gone = torch.isin(before, self.alive, invert=True)
        self.dropped += zip(self.image[before[gone]].tolist(), [REASONS[r] for r in reasons[gone].tolist()])
        return left

    def rate(self, latents: torch.Tensor) -> FilterHeadOutput:
        """The ratings of finished latents (m, C, h, w)."""
        return self.head(latents, latents, latents.new_zeros(len(latents)).float(), text=self.text[self.alive])

    def rank(self, rated: FilterHeadOutput) -> torch.Tensor:
        """By what those still on their way are chosen (m,); see the function of this name."""
        return rank(rated.quality, rated.finding, self.guidance[self.alive], rated.realism, self.head.config)

    def keep(self, scores: torch.Tensor, count: int) -> torch.Tensor:
        """Keeps the best `count` of each image by their scores (m,): indices into the batch, in its order."""
        image = self.image[self.alive]
        # By image, within an image by score; of equals the earlier one.
        order = torch.argsort(scores, descending=True, stable=True)
        order = order[torch.argsort(image[order], stable=True)]
        first = torch.searchsorted(image[order].contiguous(), image[order].contiguous())
        place = torch.arange(len(order), device=order.device) - first
        best = order[place < count].sort().values
        self.alive = self.alive[best]
        return best


def plan_stages(stages: list, candidates: int) -> list[tuple[float, int]]:
    """The pruning plan for a number of candidates of each image: (sigma / alpha, candidates left), noisiest first.

    `stages` are (sigma / alpha, share of the candidates left) as in the head's config.
    """
    plan = [(float(level), max(1, math.ceil(share * candidates))) for level, share in stages]
    return sorted(plan, key=lambda stage: -stage[0])
