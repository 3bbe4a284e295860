"""Draws what the page asks for with one pipeline, one call after the other, and writes it with its provenance."""

import itertools
import shutil
import statistics
import tempfile
import time
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from generate_settings import Settings

from minim_pipeline import MODALITIES, MinimPipeline
from minim_pipeline.data.sources import DatasetWriter
from minim_pipeline.generate.plan import Item
from minim_pipeline.generate.write import describe
from minim_pipeline.pipeline_output import MinimPipelineOutput


class Stopped(Exception):
    """The visitor who asked for the images has asked to stop."""


@dataclass
class Drawn(MinimPipelineOutput):
    """A pipeline's output, and why each image was not accepted, as `MinimScores.reasons`."""

    reasons: list[str | None] = field(default_factory=list)


class Drawer:
    """Draws with one pipeline.

    Args:
        model, revision: what the files say of where they come from.

    Attributes:
        modalities: those that can be drawn, by their ids.
    """

    def __init__(self, pipe: MinimPipeline, model: str, revision: str):
        self.pipe, self.model, self.revision = pipe, model, revision
        known = MODALITIES | {modality.id: modality for modality in pipe.own_modalities}
        self.modalities = {name: known[name] for name in known if name in (pipe.config.modalities or known)}
        self.folder = tempfile.TemporaryDirectory(prefix="minim-")

    def draw(self, settings: Settings, progress, call: str | None = None) -> tuple[Drawn, list[int]]:
        """The images, and the seeds of the candidates that did not come back; `call` is what `stop` calls this one."""

        def generators() -> list[torch.Generator]:
            return [torch.Generator().manual_seed(settings.seed + i) for i in range(settings.images)]

        # A single candidate is drawn from its generator itself, and nothing is left out.
        drawn = range(settings.images) if settings.candidates > 1 else []
        seeds = self.pipe.draw_seeds(drawn, settings.candidates, generators())
        options = {"generator": generators(), "num_candidates": settings.candidates}
        output = self.call(settings, settings.images, progress, call, **options)
        return output, [seed for seed in seeds if seed not in output.seeds]

    def redraw(self, settings: Settings, seeds: list[int], progress, call: str | None = None) -> Drawn:
        """The images of single candidates, with their ratings."""
        return self.call(settings, len(seeds), progress, call, seeds=seeds)

    def call(self, settings: Settings, images: int, progress, call: str | None, **options) -> Drawn:
        ends = [time.monotonic()]  # of the steps

        def on_step_end(pipe, step, timestep, tensors):
            self.go_on(call)
            ends.append(time.monotonic())
            pace = statistics.mean(end - start for start, end in itertools.pairwise(ends[-4:]))
            left = pace * (pipe.num_timesteps - step - 1)
            told = f"Drawing, about {max(1, round(left))} s left" if left else "Decoding and rating"
            progress((step + 1, pipe.num_timesteps), desc=told, unit="steps")
            return {}

        self.go_on(call)  # it may have been stopped while it waited
        output = self.pipe(
            settings.prompt,
            settings.modality,
            num_images_per_prompt=images,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            callback_on_step_end=on_step_end,
            **options,
        )
        reasons: list[str | None] = [None] * images
        weak = [i for i, accepted in enumerate(output.accepted) if accepted is False]
        if weak:
            rated = self.pipe.score([output.images[i] for i in weak], settings.prompt, settings.modality)
            for i, reason in zip(weak, rated.reasons):
                reasons[i] = reason
        return Drawn(**output, reasons=reasons)

    def stop(self, call: str) -> None:
        """Ends a call at its next step. A file says so, because a lent GPU's calls run in a process of their own."""
        self.stop_file(call).touch()

    def go_on(self, call: str | None) -> None:
        """Raises `Stopped` if this call has been stopped."""
        if call is not None and self.stop_file(call).exists():
            raise Stopped

    def stop_file(self, call: str) -> Path:
        return Path(self.folder.name) / f"{call}.stop"

    def write(self, settings: Settings, output: Drawn, second: Drawn | None = None) -> tuple[list[Path], Path]:
        """PNGs with their provenance, and a ZIP of them and `data.csv`: what `minim generate` writes.

        `second` are the images of `settings.second`, drawn from the seeds of `output`.
        """
        self.clean()
        folder = Path(tempfile.mkdtemp(dir=self.folder.name))
        made = {"model": self.model, "revision": self.revision, "steps": settings.steps, "guidance": settings.guidance}
        made |= {"scheduler": type(self.pipe.scheduler).__name__}
        if not self.pipe.config.modalities:
            made["modality_learned"] = "false"
        columns = ["score", "accepted", "drawn_seed", "synthetic", *made, "num_candidates"]
        writer = DatasetWriter(folder / "images", columns, made)
        paths: list[Path] = []
        sides = [(settings, output)]
        if second is not None:
            sides.append((replace(settings, prompt=settings.second, candidates=1), second))
        for side, drawn in sides:
            # A single candidate's own seed draws it again, whichever generator it came from.
            single, said = drawn.candidates[0] == 1, made | {"num_candidates": drawn.candidates[0]}
            for i, image in enumerate(drawn.images):
                seed = drawn.seeds[i] if single else settings.seed + i
                item = Item(len(paths), side.prompt, self.modalities[side.modality], seed)
                paths.append(writer.add(len(paths), image, *describe(item, drawn, i, said)))
        writer.finish()
        archived = folder / f"minim-{settings.modality}-{settings.seed}.zip"
        with zipfile.ZipFile(archived, "w", zipfile.ZIP_STORED) as archive:
            for file in sorted((folder / "images").iterdir()):
                archive.write(file, file.name)
        return paths, archived

    def clean(self) -> None:
        """Gradio copies what it serves as soon as a call is over: what is older is no longer needed."""
        for old in Path(self.folder.name).iterdir():
            if old.stat().st_mtime < time.time() - 600:
                if old.is_dir():
                    shutil.rmtree(old, ignore_errors=True)
                else:
                    old.unlink(missing_ok=True)
