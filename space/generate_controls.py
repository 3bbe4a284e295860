"""The controls of the page that draws images, and where the images appear."""

from dataclasses import dataclass

import gradio as gr
from drawing import Drawer
from generate_settings import Limits
from vocabulary import examples_of


@dataclass
class Controls:
    """What a visitor sets and presses.

    Args:
        asked: by the names of `Settings`, in the order in which the server is asked.
        keep: whether the seed stays as it is.
    """

    asked: dict[str, gr.components.Component]
    keep: gr.Checkbox
    remark: gr.Markdown
    go: gr.Button
    stop: gr.Button
    examples: gr.Dataset


@dataclass
class Results:
    """What a visitor gets."""

    gallery: gr.Gallery
    second: gr.Gallery
    summary: gr.Markdown
    download: gr.DownloadButton
    link: gr.Textbox
    look: gr.Button
    others: gr.Gallery


def count(most: int, value: int, label: str, **options) -> gr.Slider | gr.Number:
    """A slider from 1 to `most`, or the number 1, which nobody sees, where that is all there is to choose."""
    if most == 1:
        return gr.Number(1, precision=0, label=label, visible=False)
    return gr.Slider(1, most, min(value, most), step=1, label=label, **options)


def add_controls(drawer: Drawer, limits: Limits) -> Controls:
    """Adds them to the `gr.Blocks` that is open; what each means shows where the pointer or the focus is."""
    config, modalities = drawer.pipe.config, drawer.modalities
    trained, findings = list(modalities), config.findings or {}
    examples = examples_of(trained[0], findings)
    choices = [(modality.name, name) for name, modality in modalities.items()]
    asked: dict[str, gr.components.Component] = {
        "modality": gr.Dropdown(choices, value=trained[0], label="Modality"),
        "prompt": gr.Textbox(
            examples[0] if examples else "", label="What it shows", lines=2, max_length=limits.prompt
        ),
    }
    remark = gr.Markdown("", elem_id="remark")
    samples = gr.Dataset(
        components=["textbox"], samples=[[text] for text in examples], label="Examples", elem_id="examples"
    )
    asked["images"] = count(limits.images, 4, "Images")
    with gr.Row():
        go = gr.Button("Generate", variant="primary", min_width=120)
        stop = gr.Button("Stop", interactive=False, min_width=80)
    with gr.Accordion("Settings", open=False, elem_id="settings"):
        asked["seed"] = gr.Number(
            0, label="Seed", precision=0, minimum=0, maximum=limits.seed, info="The same seed draws the same images."
        )
        keep = gr.Checkbox(
            False, label="Keep this seed", info="Otherwise each press takes a new one, and shows it above."
        )
        steps, guidance = min(config.num_inference_steps, limits.steps), min(config.guidance_scale, limits.guidance)
        asked["steps"] = gr.Slider(
            2, limits.steps, steps, step=1, label="Steps", info="From noise to image: more take longer, and err less."
        )
        closer = "How closely the sentence is followed: much of it makes images too typical, 1 is none."
        asked["guidance"] = gr.Slider(1, limits.guidance, guidance, step=0.1, label="Guidance", info=closer)
        chosen = "Drawn for each image; the filter chooses one, and drops the worst on the way."
        asked["candidates"] = count(limits.candidates, config.num_candidates, "Candidates for each image", info=chosen)
        noise = "Drawn beside the first from the same noise: what differs comes from the words."
        asked["second"] = gr.Textbox("", label="Compare with", lines=1, max_length=limits.prompt, info=noise)
    return Controls(asked, keep, remark, go, stop, samples)


def add_results(limits: Limits, has_filter: bool) -> Results:
    """Adds them to the `gr.Blocks` that is open."""
    look = {"height": "auto", "format": "png", "object_fit": "contain", "buttons": ["fullscreen"]}
    with gr.Row():
        gallery = gr.Gallery(label="Generated images", columns=2, elem_classes="pictures", **look)
        second = gr.Gallery(label="Second prompt", columns=2, elem_classes="pictures", visible=False, **look)
    summary = gr.Markdown("", elem_id="told")
    with gr.Row():
        download = gr.DownloadButton("Download ZIP", interactive=False)
        link = gr.Textbox(label="Link to these settings", interactive=False, buttons=["copy"])
    with gr.Accordion("Candidates that were outranked", open=False, visible=has_filter):
        gr.Markdown(f"Most are dropped before they are pictures; here up to {limits.opened} are drawn to the end.")
        button = gr.Button("Draw them", interactive=False)
        others = gr.Gallery(label="Outranked", columns=4, **look)
    return Results(gallery, second, summary, download, link, button, others)
