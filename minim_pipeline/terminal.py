"""What is said and asked at the terminal."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import TypeVar


Answer = TypeVar("Answer")


def ask(question: str, parse: Callable[[str], Answer], default: str | None = None) -> Answer:
    """Asks at the terminal until `parse` takes the answer."""
    while True:
        answer = input(f"{question}{f' [{default}]' if default else ''}: ").strip() or default
        try:
            if answer:
                return parse(answer)
        except (ValueError, argparse.ArgumentTypeError) as error:
            print(error)


def say(message: str) -> None:
    """Prints to stderr, once where several processes run the same command."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)
