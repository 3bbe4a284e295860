"""Arguments that no run can have, told before any work is done: the same in every script."""

import argparse
import math
from collections.abc import Collection

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers


def check_numbers(
    parser: argparse.ArgumentParser, args: argparse.Namespace, from_zero: Collection[str] = ("seed",)
) -> None:
    """Raises ValueError for a number that means nothing, in any option of the parser.

    Whole numbers are counts and sizes, at least 1; those named in `from_zero` may be 0. All others are rates, weights
    and shares: finite, and at least 0.
    """
    for action in parser._actions:
        given = getattr(args, action.dest, None)
        for value in given if isinstance(given, list | tuple) else [given]:
            if value is None or action.type not in (int, float):
                continue
            least = 1 if action.type is int and action.dest not in from_zero else 0
            if value < least:
                raise ValueError(f"{action.option_strings[0]} has to be at least {least}, got {value}.")
            if not math.isfinite(value):
                raise ValueError(f"{action.option_strings[0]} has to be a finite number, got {value}.")


def check_shares(args: argparse.Namespace, *names: str) -> None:
    """Raises ValueError for a share below 0 or above 1."""
    for name in names:
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"--{name} has to be between 0 and 1, got {getattr(args, name)}.")


def check_tracker(name: str | None) -> None:
    """Raises ValueError for a tracker (`--report_to`) that accelerate does not know, or that is not installed.

    accelerate leaves out what is not installed, and says nothing.
    """
    if name is None:
        return
    installed = [tracker.value for tracker in get_available_trackers()]
    known = [str(tracker) for tracker in LOGGER_TYPE_TO_CLASS]
    if name not in (*known, "all"):
        raise ValueError(f"--report_to has to be one of {', '.join(known)} or all, got {name!r}.")
    if not installed or name not in (*installed, "all"):
        raise ValueError(f"--report_to {name} is not installed here; installed: {', '.join(installed) or 'none'}.")
