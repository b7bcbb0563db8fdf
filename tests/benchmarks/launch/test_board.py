"""What stands on a terminal, and in a log, while jobs run."""

import contextlib
import io
import os
import re

from benchmarks.launch import board
from benchmarks.launch.board import Board


def screen(terminal: io.StringIO) -> list[str]:
    """What stands on a terminal that was sent this, by what ECMA-48 says of the sequences in it."""
    lines, row = [""], 0
    for part in re.findall(r"\033\[\d*[AJ]|\r|\n|[^\033\r\n]+", terminal.getvalue()):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part.endswith("A") and part.startswith("\033"):
            row -= int(part[2:-1])
        elif part == "\033[J":
            lines = [*lines[:row], ""]
        elif part != "\r":
            lines[row] = part
    return [line for line in lines if line]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_has_a_line_for_each_job_and_what_was_said_above_them(monkeypatch):
    monkeypatch.setattr(os, "get_terminal_size", lambda: os.terminal_size((30, 4)))
    shown = Board()
    with contextlib.redirect_stdout(Terminal()) as terminal:
        shown.show({"[1/3] a": "", "[2/3] b": "1/10 | 5 images/s"})
        assert screen(terminal) == ["[1/3] a", "[2/3] b | 1/10 | 5 images/s"]
        shown.show({"[1/3] a": "2/4", "[2/3] b": "3/10 | 500000 images/s"})
        assert screen(terminal) == ["[1/3] a | 2/4", "[2/3] b | 3/10 | 500000 image"]
        shown.say("[1/3] a: top1 1.00")
        shown.show({"[2/3] b": "4/10"})
        assert screen(terminal) == ["[1/3] a: top1 1.00", "[2/3] b | 4/10"]
        shown.show({})
        shown.say("tables")
        assert screen(terminal) == ["[1/3] a: top1 1.00", "tables"]
        shown.show({str(number): "on" for number in range(9)})
        assert screen(terminal)[-3:] == ["0 | on", "1 | on", "2 | on"]  # no more than it has lines for


def test_a_log_has_a_line_of_each_job_now_and_then(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(board.time, "monotonic", lambda: now[0])
    shown = Board()
    for second in range(40):
        now[0] = float(second)
        shown.show({"a": f"{second}/40", "b": "" if second < 20 else "begun"})
    assert capsys.readouterr().out.splitlines() == ["a | 0/40", "a | 15/40", "b | begun", "a | 30/40", "b | begun"]
