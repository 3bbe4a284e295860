"""What is done when a visitor has images drawn: calls of the drawer, with what the page shows of them."""

import html
import secrets
import textwrap
import time
from collections.abc import Sequence
from dataclasses import replace

import gradio as gr
from drawing import Drawer, Drawn, Stopped
from generate_settings import Limits, Settings, check
from generate_words import captions, summarise

from minim_pipeline.minim_filter.selection import Thresholds


PROGRESS = gr.Progress()  # Gradio finds it among a function's defaults, and hands out one for each call


def buttons(busy: bool = False) -> tuple[dict, dict]:
    """What becomes of Generate and Stop."""
    return gr.update(interactive=not busy), gr.update(interactive=busy)


class Calls:
    """The functions behind the buttons; each call has a name, by which it is stopped.

    Args:
        names: of the settings, in the order in which the page gives their values.
        on_gpu: decorates what needs the GPU.
    """

    def __init__(self, drawer: Drawer, limits: Limits, names: Sequence[str], on_gpu):
        self.drawer, self.limits, self.names = drawer, limits, list(names)
        self.draw, self.redraw = on_gpu(drawer.draw), on_gpu(drawer.redraw)

    def checked(self, values) -> Settings:
        try:
            settings = check(self.limits, list(self.drawer.modalities), **dict(zip(self.names, values)))
            for text in filter(None, (settings.prompt, settings.second)):
                self.drawer.pipe.resolve_prompts([text], [settings.modality], 1)
            return settings
        except ValueError as error:
            message = html.escape(str(error), quote=False)
            raise gr.Error(message, title="This cannot be drawn", print_exception=False) from error

    def pictures(self, paths, settings: Settings, output: Drawn, accepted: str = "accepted") -> list:
        """Files with their captions, as a gallery takes them."""
        head = self.drawer.pipe.filter_head
        needed = Thresholds.of(head.config, settings.modality).score if head is not None else 0
        return list(zip(paths, captions(output, needed, accepted)))

    def label(self, settings: Settings, prompt: str) -> str:
        """What images were asked for: what the page's fields say may be another thing by then."""
        return f"{self.drawer.modalities[settings.modality].name}: {textwrap.shorten(prompt, 80, placeholder='…')}"

    def on_press(self, seed, keep):
        seed = seed if keep else secrets.randbelow(self.limits.seed + 1)
        return seed, secrets.token_hex(8), *buttons(busy=True), ""

    def on_draw(self, *values, progress=PROGRESS):
        *values, name = values
        settings, start, second = self.checked(values), time.monotonic(), None
        try:
            output, others = self.draw(settings, progress, name)
            if settings.second:
                second = self.redraw(replace(settings, prompt=settings.second), output.seeds, progress, name)
        except Stopped:
            return [*[gr.skip()] * 8, name]
        paths, archive = self.drawer.write(settings, output, second)
        count, beside = len(output.images), second is not None
        columns = 1 if count == 1 or beside else 2 if count <= 4 else 3
        first = self.pictures(paths[:count], settings, output)
        compared = self.pictures(paths[count:], settings, second) if second is not None else []
        return (
            gr.update(value=first, columns=columns, label=self.label(settings, settings.prompt)),
            summarise(output, time.monotonic() - start),
            gr.update(value=archive, interactive=True),
            (settings, others),
            settings.query,
            gr.update(interactive=bool(others)),
            [],
            gr.update(value=compared, columns=columns, label=self.label(settings, settings.second), visible=beside),
            name,
        )

    def on_press_look(self):
        return secrets.token_hex(8), *buttons(busy=True)

    def on_look(self, state, name, progress=PROGRESS):
        if not state or not state[1]:
            raise gr.Error("No candidate was outranked.", print_exception=False)
        settings, seeds = state
        try:
            output = self.redraw(settings, seeds[: self.limits.opened], progress, name)
        except Stopped:
            return gr.skip(), name
        return self.pictures(self.drawer.write(settings, output)[0], settings, output, "good enough"), name

    def on_stop(self, name):
        self.drawer.stop(name)
        return *buttons(), "Stopped."

    def on_end(self, over, last):
        """What was stopped while it waited ends when its turn comes; another may be on its way by then."""
        return buttons() if over == last else (gr.skip(), gr.skip())
