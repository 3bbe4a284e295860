"""The page that draws images: what happens when something on it is pressed."""

import html
from dataclasses import asdict, replace

import gradio as gr
from drawing import Drawer
from generate_calls import Calls, buttons
from generate_controls import Controls, Results, add_controls, add_results
from generate_settings import Limits, check
from vocabulary import Vocabulary, examples_of


NOTICE = "Synthetic images, for research and teaching. Not a medical device: never for anybody's diagnosis or care."
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
    add_drawing(controls, results, Calls(drawer, limits, list(controls.asked), on_gpu))


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


def add_drawing(controls: Controls, results: Results, calls: Calls) -> None:
    """What happens when a visitor presses a button."""
    # The name of the visitor's last call, of the one that is over, and settings and seeds of the candidates that were
    # outranked in it
    call, ended, drawn = gr.State(), gr.State(), gr.State()
    asked, pressed = controls.asked, [controls.go, controls.stop]
    press = gr.on(
        [controls.go.click, asked["prompt"].submit, asked["second"].submit],
        calls.on_press,
        [asked["seed"], controls.keep],
        [asked["seed"], call, *pressed, results.summary],
        **QUICK,
    )
    outputs = [results.gallery, results.summary, results.download, drawn, results.link, results.look, results.others]
    outputs += [results.second, ended]
    shown = {"api_name": "generate", "show_progress_on": results.gallery}
    drawing = press.then(calls.on_draw, [*asked.values(), call], outputs, **shown, **ALONE)
    link = "(query) => query && new URL(query, location.href).href"
    drawing.success(None, results.link, results.link, js=link, api_visibility="private")
    look = results.look.click(calls.on_press_look, None, [call, *pressed], **QUICK)
    looking = look.then(calls.on_look, [drawn, call], [results.others, ended], api_visibility="private", **ALONE)
    for event in (drawing, looking):
        event.success(calls.on_end, [ended, call], pressed, **QUICK)
        event.failure(buttons, None, pressed, **QUICK)
    controls.stop.click(calls.on_stop, call, [*pressed, results.summary], **QUICK)
