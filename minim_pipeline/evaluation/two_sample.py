"""The classifier two-sample test: how well something fresh tells generated images from real ones (arXiv 1610.06545).

It learns from one half of both sets and is asked about the other half, and the other way round. An AUROC of 0.5 means
that the sets cannot be told apart, 1 that every image can. It grows with the number of images to learn from, so both
sets are equally large, and its floor is real against other real images, of the same number.

`ridge` learns from features, in milliseconds; `network` is fine-tuned on the images themselves.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..mapped import Rows, select
from .classifier import check_architecture, make_classifier, preprocessing
from .images import to_unit
from .metrics import auroc, places


PRETRAINED_NETWORK = "efficientnet-lite0"
FEWEST = 8  # images of each set
Score = Callable[[Any], Tensor]  # items [n, ...] -> how far each looks generated, float [n] on the CPU
Fit = Callable[[Any, Any], Score]  # real and generated items to learn from


def halves(groups: Sequence[Hashable], seed: int = 0) -> Tensor:
    """A random half of the items, bool [N], as nearly as can be where items of one group stay together.

    Raises:
        ValueError: there is one group only.
    """
    index = list(places(groups).values())
    if len(index) < 2:
        raise ValueError(f"Halves of {len(groups)} images: {len(index)} group given, at least 2 needed")
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(seed)).tolist()
    sizes = torch.tensor([len(index[i]) for i in order]).cumsum(0)
    cut = int((sizes[:-1] - len(groups) / 2).abs().argmin()) + 1
    first = torch.zeros(len(groups), dtype=torch.bool)
    for i in order[:cut]:
        first[index[i]] = True
    return first


def held_out_scores(real: Rows, generated: Rows, groups: Sequence[Sequence[Hashable]], fit: Fit) -> list[Tensor]:
    """Scores of every item by what has not learned from it: of real and generated items of one half, then the other.

    Args:
        real, generated: [N, ...], features or images; N >= `FEWEST`.
        groups: of each real, and of each generated item, what must not be learned from and asked about, such as the
            patient.

    Raises:
        ValueError: too few items, or one group only.
    """
    if len(real) != len(generated) or len(real) < FEWEST:
        given = f"{len(real)} and {len(generated)} given, equally many and at least {FEWEST} needed"
        raise ValueError(f"Two-sample test, images on each side: {given}")
    scores = []
    learned_real, learned_generated = map(halves, groups)
    for _ in range(2):
        score = fit(select(real, learned_real), select(generated, learned_generated))
        scores += [score(select(real, ~learned_real)), score(select(generated, ~learned_generated))]
        learned_real, learned_generated = ~learned_real, ~learned_generated
    return scores


def mean_auroc(*scores: Tensor) -> float:
    """AUROC of `held_out_scores`, the mean of both halves."""
    return (auroc(scores[0], scores[1]) + auroc(scores[2], scores[3])) / 2


def ridge(real: Tensor, generated: Tensor) -> Score:
    """Ridge regression on features [N, D], standardised, its penalty D: weak evidence of one feature counts little."""
    x = torch.cat([real, generated]).double()
    mean, scale = x.mean(0), x.std(0) + 1e-6
    x = (x - mean) / scale
    y = torch.cat([-torch.ones(len(real)), torch.ones(len(generated))]).double()
    penalty = x.shape[1] * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(x.T @ x + penalty, x.T @ (y - y.mean()))
    return lambda items: ((items.double() - mean) / scale) @ weight


def network_name() -> str:
    """Of what `network` fine-tunes: one with ImageNet's weights where the packages with them are installed."""
    try:
        check_architecture(PRETRAINED_NETWORK)
    except ImportError:
        return "resnet"
    return PRETRAINED_NETWORK


def network(steps: int, device: torch.device | str = "cpu", batch_size: int = 64, seed: int = 0) -> Fit:
    """A classifier of `network_name`, fine-tuned for `steps` on crops of images uint8 [N, 3, H, W] and their mirrors.

    Args:
        batch_size: at most as many as there are images to learn from.
    """

    def fit(real: Rows, generated: Rows) -> Score:
        torch.manual_seed(seed)
        g = torch.Generator().manual_seed(seed)
        model: Any = make_classifier(network_name(), 2, width=32).to(device).train()
        _, mean, std = preprocessing(model, 224)

        def shrunk(images: Tensor, side: int) -> Tensor:
            x = F.interpolate(to_unit(images.to(device)), size=(side, side), mode="bilinear", antialias=True)
            return (x - mean) / std

        optimizer = torch.optim.AdamW(model.parameters(), 7e-4, weight_decay=0.02)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 7e-4, max(steps, 2), pct_start=0.1)
        half = min(batch_size // 2, len(real))
        labels = torch.arange(2, device=device).repeat_interleave(half)
        for _ in range(steps):
            drawn = [x[torch.randint(len(x), (half,), generator=g)] for x in (real, generated)]
            top, left = torch.randint(33, (2,), generator=g).tolist()
            x = shrunk(torch.cat(drawn), 256)[:, :, top : top + 224, left : left + 224]
            mirrored = (torch.rand(len(x), 1, 1, 1, generator=g) < 0.5).to(device)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
                logits = model(torch.where(mirrored, x.flip(-1), x)).logits
            F.cross_entropy(logits.float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        model.eval()

        @torch.no_grad()
        def score(images: Rows) -> Tensor:
            parts = [model(shrunk(part, 224)).logits.float() for part in images.split(batch_size)]
            return (torch.cat(parts)[:, 1] - torch.cat(parts)[:, 0]).cpu()

        return score

    return fit
