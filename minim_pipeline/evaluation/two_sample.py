"""The classifier two-sample test: how well something fresh tells generated images from real ones (arXiv 1610.06545).

It learns from one half of both sets and is asked about the other half, and the other way round. An AUROC of 0.5 means
that the sets cannot be told apart, 1 that every image can. It grows with the number of images to learn from, so both
sets are equally large, and its floor is real against other real images, of the same number.

`ridge` learns from features, in milliseconds; `network` is fine-tuned on the images themselves.
"""

from collections.abc import Callable, Hashable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .classifier import make_resnet
from .imagenet import LITE0, SIDE, lite0_installed, make_lite0, to_lite0
from .metrics import auroc, places


FEWEST = 8  # images of each set
Score = Callable[[Tensor], Tensor]  # items [n, ...] -> how far each looks generated, float [n] on the CPU
Fit = Callable[[Tensor, Tensor], Score]  # real and generated items to learn from


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


def held_out_scores(real: Tensor, generated: Tensor, groups: Sequence[Sequence[Hashable]], fit: Fit) -> list[Tensor]:
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
        score = fit(real[learned_real], generated[learned_generated])
        scores += [score(real[~learned_real]), score(generated[~learned_generated])]
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
    return LITE0 if lite0_installed() else "resnet"


def network(steps: int, device: torch.device | str = "cpu", batch_size: int = 64, seed: int = 0) -> Fit:
    """A fresh network, fine-tuned for `steps` on crops of images uint8 [N, 3, H, W], and their mirror images.

    Args:
        batch_size: at most as many as there are images to learn from.
    """

    def fit(real: Tensor, generated: Tensor) -> Score:
        torch.manual_seed(seed)
        g = torch.Generator().manual_seed(seed)
        model = make_lite0(2) if lite0_installed() else make_resnet(2, 32)
        model.to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), 7e-4, weight_decay=0.02)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 7e-4, max(steps, 2), pct_start=0.1)
        half = min(batch_size // 2, len(real))
        labels = torch.arange(2, device=device).repeat_interleave(half)
        for _ in range(steps):
            drawn = [x[torch.randint(len(x), (half,), generator=g)] for x in (real, generated)]
            top, left = torch.randint(33, (2,), generator=g).tolist()
            x = to_lite0(torch.cat(drawn).to(device), SIDE + 32)[:, :, top : top + SIDE, left : left + SIDE]
            mirrored = (torch.rand(len(x), 1, 1, 1, generator=g) < 0.5).to(device)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
                loss = F.cross_entropy(_logits(model, torch.where(mirrored, x.flip(-1), x)), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        model.eval()

        @torch.no_grad()
        def score(images: Tensor) -> Tensor:
            parts = [_logits(model, to_lite0(part.to(device))) for part in images.split(batch_size)]
            return (torch.cat(parts)[:, 1] - torch.cat(parts)[:, 0]).cpu()

        return score

    return fit


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    """float32 [N, 2], of a network of transformers, too."""
    output = model(x)
    return (output if isinstance(output, Tensor) else output.logits).float()
