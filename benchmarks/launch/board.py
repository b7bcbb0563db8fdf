"""What a person sees of the jobs that run: one line each, rewritten on a terminal, now and then in a log."""

import os
import sys
import time
from collections.abc import Mapping

EVERY = 15.0  # seconds between two lines of a job where they are not rewritten


class Board:
    def __init__(self) -> None:
        self.drawn: list[str] = []  # on the terminal, to be replaced by what is drawn next
        self.printed: dict[str, float] = {}

    def show(self, lines: Mapping[str, str]) -> None:
        """lines: the title of each running job -> what it said last."""
        if sys.stdout.isatty():
            self.draw([f"{title} | {last}" if last else title for title, last in lines.items()])
            return
        now = time.monotonic()
        for title, last in lines.items():
            if last and now - self.printed.get(title, -EVERY) >= EVERY:
                self.printed[title] = now
                print(f"{title} | {last}", flush=True)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.draw([])
        print(text, flush=True)

    def draw(self, lines: list[str]) -> None:
        if not sys.stdout.isatty():
            return
        size = os.get_terminal_size()
        shown = [line[: size.columns - 1] for line in lines[: size.lines - 1]]
        if shown != self.drawn:
            up = f"\033[{len(self.drawn) - 1}A" if len(self.drawn) > 1 else ""
            print(f"\r{up}\033[J" + "\n".join(shown), end="", flush=True)
            self.drawn = shown
