"""One call at a time: pipelines that share a component take turns, whichever thread calls them.

A scheduler counts its steps, a tokenizer's padding is a state of its own, and an autoencoder may change its dtype
while it decodes: two calls at once would mix them up, mostly into an IndexError, now and then into a wrong image.
"""

import functools
import threading
from collections.abc import Callable
from contextlib import ExitStack
from weakref import WeakKeyDictionary


class Turn:
    """The lock of one object; the thread that holds it may take it again."""

    def __init__(self):
        self.lock = threading.RLock()
        self.drawing = False


# Beside the objects and not in them, so that pickle and deepcopy never meet a lock: a copy has turns of its own.
TURNS: WeakKeyDictionary = WeakKeyDictionary()
TURNS_LOCK = threading.Lock()


def turn_of(thing) -> Turn:
    """The turn of a pipeline or of a component."""
    with TURNS_LOCK:
        return TURNS.setdefault(thing, Turn())


def in_turn(method: Callable) -> Callable:
    """Makes calls of a pipeline's method wait until no other thread uses the pipeline or one of its components."""

    @functools.wraps(method)
    def waiting(self, *args, **kwargs):
        parts = [self, *(part for part in self.components.values() if part is not None)]
        with ExitStack() as stack:
            # All threads take them in the same order, or two could wait for each other.
            for part in sorted(parts, key=id):
                stack.enter_context(turn_of(part).lock)
            return method(self, *args, **kwargs)

    return waiting


def draws_in_turn(method: Callable) -> Callable:
    """As `in_turn`; from inside of such a call, as in a callback, a second one is refused with RuntimeError."""

    @functools.wraps(method)
    def drawing(self, *args, **kwargs):
        turns = [turn_of(part) for part in (self, self.scheduler) if part is not None]
        if any(turn.drawing for turn in turns):
            raise RuntimeError(
                "This pipeline, or another one with the same scheduler, is called inside of its own call, which would"
                " mix up both: call `copy.deepcopy(pipe)` there, or call it afterwards."
            )
        try:
            for turn in turns:
                turn.drawing = True
            return method(self, *args, **kwargs)
        finally:
            for turn in turns:
                turn.drawing = False

    return in_turn(drawing)
