"""Training batches of the filter head: captions of each class, images with grades; and its losses."""

import torch
import torch.nn.functional as F

from ... import MinimPipeline
from ...evaluation.judges import Class, Families, class_of, families_of, merged_class
from ...minim_filter import FilterHead
from ..image_text_encoder import copy_loss
from . import rubric
from .config import FilterConfig
from .data import Drawn, Pool
from .estimates import NoisedEstimates
from .raters import Raters
from .realism import Counterparts


Batch = dict[str, torch.Tensor]
REALISM_LOSS_WEIGHT = 0.5  # of a head to go on from that rates it, where none is given


class Captions:
    """Captions of N rows by class, (modality id, finding); their token ids are [N, variants, L]."""

    def __init__(self, rows: list[dict], classes: list[Class], ids: torch.Tensor):
        self.ids, device = ids, ids.device
        self.label = torch.tensor([classes.index(class_of(row)) for row in rows], device=device)
        of_class = [(self.label == k).nonzero()[:, 0] for k in range(len(classes))]
        self.count = torch.tensor([len(places) for places in of_class], device=device)
        self.table = torch.nn.utils.rnn.pad_sequence(of_class, batch_first=True)  # [K, most]
        modalities = [modality for modality, _ in classes]
        names = list(dict.fromkeys(modalities))
        self.modality = torch.tensor([names.index(m) for m in modalities], device=device)
        families = families_of(rows)
        alike = [[look_alike(a, b, families) for b in classes] for a in classes]
        self.alike = torch.tensor(alike, dtype=torch.float32, device=device)

    def of_rows(self, rows: torch.Tensor, g: torch.Generator) -> torch.Tensor:
        """Token ids [B, L] of the rows' captions, in some phrasing."""
        return self.ids[rows, torch.randint(self.ids.shape[1], rows.shape, device=rows.device, generator=g)]

    def of_classes(self, classes: torch.Tensor, g: torch.Generator) -> torch.Tensor:
        """Token ids [B, L] of some caption of each class."""
        chance = torch.rand(classes.shape, device=classes.device, generator=g)
        return self.of_rows(self.table[classes, (chance * self.count[classes]).long()], g)

    def ask(self, present: torch.Tensor, g: torch.Generator) -> torch.Tensor:
        """A class to ask for, given the one that is shown: int64 [B], in the rubric's shares."""
        shares = torch.tensor(list(rubric.CAPTION_SHARES.values()), device=present.device)
        how = torch.multinomial(shares, len(present), replacement=True, generator=g)[:, None]  # [B, 1]
        every = torch.arange(len(self.modality), device=present.device)[None]  # [1, K]
        same = self.modality[present][:, None] == self.modality[None]
        own = every == present[:, None]
        allowed = torch.where(how == 0, own, torch.where(how == 1, same & ~own, ~same)).float()
        allowed = torch.where(allowed.sum(1, keepdim=True) > 0, allowed, own.float())
        return torch.multinomial(allowed, 1, generator=g)[:, 0]

    def grades(self, shows: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
        """Probabilities [B, 3] of the finding's grades 1 to 3, from what is shown [B, K] and asked for [B]."""
        right = shows.gather(1, asked[:, None])[:, 0]
        alike = (shows * self.alike[asked]).sum(1)
        return torch.stack([(1 - right - alike).clamp(min=0), alike, right], 1)


def look_alike(a: Class, b: Class, families: Families | None = None) -> bool:
    """Whether two classes are not the same, and yet of one family: what they show is the same."""
    return a != b and merged_class(*a, families) == merged_class(*b, families)


class Lessons:
    """Makes training batches from the pool, the trajectories and the counterparts, with the U-Net's estimates."""

    def __init__(
        self,
        config: FilterConfig,
        pipe: MinimPipeline,
        captions: Captions,
        pool: Pool,
        drawn: Drawn,
        counterparts: Counterparts | None = None,
    ):
        self.config, self.captions, self.pool, self.drawn = config, captions, pool, drawn
        self.estimates, self.weights = NoisedEstimates(pipe, config.bf16), pool.weights()
        self.counterparts = counterparts
        if counterparts is not None:
            self.counterpart_weights = counterparts.weights()

    def drawn_batch(self, count: int, g: torch.Generator) -> Batch:
        """`count` of each kind that a step sees."""
        kinds = [self.from_pool(count, g), self.from_trajectories(count, g)]
        if self.counterparts is not None:
            kinds.append(self.from_counterparts(self.counterparts, count, g))
        return join_batches(*kinds)

    def unknown(self, count: int) -> Batch:
        """What a batch says of images of which nothing is known."""
        shows = self.pool.shows.new_zeros(count, self.pool.shows.shape[1])
        label = torch.zeros(count, dtype=torch.long, device=shows.device)
        return {
            "quality": label,
            "finding": shows.new_zeros(count, 3),
            "readable": torch.zeros(count, dtype=torch.bool, device=shows.device),
            "shows": shows,
            "rater": label - 1,
            "real": label - 1,  # 1 of a real image, 0 of its generated counterpart, -1 of what is not compared
        }

    def from_pool(self, count: int, g: torch.Generator) -> Batch:
        """Images of the pool, some finished and some noised, with right and wrong captions."""
        index = torch.multinomial(self.weights, count, replacement=True, generator=g)
        latents, shows = self.pool.latents[index].float(), self.pool.shows[index]
        present = torch.multinomial(shows + 1e-9, 1, generator=g)[:, 0]
        asked = self.captions.ask(present, g)
        ids = self.captions.of_classes(asked, g)
        return self.unknown(count) | {
            **self.noised(latents, ids, g),
            "quality": self.pool.quality[index],
            "finding": self.captions.grades(shows, asked),
            "readable": self.pool.readable[index],
            "shows": shows,
        }

    def noised(self, latents: torch.Tensor, ids: torch.Tensor, g: torch.Generator) -> Batch:
        """What the head is given of images, of which `clean_share` stay finished, for captions."""
        noisy, clean, angle = self.estimates.of_half(latents, ids, round(self.config.clean_share * len(ids)), g)
        return {"noisy": noisy, "clean": clean, "angle": angle, "ids": ids}

    def from_counterparts(self, counterparts: Counterparts, count: int, g: torch.Generator) -> Batch:
        """Real and generated pictures alike often, some finished and some noised, with right captions.

        Nothing but real or not is said of them. What samplers hold on their way takes no part: they leave marks of
        their own in it, and real images have nothing to set beside it.
        """
        index = torch.multinomial(self.counterpart_weights, count, replacement=True, generator=g)
        ids = self.captions.of_classes(counterparts.label[index], g)
        held = self.noised(counterparts.latents[index].float(), ids, g)
        return self.unknown(count) | {**held, "real": counterparts.real[index].long()}

    def from_trajectories(self, count: int, g: torch.Generator) -> Batch:
        """What the sampler held at some step, with the caption that it was given."""
        t, device = self.drawn.trajectories, g.device
        index = torch.randint(len(t.angle), (count,), device=device, generator=g)
        step = torch.randint(t.angle.shape[1], (count,), device=device, generator=g)
        rows = self.drawn.row[index]
        shows = self.drawn.shows[index]
        return self.unknown(count) | {
            "noisy": t.noisy[index, step].float(),
            "clean": t.clean[index, step].float(),
            "angle": t.angle[index, step],
            "ids": self.captions.of_rows(rows, g),
            "quality": self.drawn.quality[index],
            "finding": self.captions.grades(shows, self.captions.label[rows]),
            # What a sampler that stops at two steps draws cannot be read.
            "readable": self.drawn.quality[index] > 1,
            "shows": shows,
        }

    def from_grades(self, graded: tuple, count: int, g: torch.Generator) -> Batch:
        """Images that people graded, as of `load_graded`, finished; nothing is asked of the finding."""
        latents, grades, rater = graded
        index = torch.randint(len(latents), (count,), device=latents.device, generator=g)
        version = torch.randint(latents.shape[1], (count,), device=latents.device, generator=g)
        x = latents[index, version].float()
        classes = torch.zeros(count, dtype=torch.long, device=x.device)
        return self.unknown(count) | {
            "noisy": x,
            "clean": x,
            "angle": x.new_zeros(count),
            "ids": self.captions.of_classes(classes, g),
            "quality": grades[index],
            "rater": rater[index],
        }

    def pairs(self, count: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Two versions each of `count` real images, finished latents [count, C, h, w]."""
        versions = self.config.latent_variants
        images = int((self.pool.kind == 0).sum()) // versions  # the pool begins with them
        first = torch.randint(images, (count,), device=g.device, generator=g) * versions
        a, b = (torch.randint(versions, (count,), device=g.device, generator=g) for _ in range(2))
        return self.pool.latents[first + a].float(), self.pool.latents[first + b].float()

    def losses(self, head: FilterHead, batch: Batch, g: torch.Generator, raters: Raters | None = None) -> Batch:
        """All losses of a step, weighted, by name; their sum is what falls."""
        config = self.config
        parts = grading_losses(head, batch, self.captions, g, raters)
        parts["classes"] = config.class_weight * parts["classes"]
        if "realism" in parts:
            weight = REALISM_LOSS_WEIGHT if config.realism_loss_weight is None else config.realism_loss_weight
            parts["realism"] = weight * parts["realism"]
        if config.code_weight:
            parts["code"] = config.code_weight * code_loss(head, *self.pairs(min(128, config.train_batch_size), g))
        return parts


def join_batches(*batches: Batch) -> Batch:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def grading_losses(
    head: FilterHead, batch: Batch, captions: Captions, g: torch.Generator, raters: Raters | None = None
) -> Batch:
    """Negative log likelihood of both gradings; and of the classes shown by finished images, by one caption each.

    The last is contrastive (UniCL, arXiv 2204.03610), and leaves noised images out: their estimates follow the
    caption, so they would give it away. Where the head rates it, also the cross-entropy of real against generated.
    """
    bias = raters(batch["rater"]) if raters is not None else None
    output = head(batch["noisy"], batch["clean"], batch["angle"], batch["ids"], quality_bias=bias)
    known = batch["quality"] > 0
    target = F.one_hot((batch["quality"] - 1).clamp(min=0), 3).float()
    quality = -(target * output.quality_probs.clamp(min=1e-6).log()).sum(1)
    finding = -(batch["finding"] * output.finding_probs.clamp(min=1e-6).log()).sum(1)
    plain = (batch["angle"] == 0) & batch["readable"]
    texts = head.encode_text(captions.of_classes(torch.arange(len(captions.count), device=known.device), g))
    classes = -(batch["shows"] * (3 * head.match(output.features, texts[:, None]).T).log_softmax(1)).sum(1)

    def mean(values: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        return (values * where).sum() / where.sum().clamp(min=1)

    parts = {
        "quality": mean(quality, known),
        "finding": mean(finding, batch["readable"]),
        "classes": mean(classes, plain),
    }
    if output.realism is not None:
        real = batch["real"]
        entropy = F.binary_cross_entropy_with_logits(output.realism, real.clamp(min=0).float(), reduction="none")
        parts["realism"] = mean(entropy, real >= 0)
    return parts


def code_loss(head: FilterHead, a: torch.Tensor, b: torch.Tensor, temperature: float = 0.1) -> torch.Tensor:
    """Versions of one image shall have one code, and other images others (InfoNCE, arXiv 1807.03748).

    tanh, so that little is lost when signs are taken, as in HashNet (arXiv 1702.00758).
    """
    x = torch.cat([a, b])
    codes = F.normalize(head.code(head.encode_image(x, x, x.new_zeros(len(x)))[0]).tanh(), dim=1)  # [2 N, B]
    return copy_loss(codes[: len(a)], codes[len(a) :], temperature)
