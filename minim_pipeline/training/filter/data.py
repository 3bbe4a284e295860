"""What the filter head learns from: latents with grades, real and generated, whole and damaged, and trajectories."""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ... import MinimPipeline
from ...cache import cached_tensors
from ...data.image_loading import key_of
from ...data.image_reader import files_key
from ...data.mapped_images import IMAGES, map_images
from ...evaluation.judges import Judges, class_of, load_judges
from ...evaluation.sampling import joined
from ...loading import model_identity
from ...mapped import Rows
from ..latents import augment
from ..randomness import step_generator
from ..rows import mirrored, tell_mirrored
from . import rubric
from .config import FilterConfig
from .estimates import Trajectories, draw_trajectories


KINDS = ("real", "real, damaged", "generated", "generated, damaged")


@dataclass
class Pool:
    """Clean latents and what is known of them."""

    latents: torch.Tensor  # half [P, C, h, w], scaled as the U-Net takes them
    quality: torch.Tensor  # int64 [P], 1 to 3; 0 where it is not known
    shows: torch.Tensor  # [P, K], the probability of each class; zeros where nothing can be seen
    readable: torch.Tensor  # bool [P], whether the finding's grade is known
    kind: torch.Tensor  # int64 [P], index into `KINDS`
    modality: torch.Tensor  # int64 [P], index into the modalities

    def weights(self) -> torch.Tensor:
        """How often each is drawn: every kind of every modality alike, damaged ones as the rubric says."""
        group = self.kind * (self.modality.max() + 1) + self.modality
        damaged = self.kind % 2 == 1
        share = torch.where(damaged, rubric.DAMAGED_SHARE, 1 - rubric.DAMAGED_SHARE)
        return share / torch.bincount(group)[group]


@dataclass
class Drawn:
    """Trajectories and what came of them."""

    trajectories: Trajectories
    quality: torch.Tensor  # int64 [N], of the sampler
    shows: torch.Tensor  # [N, K], the probability of each class
    row: torch.Tensor  # int64 [N], of the caption


@torch.no_grad()
def encode(
    pipe: MinimPipeline, images: Rows | Iterable[torch.Tensor], bf16: bool, batch_size: int = 64
) -> torch.Tensor:
    """Latents, half [N, C, h, w] on the CPU, scaled as the U-Net takes them, of images uint8 [N, 3, H, W] or parts."""
    given = [images] if isinstance(images, Rows) else images
    latents = []
    for x in tqdm((part for some in given for part in some.split(batch_size)), "encoding", mininterval=2):
        with torch.autocast(pipe.device.type, torch.bfloat16, enabled=bf16):  # and not what gives the parts
            latents.append(pipe.encode_images(x.to(pipe.device).float() / 127.5 - 1).half().cpu())
    return torch.cat(latents)


def versions(
    rows: list[dict], images: Rows, count: int, seed: int, device: torch.device, no_mirror: bool = False
) -> Iterator[torch.Tensor]:
    """`count` mildly changed versions of images uint8 [N, 3, H, W], the first unchanged: in parts [n * count, ...]."""
    may_mirror = torch.tensor(mirrored(rows, no_mirror), device=device)
    g = step_generator(seed, 1, 0, device)
    for x, mirror in zip(images.split(64), may_mirror.split(64), strict=True):
        x = x.to(device).float() / 255
        made = [x] + [augment(x, mirror, v, g) for v in range(1, count)]
        yield (torch.stack(made, 1).flatten(0, 1) * 255).round().to(torch.uint8).cpu()


def damaged(images: Rows, quality: int, seed: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Images uint8 [N, 3, H, W] damaged down to a quality, by the rubric, in parts."""
    g = step_generator(seed, quality, 1, device)
    for part in images.split(64):
        x, _ = rubric.damage(part.to(device).float() / 255, quality, g)
        yield (x * 255).round().to(torch.uint8).cpu()


def draw(
    pipe: MinimPipeline, teacher: Judges, rows: list[dict], classes: list[tuple[str, str]], config: FilterConfig
) -> Drawn:
    """Draws `drawn_images` trajectories with the rubric's samplers, and has the teacher say what came of them."""
    generator, total_weight = random.Random(config.seed), sum(sampler.weight for sampler in rubric.SAMPLERS)
    sizes = config.draw_batch_size, config.trajectory_steps
    parts, quality, chosen = [], [], []
    for i, sampler in enumerate(rubric.SAMPLERS):
        total = max(1, round(config.drawn_images * sampler.weight / total_weight))
        index = [generator.randrange(len(rows)) for _ in range(total)]
        seeds = [(config.seed * 1000 + i) * 10**6 + j for j in range(total)]
        parts.append(draw_trajectories(pipe, [rows[j] for j in index], sampler, seeds, *sizes, config.bf16))
        quality += [sampler.quality] * total
        chosen += index
    drawn = joined(parts)
    shows = restrict(teacher.judge(drawn.images), teacher.classes, classes, [class_of(rows[j])[0] for j in chosen])
    return Drawn(drawn, torch.tensor(quality), shows, torch.tensor(chosen))


def restrict(
    probabilities: torch.Tensor, known: list[tuple[str, str]], classes: list[tuple[str, str]], modalities: list[str]
) -> torch.Tensor:
    """The teacher's probabilities [N, known] over `classes`, within each image's modality: [N, K]."""
    result = torch.zeros(len(probabilities), len(classes))
    for i, (modality, finding) in enumerate(known):
        if (modality, finding) in classes:
            result[:, classes.index((modality, finding))] = probabilities[:, i]
    names = [modality for modality, _ in classes]
    mask = torch.tensor([[name == modality for name in names] for modality in modalities])
    result = result * mask
    return result / result.sum(1, keepdim=True).clamp(min=1e-6)


def build_pool(
    rows: list[dict],
    images: Rows,
    classes: list[tuple[str, str]],
    drawn: Drawn,
    pipe: MinimPipeline,
    rated: set[str],
    config: FilterConfig,
) -> Pool:
    """Real images in several versions, generated ones of the good samplers, and damaged ones of both.

    Images are those of the rows, uint8 [N, 3, H, W]; `rated` are the paths of those that people have graded.
    """
    names = list(dict.fromkeys(modality for modality, _ in classes))
    labels = torch.tensor([classes.index(class_of(row)) for row in rows])
    one_hot = torch.nn.functional.one_hot(labels, len(classes)).float()
    modality = torch.tensor([names.index(class_of(row)[0]) for row in rows])
    # What people have graded is not called good because it is real.
    known = torch.tensor([row["path"] not in rated for row in rows])

    def pool(kind: str, latents: torch.Tensor, quality: torch.Tensor, *others: torch.Tensor) -> Pool:
        shows, readable, modality = others
        return Pool(latents, quality, shows, readable, torch.full_like(quality, KINDS.index(kind)), modality)

    def times(tensor: torch.Tensor, n: int) -> torch.Tensor:
        return tensor.repeat_interleave(n, 0)

    n, device = config.latent_variants, pipe.device
    latents = encode(pipe, versions(rows, images, n, config.seed, device, config.no_mirror), config.bf16)
    readable = torch.ones(len(latents), dtype=torch.bool)
    parts = [pool(KINDS[0], latents, times(3 * known.long(), n), times(one_hot, n), readable, times(modality, n))]
    good = (drawn.quality == 3).nonzero()[:, 0]
    t, shows, place = drawn.trajectories, drawn.shows[good], modality[drawn.row[good]]
    ones = torch.ones(len(good), dtype=torch.bool)
    parts.append(pool(KINDS[2], t.final[good], 3 * ones.long(), shows, ones, place))
    real, generated = (KINDS[1], images, one_hot, modality), (KINDS[3], t.images[good], shows, place)
    for grade in (2, 1):
        for kind, whole, shows, place in (real, generated):
            latents = encode(pipe, damaged(whole, grade, config.seed, device), config.bf16)
            # Through strong damage nobody sees the finding; through mild damage one does.
            readable = torch.full((len(latents),), grade == 2)
            parts.append(pool(kind, latents, torch.full((len(latents),), grade), shows, readable, place))
    return joined(parts)


def load_materials(
    config: FilterConfig, pipe: MinimPipeline, rows: list[dict], classes: list[tuple[str, str]], rated: set[str]
) -> tuple[Pool, Drawn]:
    """Pool and trajectories; cached in `output_dir`, so that a run goes on with what it began with."""
    key = {name: getattr(config, name) for name in ("seed", "resolution", "latent_variants", "drawn_images")}
    key |= {"steps": config.trajectory_steps, "model": model_identity(config.pretrained_model_name_or_path)}
    key["teacher"] = files_key(sorted(Path(config.teacher).rglob("*")))
    key["rows"] = key_of(rows, config.train_data, config.reading)
    key["rated"] = sorted(rated)
    key["mirrored"] = mirrored(rows, config.no_mirror)
    tell_mirrored(config.train_data, rows, key["mirrored"])

    def make() -> dict[str, torch.Tensor]:
        drawn = draw(pipe, load_judges(config.teacher, pipe.device), rows, classes, config)
        path = config.output / IMAGES / "materials"
        images = map_images(path, rows, config.train_data, config.resolution, reading=config.reading)
        pool = build_pool(rows, images, classes, drawn, pipe, rated, config)
        made = {f"pool.{name}": tensor for name, tensor in vars(pool).items()}
        made |= {f"drawn.{name}": tensor for name, tensor in vars(drawn.trajectories).items() if name != "images"}
        return made | {"quality": drawn.quality, "shows": drawn.shows, "row": drawn.row}

    tensors = cached_tensors(config.output / "materials.safetensors", key, make)
    tensors = {name: tensor.to(pipe.device) for name, tensor in tensors.items()}
    pool = Pool(**{name[5:]: tensor for name, tensor in tensors.items() if name.startswith("pool.")})
    of_steps = {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("drawn.")}
    trajectories = Trajectories(**of_steps, images=torch.empty(0))
    return pool, Drawn(trajectories, tensors["quality"], tensors["shows"], tensors["row"])
