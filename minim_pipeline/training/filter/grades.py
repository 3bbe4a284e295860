"""People's grades of quality: further steps of the filter head with them, and how well it then foretells others."""

import copy

import torch
from torch.utils.data import TensorDataset

from ... import MinimPipeline
from ...data.image_loading import load_images
from ...minim_filter import FilterHead
from ..randomness import step_generator
from .config import FilterConfig
from .data import encode, versions
from .lessons import Lessons, join_batches
from .raters import Raters, learn_from_raters, learned_from, raters_report
from .report import cross_validate, quality_report


def load_graded(ratings: list[dict], config: FilterConfig, pipe: MinimPipeline) -> TensorDataset:
    """Of each rating the image's latents [versions, C, h, w], the grade, and the number of the rater."""
    device = pipe.device
    images = load_images(ratings, str(config.ratings), config.resolution, reading=config.reading_elsewhere())
    pictures = versions(ratings, images, config.latent_variants, config.seed, device, config.no_mirror)
    latents = encode(pipe.vae, pictures, config.bf16).unflatten(0, (len(ratings), -1)).to(device)
    grades = torch.tensor([int(row["rating"]) for row in ratings], device=device)
    names = [row["rater"] for row in ratings]
    return TensorDataset(latents, grades, Raters(names).index(names).to(device))


def learn_grades(
    head: FilterHead, lessons: Lessons, graded: tuple, names: list[str], seed: int
) -> tuple[FilterHead, Raters]:
    """A copy of the head after `rating_steps` more, half of them with people's grades; and what biases they have.

    Args:
        graded: items of `load_graded`, together.
        names: of all raters.
    """
    config = lessons.config
    device, count = graded[0].device, config.train_batch_size // 2
    head, raters = copy.deepcopy(head).train(), Raters(names).to(device)

    def loss(step: int) -> torch.Tensor:
        g = step_generator(seed, step, 7, device)
        batch = join_batches(
            lessons.from_grades(graded, count, g),
            lessons.from_pool(count, g),
            lessons.from_trajectories(count, g),
        )
        return sum(lessons.losses(head, batch, g, raters).values()) + raters.penalty(len(graded[1]))

    rate = config.rating_learning_rate
    learn_from_raters(head.parameters(), raters, loss, config.rating_steps, rate, config.max_grad_norm)
    return head.eval(), raters


def learn_all_grades(
    head: FilterHead, lessons: Lessons, ratings: list[dict], pipe: MinimPipeline
) -> tuple[FilterHead, dict]:
    """The head after learning from the ratings of its part; and a report, with `folds` of those it has not seen."""
    config, names = lessons.config, [row["rater"] for row in ratings]
    graded, report, guesses = load_graded(ratings, config, pipe), {}, None
    if config.folds:
        guesses = cross_validate(
            ratings,
            config.folds,
            config.seed,
            lambda index, fold: learn_grades(head, lessons, graded[index], names, fold)[0],
            graded.tensors[0][:, 0],
        )
        report["quality_cross_validated"] = quality_report(ratings, guesses)
    own = [i for i, row in enumerate(ratings) if learned_from(row, config.part)]
    head, raters = learn_grades(head, lessons, graded[own], names, config.folds)
    return head, report | raters_report(ratings, raters, guesses)
