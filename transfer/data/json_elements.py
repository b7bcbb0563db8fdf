"""The elements of lists in a JSON file that is too large to be held as Python objects, one by one with their places."""

import gc
import json
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import orjson

WINDOW, MARGIN = 1 << 24, 1 << 16  # bytes that are text at a time, and that stay ahead
SPACES = " \t\n\r"
SPACE = re.compile(f"[{SPACES}]*")
BETWEEN = re.compile(rb"\}[ \t\n\r]*,[ \t\n\r]*\{")  # two objects of a list, or something within one
TOGETHER = 1 << 20  # bytes of elements that are parsed in one call


@contextmanager
def without_collecting() -> Iterator[None]:
    """No search for cycles of garbage within: millions of new lists start it again and again, a third of the time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class Elements:
    """Iterates over (list, number, element, its first byte, the byte after it) for some lists of the JSON object in a
    file of `size` bytes, in its order; with number -1 where a list begins. ValueError for what is no JSON object, or no
    list in place of one.

    read: (first byte, how many) -> bytes. A byte is one character of `text`, so that places are bytes."""

    def __init__(self, read: Callable[[int, int], bytes], size: int, lists: Collection[str]) -> None:
        self.read, self.size, self.lists, self.scan = read, size, lists, json.JSONDecoder().raw_decode
        self.base = 3 * (read(0, 3) == b"\xef\xbb\xbf")  # a byte order mark
        self.piece, self.text, self.ascii, self.place, self.slow = b"", "", True, 0, 0
        self.slide(WINDOW)

    def __iter__(self) -> Iterator[tuple[str, int, Any, int, int]]:
        self.take("{")
        more = True
        while more:
            key = self.value()
            self.take(":")
            if key in self.lists:
                yield from self.elements_of(key)
            else:
                self.value()
            more = self.take(",}") == ","
        if self.next():
            raise ValueError(f"more text at byte {self.base + self.place}")

    def elements_of(self, key: str) -> Iterator[tuple[str, int, Any, int, int]]:
        self.take("[")
        yield key, -1, None, 0, 0
        number, end = 0, ""
        if self.next() == "]":
            end = self.take("]")
        while end != "]":
            self.next()
            for entry, start, after in self.several():
                yield key, number, entry, start, after
                number += 1
            start = self.base + self.place
            entry = self.value()
            if not self.ascii:
                entry = decoded(self.text[start - self.base : self.place], f"{key}[{number}]")
            yield key, number, entry, start, self.base + self.place
            number, end = number + 1, self.take(",]")

    def several(self) -> list[tuple[dict, int, int]]:
        """The next elements, all but the last of TOGETHER bytes, by a parser that is several times as fast but does not
        tell where each begins. [] where that is not sure, or the parser is stricter than Python's."""
        if self.place < self.slow or self.piece[self.place : self.place + 1] != b"{":
            return []
        cuts = [found.span() for found in BETWEEN.finditer(self.piece, self.place, self.place + TOGETHER)]
        try:
            entries = orjson.loads(b"[%b]" % self.piece[self.place : cuts[-1][0] + 1]) if cuts else []
        except orjson.JSONDecodeError:
            entries = []
        # Objects all, and as many as there are places between two: so each of these lies between two elements.
        if not cuts or len(entries) != len(cuts) or not all(isinstance(entry, dict) for entry in entries):
            self.slow = self.place + TOGETHER  # not again for each of them
            return []
        starts = (self.place, *(end - 1 for _, end in cuts[:-1]))
        self.place = cuts[-1][1] - 1
        return [(e, self.base + start, self.base + cut + 1) for e, start, (cut, _) in zip(entries, starts, cuts)]

    def next(self) -> str:
        """The next character that is no space; "" at the end."""
        if len(self.text) - self.place < MARGIN:
            self.slide(WINDOW)
        found = self.text[self.place : self.place + 1]
        if found in SPACES:
            self.place = SPACE.match(self.text, self.place).end()  # type: ignore[union-attr]  # it always matches
            found = self.text[self.place : self.place + 1]
        return found

    def take(self, allowed: str) -> str:
        found = self.next()
        if not found or found not in allowed:
            raise ValueError(f"{found!r} at byte {self.base + self.place}, where {' or '.join(allowed)} must be")
        self.place += 1
        return found

    def value(self) -> Any:
        """The value behind any spaces."""
        self.next()
        more = self.base + len(self.text) < self.size
        try:
            found, end = self.scan(self.text, self.place)
        except json.JSONDecodeError as e:
            if not more:
                raise ValueError(f"{e.msg} at byte {self.base + e.pos}") from None
            end = len(self.text)
        if more and end > len(self.text) - 3:  # perhaps only the window ended: "1" may be the begin of "1e+16"
            self.slide(2 * len(self.text))
            return self.value()
        self.place = end
        return found

    def slide(self, length: int) -> None:
        """Begin the window at the current place, if there is more to come."""
        if self.base + len(self.text) < self.size:
            self.base += self.place
            self.piece = self.read(self.base, length)
            self.text, self.ascii, self.place, self.slow = self.piece.decode("latin-1"), self.piece.isascii(), 0, 0


def decoded(text: str, where: str) -> Any:
    """The JSON value in bytes that stand as characters."""
    try:
        return json.loads(text.encode("latin-1"))
    except ValueError as e:
        raise ValueError(f"{where}: {type(e).__name__}: {e}") from None
