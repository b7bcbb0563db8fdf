"""One line of progress at a time: how far, how fast, how much longer."""

import errno
import os
import sys
import time


def duration(seconds: float) -> str:
    """75 -> "1:15", 7500 -> "2:05:00"."""
    minutes, s = divmod(int(seconds + 0.5), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


class Progress:
    """Prints "label 120/400 | 310 images/s | ETA 0:42 | loss 1.234" at most every few seconds.

    unit: the name of a step in "s/it"; "" leaves that out. On a terminal the line is rewritten in place; elsewhere each
    is a line of its own.
    """

    def __init__(self, label: str, total: int, done: int = 0, enabled: bool = True, unit: str = "") -> None:
        self.label, self.total, self.first, self.enabled, self.unit = label, total, done, enabled, unit
        self.started = time.monotonic()
        self.printed = 0.0
        self.images = 0
        self.interval = 1.0 if sys.stdout.isatty() else 3.0

    def rate(self) -> float:
        """Images per second since this process started."""
        return self.images / max(time.monotonic() - self.started, 1e-9)

    def update(self, done: int, images: int, note: str = "") -> None:
        self.images += images
        now = time.monotonic()
        if not self.enabled or (now - self.printed < self.interval and done < self.total):
            return
        self.printed = now
        per_step = (now - self.started) / max(done - self.first, 1)
        eta = duration(per_step * (self.total - done))
        line = f"{self.label} {done}/{self.total} | {self.rate():.0f} images/s | "
        line += f"{per_step:.2f} s/{self.unit} | " * bool(self.unit) + f"ETA {eta}" + (note and f" | {note}")
        try:
            if sys.stdout.isatty():
                print(f"\r\033[K{line}", end="\n" if done >= self.total else "", flush=True)
            else:
                print(line, flush=True)
        except OSError as e:
            if e.errno not in (errno.EPIPE, errno.EIO):
                raise
            # The reader or the terminal is gone: the work goes on.
            self.enabled = False
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
