"""The page that draws images: Gradio components around one call of the pipeline."""

import html
import json
import shutil
import tempfile
import time
import urllib.parse
import zipfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import gradio as gr
import torch

from minim_pipeline import MODALITIES, MinimPipeline, check_caption
from minim_pipeline.data.sources import DatasetWriter
from minim_pipeline.generate.plan import Item
from minim_pipeline.generate.write import describe


EXAMPLES = json.loads((Path(__file__).parent / "pages" / "examples.json").read_text(encoding="utf-8"))
NOTICE = "Synthetic images, for research and teaching. Not a medical device: never for anybody's diagnosis or care."
PROGRESS = gr.Progress()  # Gradio finds it among a function's defaults, and hands out one for each call
REASONS = {
    "quality": "for their quality",
    "finding": "for the finding",
    "copy": "as copies of training images",
    "realism": "because they do not look like real ones",
}


@dataclass(frozen=True)
class Limits:
    """The most that one call may ask of the server; the pages' sliders end there, and the server checks it again."""

    images: int = 8
    candidates: int = 8
    steps: int = 50
    guidance: float = 10.0
    prompt: int = 300  # characters
    opened: int = 8  # rejected candidates drawn at once

    def __post_init__(self):
        if min(asdict(self).values()) < 1:
            raise ValueError(f"Limits have to be at least 1, got {self}.")


@dataclass(frozen=True)
class Settings:
    """What was asked for; `check` makes one of what a browser sends."""

    modality: str
    prompt: str
    images: int
    seed: int
    steps: int
    guidance: float
    candidates: int

    @property
    def query(self) -> str:
        return "?" + urllib.parse.urlencode(asdict(self))


def check(limits: Limits, trained: list[str], **asked) -> Settings:
    """Settings within the limits; ValueError with what was given and what is allowed for one that is not possible."""
    if asked["modality"] not in trained:
        raise ValueError(f"Choose a modality: {', '.join(trained)} (got {str(asked['modality'])[:40]!r}).")
    prompt = " ".join(str(asked["prompt"] or "").split())
    if not prompt:
        raise ValueError("Say what the image is to show.")
    check_caption(prompt)
    if len(prompt) > limits.prompt:
        raise ValueError(f"The description has {len(prompt)} characters, at most {limits.prompt} are allowed.")
    bounds = {
        "images": (int, 1, limits.images),
        "seed": (int, 0, 2**31 - 1),
        "steps": (int, 2, limits.steps),
        "guidance": (float, 1, limits.guidance),
        "candidates": (int, 1, limits.candidates),
    }
    numbers = {}
    for name, (kind, low, high) in bounds.items():
        try:
            value = float(asked[name])
            if not low <= value <= high or (kind is int and value != int(value)):
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            what, given = "a whole number" if kind is int else "a number", str(asked[name])[:40]
            raise ValueError(f"{name} has to be {what} from {low} to {high}, got {given!r}.") from None
        numbers[name] = kind(value)
    return Settings(asked["modality"], prompt, **numbers)


class Drawer:
    """Draws what was asked for with one pipeline, one call after the other."""

    def __init__(self, pipe: MinimPipeline, model: str, revision: str):
        self.pipe, self.model, self.revision = pipe, model, revision
        self.folder = tempfile.TemporaryDirectory(prefix="minim-")

    def draw(self, settings: Settings, progress) -> tuple:
        """The pipeline's output, and the seeds of the candidates that did not come back."""

        def generators() -> list[torch.Generator]:
            return [torch.Generator().manual_seed(settings.seed + i) for i in range(settings.images)]

        # A single candidate is drawn from its generator itself, and nothing is left out.
        drawn = range(settings.images) if settings.candidates > 1 else []
        seeds = self.pipe.draw_seeds(drawn, settings.candidates, generators())
        options = {"generator": generators(), "num_candidates": settings.candidates}
        output = self.call(settings, settings.images, progress, **options)
        return output, [seed for seed in seeds if seed not in output.seeds]

    def redraw(self, settings: Settings, seeds: list[int], progress):
        """The images of single candidates, with their ratings."""
        return self.call(settings, len(seeds), progress, seeds=seeds)

    def call(self, settings: Settings, images: int, progress, **options):
        def on_step_end(pipe, step, timestep, tensors):
            progress((step + 1, pipe.num_timesteps), desc="Drawing", unit="steps")
            return {}

        return self.pipe(
            settings.prompt,
            settings.modality,
            num_images_per_prompt=images,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            callback_on_step_end=on_step_end,
            **options,
        )

    def write(self, settings: Settings, output) -> tuple[list[Path], Path]:
        """PNGs with their provenance, and a ZIP of them and `data.csv`: what `minim generate` writes."""
        # Gradio copies what it serves as soon as a call is over: what is older is no longer needed.
        for old in Path(self.folder.name).iterdir():
            if old.stat().st_mtime < time.time() - 600:
                shutil.rmtree(old, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(dir=self.folder.name))
        made = {"model": self.model, "revision": self.revision, "steps": settings.steps, "guidance": settings.guidance}
        made |= {"scheduler": type(self.pipe.scheduler).__name__, "num_candidates": settings.candidates}
        if not self.pipe.config.modalities:
            made["modality_learned"] = "false"
        columns = ["score", "accepted", "drawn_seed", "synthetic", *made]
        writer = DatasetWriter(folder / "images", columns, made)
        paths = []
        for i, image in enumerate(output.images):
            item = Item(i, settings.prompt, MODALITIES[settings.modality], settings.seed + i)
            paths.append(writer.add(i, image, *describe(item, output, i, made)))
        writer.finish()
        archived = folder / f"minim-{settings.modality}-{settings.seed}.zip"
        with zipfile.ZipFile(archived, "w", zipfile.ZIP_STORED) as archive:
            for file in sorted((folder / "images").iterdir()):
                archive.write(file, file.name)
        return paths, archived


def captions(output) -> list[str]:
    """What stands below each image."""
    words = {True: "✓ accepted, score {:.2f} of 3", False: "✗ not accepted, score {:.2f} of 3", None: "not rated"}
    return [words[accepted].format(score) for score, accepted in zip(output.scores, output.accepted)]


def summarise(output, seconds: float) -> str:
    """What came of it, in a sentence or two."""
    if output.scores[0] is None:
        return f"{len(output.images)} images in {seconds:.0f} s."
    accepted, drawn = sum(output.accepted), sum(output.candidates)
    why = {reason: sum(counts.get(reason, 0) for counts in output.rejected) for reason in REASONS}
    reasons = ", ".join(f"{count} {REASONS[reason]}" for reason, count in why.items() if count)
    left_out = f" Of {drawn} candidates it left out {sum(why.values())}: {reasons}." if reasons else ""
    return f"The filter accepted {accepted} of {len(output.images)} images, in {seconds:.0f} s.{left_out}"


def count(most: int, value: int, label: str, **options) -> gr.Slider | gr.Number:
    """A slider from 1 to `most`, or the number 1, which nobody sees, where that is all there is to choose."""
    if most == 1:
        return gr.Number(1, precision=0, label=label, visible=False)
    return gr.Slider(1, most, min(value, most), step=1, label=label, **options)


def add_controls(config, trained: list[str], limits: Limits) -> tuple[dict[str, gr.components.Component], gr.Button]:
    """What is asked for, by the names of `Settings`, and the button that draws it."""
    modalities = [(MODALITIES[m].name, m) for m in trained]
    first = EXAMPLES.get(trained[0], [""])[0]
    steps, guidance, candidates = config.num_inference_steps, config.guidance_scale, config.num_candidates
    controls = {
        "modality": gr.Dropdown(modalities, value=trained[0], label="Modality"),
        "prompt": gr.Textbox(first, label="What it shows", lines=2, max_length=limits.prompt),
        "images": count(limits.images, 4, "Images"),
    }
    go = gr.Button("Generate", variant="primary")
    with gr.Accordion("Settings", open=False):
        same = "the same seed draws the same images"
        controls |= {
            "seed": gr.Number(0, label="Seed", info=same, precision=0, minimum=0),
            "steps": gr.Slider(2, limits.steps, min(steps, limits.steps), step=1, label="Steps"),
            "guidance": gr.Slider(1, limits.guidance, min(guidance, limits.guidance), step=0.1, label="Guidance"),
            "candidates": count(
                limits.candidates, candidates, "Candidates for each image", info="of which the filter chooses one"
            ),
        }
    return controls, go


def add_results(limits: Limits, has_filter: bool) -> dict[str, gr.components.Component]:
    """Where the images appear, and what the filter left out."""
    look = {"height": "auto", "format": "png"}
    full = {"object_fit": "contain", "buttons": ["fullscreen"]} | look
    found = {"gallery": gr.Gallery(label="Generated images", columns=2, **full)}
    found["summary"] = gr.Markdown("", elem_id="told")
    with gr.Row():
        found["download"] = gr.DownloadButton("Download ZIP", interactive=False)
        found["link"] = gr.Textbox(label="Link to these settings", interactive=False, buttons=["copy"])
    with gr.Accordion("What the filter left out", open=False, visible=has_filter):
        gr.Markdown(f"Candidates are dropped before they are pictures; here up to {limits.opened} are drawn.")
        found["look"] = gr.Button("Draw what was left out", interactive=False)
        found["left_out"] = gr.Gallery(label="Left out by the filter", columns=4, **look)
    return found


def build(drawer: Drawer, limits: Limits, on_gpu=lambda function: function) -> None:
    """Adds the page to the `gr.Blocks` that is open.

    Args:
        on_gpu: decorates what needs the GPU, as `spaces.GPU` does.
    """
    config = drawer.pipe.config
    trained = [name for name in MODALITIES if name in (config.modalities or MODALITIES)]
    has_filter = drawer.pipe.filter_head is not None
    limits = limits if has_filter else replace(limits, candidates=1)
    draw, redraw = on_gpu(drawer.draw), on_gpu(drawer.redraw)

    gr.Markdown(f"**{NOTICE}**")
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            controls, go = add_controls(config, trained, limits)
        with gr.Column(scale=3, min_width=300):
            results = add_results(limits, has_filter)
    examples = [[m, text] for m in trained for text in EXAMPLES.get(m, [])]
    prompt, link = controls["prompt"], results["link"]
    gr.Examples(examples, [controls["modality"], prompt], label="Examples", api_visibility="private")
    drawn = gr.State()

    def checked(values) -> Settings:
        try:
            return check(limits, trained, **dict(zip(controls, values)))
        except ValueError as error:
            message = html.escape(str(error), quote=False)
            raise gr.Error(message, title="This cannot be drawn", print_exception=False) from error

    def on_draw(*values, progress=PROGRESS):
        settings, start = checked(values), time.monotonic()
        output, others = draw(settings, progress)
        paths, archive = drawer.write(settings, output)
        return (
            list(zip(paths, captions(output))),
            summarise(output, time.monotonic() - start),
            gr.DownloadButton(value=archive, interactive=True),
            (settings, others),
            settings.query,
            gr.Button(interactive=bool(others)),
            [],
        )

    def on_look(state, progress=PROGRESS):
        if not state or not state[1]:
            raise gr.Error("Nothing was left out.", print_exception=False)
        settings, seeds = state
        output = redraw(settings, seeds[: limits.opened], progress)
        return list(zip(drawer.write(settings, output)[0], captions(output)))

    def on_load(request: gr.Request):
        """Settings from a link; what is not possible is left as it is, and told."""
        asked = {name: value for name, value in request.query_params.items() if name in controls}
        values = {name: component.value for name, component in controls.items()} | asked
        try:
            if asked:
                settings = asdict(check(limits, trained, **values))
                return [settings[name] for name in controls]
        except ValueError as error:
            gr.Warning(html.escape(f"The link asks for what is not possible: {error}", quote=False))
        return [gr.skip()] * len(controls)

    outputs = [results[name] for name in ("gallery", "summary", "download")]
    outputs += [drawn, *(results[name] for name in ("link", "look", "left_out"))]
    # One queue for all that touches the pipeline: Gradio's limit is of each event alone.
    alone = {"concurrency_id": "pipeline", "concurrency_limit": 1}
    gr.on([go.click, prompt.submit], on_draw, list(controls.values()), outputs, api_name="generate", **alone).success(
        None, link, link, js="(query) => location.origin + location.pathname + query", api_visibility="private"
    )
    results["look"].click(on_look, drawn, results["left_out"], api_visibility="private", **alone)
    gr.context.Context.root_block.load(on_load, None, list(controls.values()), api_visibility="private")
