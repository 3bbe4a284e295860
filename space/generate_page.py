"""The page that draws images: what happens when something on it is pressed."""

import html
import secrets
import time
from dataclasses import asdict, replace

import gradio as gr
from drawing import Drawer, Drawn, Stopped
from generate_controls import Controls, Results, add_controls, add_results
from generate_settings import Limits, Settings, check
from generate_words import captions, summarise
from vocabulary import Vocabulary, examples_of

from minim_pipeline.minim_filter.selection import Thresholds


NOTICE = "Synthetic images, for research and teaching. Not a medical device: never for anybody's diagnosis or care."
PROGRESS = gr.Progress()  # Gradio finds it among a function's defaults, and hands out one for each call
# One queue for all that touches the pipeline: Gradio's limit is of each event alone.
ALONE = {"concurrency_id": "pipeline", "concurrency_limit": 1, "trigger_mode": "multiple"}
QUICK = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


def build(drawer: Drawer, limits: Limits, on_gpu=lambda function: function) -> None:
    """Adds the page to the `gr.Blocks` that is open.

    Args:
        on_gpu: decorates what needs the GPU, as `spaces.GPU` does.
    """
    has_filter = drawer.pipe.filter_head is not None
    limits = limits if has_filter else replace(limits, candidates=1)
    gr.Markdown(f"**{NOTICE}**")
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            controls = add_controls(drawer, limits)
        with gr.Column(scale=3, min_width=300):
            results = add_results(limits, has_filter)
    add_choosing(drawer, limits, controls)
    add_drawing(drawer, limits, on_gpu, controls, results)


def add_choosing(drawer: Drawer, limits: Limits, controls: Controls) -> None:
    """What happens while a visitor chooses: examples follow the modality, and a link fills the page."""
    findings = drawer.pipe.config.findings or {}
    vocabulary = Vocabulary(drawer.modalities, findings)
    asked, prompt = controls.asked, controls.asked["prompt"]
    examples = {name: examples_of(name, findings) for name in drawer.modalities}

    def remark(modality, *prompts) -> str:
        if modality not in drawer.modalities:
            return ""
        said = dict.fromkeys(vocabulary.remark(str(text or "")[: limits.prompt], modality) for text in prompts)
        return " ".join(text for text in said if text)

    def dataset(modality) -> dict:
        own = examples.get(modality, [])
        return gr.update(samples=[[text] for text in own], visible=bool(own))

    def on_modality(modality, text, second):
        own = examples.get(modality, [])
        if own and any(text in others for others in examples.values()):
            text = own[0]  # nobody's own sentence
        return dataset(modality), text, remark(modality, text, second)

    def on_example(sample, modality, text, second):
        return sample[0], remark(modality, sample[0], second)

    def on_load(request: gr.Request):
        """Settings from a link; what is not possible is left as it is, and told."""
        given = {name: value for name, value in request.query_params.items() if name in asked}
        values = {name: component.value for name, component in asked.items()} | given
        try:
            if given:
                settings = asdict(check(limits, list(drawer.modalities), **values))
                told = remark(settings["modality"], settings["prompt"], settings["second"])
                filled = [settings[name] for name in asked]
                return [*filled, "seed" in given or gr.skip(), dataset(settings["modality"]), told]
        except ValueError as error:
            gr.Warning(html.escape(f"The link asks for what is not possible: {error}", quote=False))
        return [gr.skip()] * (len(asked) + 3)

    second = asked["second"]
    what = [asked["modality"], prompt, second]
    asked["modality"].input(on_modality, what, [controls.examples, prompt, controls.remark], **QUICK)
    gr.on([prompt.change, second.change], remark, what, controls.remark, trigger_mode="always_last", **QUICK)
    controls.examples.click(on_example, [controls.examples, *what], [prompt, controls.remark], **QUICK)
    filled = [*asked.values(), controls.keep, controls.examples, controls.remark]
    gr.context.Context.root_block.load(on_load, None, filled, api_visibility="private")


def add_drawing(drawer: Drawer, limits: Limits, on_gpu, controls: Controls, results: Results) -> None:
    """What happens when a visitor has images drawn."""
    # What `Drawer.stop` calls the visitor's last call, the one that is over, and settings and seeds of the candidates
    # that were outranked in it
    call, ended, drawn = gr.State(), gr.State(), gr.State()
    draw, redraw = on_gpu(drawer.draw), on_gpu(drawer.redraw)
    head, asked, trained = drawer.pipe.filter_head, controls.asked, list(drawer.modalities)

    def buttons(busy: bool = False) -> tuple[dict, dict]:
        return gr.update(interactive=not busy), gr.update(interactive=busy)

    def checked(values) -> Settings:
        try:
            settings = check(limits, trained, **dict(zip(asked, values)))
            for text in filter(None, (settings.prompt, settings.second)):
                drawer.pipe.resolve_prompts([text], [settings.modality], 1)
            return settings
        except ValueError as error:
            message = html.escape(str(error), quote=False)
            raise gr.Error(message, title="This cannot be drawn", print_exception=False) from error

    def pictures(paths, settings: Settings, output: Drawn, accepted: str = "accepted") -> list:
        needed = Thresholds.of(head.config, settings.modality).score if head is not None else 0
        return list(zip(paths, captions(output, needed, accepted)))

    def begin(seed, keep):
        seed = seed if keep else secrets.randbelow(limits.seed + 1)
        return seed, secrets.token_hex(8), *buttons(busy=True), ""

    def on_draw(*values, progress=PROGRESS):
        *values, name = values
        settings, start = checked(values), time.monotonic()
        second = None
        try:
            output, others = draw(settings, progress, name)
            if settings.second:
                second = redraw(replace(settings, prompt=settings.second), output.seeds, progress, name)
        except Stopped:
            return [*[gr.skip()] * 8, name]
        paths, archive = drawer.write(settings, output, second)
        count, beside = len(output.images), second is not None
        columns = 1 if count == 1 or beside else 2 if count <= 4 else 3
        label, beside_label = (settings.prompt, settings.second) if beside else ("Generated images", "")
        compared = pictures(paths[count:], settings, second) if second is not None else []
        return (
            gr.update(value=pictures(paths[:count], settings, output), columns=columns, label=label),
            summarise(output, time.monotonic() - start),
            gr.update(value=archive, interactive=True),
            (settings, others),
            settings.query,
            gr.update(interactive=bool(others)),
            [],
            gr.update(value=compared, columns=columns, label=beside_label, visible=beside),
            name,
        )

    def on_look(state, name, progress=PROGRESS):
        if not state or not state[1]:
            raise gr.Error("No candidate was outranked.", print_exception=False)
        settings, seeds = state
        try:
            output = redraw(settings, seeds[: limits.opened], progress, name)
        except Stopped:
            return gr.skip(), name
        return pictures(drawer.write(settings, output)[0], settings, output, "good enough"), name

    def on_stop(name):
        drawer.stop(name)
        return *buttons(), "Stopped."

    def on_end(over, last):
        """What was stopped while it waited ends when its turn comes; another may be on its way by then."""
        return buttons() if over == last else (gr.skip(), gr.skip())

    pressed = [controls.go, controls.stop]
    press = gr.on(
        [controls.go.click, asked["prompt"].submit, asked["second"].submit],
        begin,
        [asked["seed"], controls.keep],
        [asked["seed"], call, *pressed, results.summary],
        **QUICK,
    )
    outputs = [results.gallery, results.summary, results.download, drawn, results.link, results.look, results.others]
    outputs += [results.second, ended]
    drawing = press.then(
        on_draw, [*asked.values(), call], outputs, api_name="generate", show_progress_on=results.gallery, **ALONE
    )
    link = "(query) => query && new URL(query, location.href).href"
    drawing.success(None, results.link, results.link, js=link, api_visibility="private")
    look = results.look.click(lambda: (secrets.token_hex(8), *buttons(busy=True)), None, [call, *pressed], **QUICK)
    looking = look.then(on_look, [drawn, call], [results.others, ended], api_visibility="private", **ALONE)
    for event in (drawing, looking):
        event.success(on_end, [ended, call], pressed, **QUICK)
        event.failure(buttons, None, pressed, **QUICK)
    controls.stop.click(on_stop, call, [*pressed, results.summary], **QUICK)
