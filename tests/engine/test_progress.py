"""What a person sees of a build: figures that are right, on lines that fit."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.text import Text

from buildsys.engine.display import PlainDisplay, QuietDisplay
from buildsys.engine.progress import (
    Tally,
    choose_display,
    duration,
    how_far,
    memory,
    quantity,
    shortened,
)
from buildsys.engine.terminal import LiveDisplay, picture


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0042, "0.00 s"),
        (0.99, "0.99 s"),
        (0.999, "1.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1:00"),
        (3599.7, "1:00:00"),
        (7325, "2:02:05"),
    ],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_sizes_and_quantities() -> None:
    assert memory(10) == "1 MiB"
    assert memory(212 << 20) == "212 MiB"
    assert memory(3 << 29) == "1.5 GiB"
    assert [quantity(value) for value in (3.0, 0.123, 14.7, 1e6)] == ["3", "0.12", "15", "1000000"]


def test_names_keep_both_ends() -> None:
    assert shortened("metrics.json", 12) == "metrics.json"
    short = shortened("htp/htp_v75/libQnnLLaMAPackage.so", 20)
    assert len(short) == 20
    assert short.startswith("htp/")
    assert short.endswith("Package.so")


def test_the_time_left_in_a_step_follows_its_own_pace() -> None:
    clock = Clock()
    tally = Tally(clock)
    tally.begin(1, {}, 1)
    tally.started("a")
    assert how_far(tally.running["a"], clock()) == ""
    clock.now += 7  # setting up is not part of the pace
    tally.progress("a", 0, 100, "layers")
    assert how_far(tally.running["a"], clock()) == "0/100 layers"
    clock.now += 10
    tally.progress("a", 20, 100, "layers")
    assert how_far(tally.running["a"], clock()) == "20/100 layers, 2/s, 40 s left"
    assert tally.left() == 40
    # Another phase is measured by itself.
    tally.progress("a", 1, 5, "files")
    assert how_far(tally.running["a"], clock()) == "1/5 files"


def test_a_silent_step_is_judged_by_its_last_run() -> None:
    clock = Clock()
    tally = Tally(clock)
    tally.begin(1, {"a": 30.0}, 1)
    tally.started("a")
    clock.now += 10
    assert how_far(tally.running["a"], clock()) == "about 20 s left"
    clock.now += 25
    assert how_far(tally.running["a"], clock()) == ""


def test_the_time_left_of_a_build_is_work_over_hands_but_at_least_the_longest_step() -> None:
    clock = Clock()
    tally = Tally(clock)
    tally.begin(4, {"a": 10.0, "b": 10.0, "c": 10.0, "d": 2.0}, jobs=2)
    assert tally.left() == 16
    tally.started("a")
    tally.ended("a")
    tally.unneeded("b")
    assert (tally.over, tally.total) == (1, 3)
    assert tally.left() == 10
    assert tally.status() == "1 of 3 done, 0 running, about 10 s left"


def test_no_time_left_is_told_while_a_step_was_never_run() -> None:
    tally = Tally(Clock())
    tally.begin(2, {"a": 10.0}, jobs=1)
    assert tally.left() is None
    tally.started("a")
    assert tally.status() == "0 of 2 done, 1 running"


LONG = "htp/htp_v75/libQnnLLaMAPackage_with_a_name_that_is_much_too_long_for_a_terminal.so"


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("width", [60, 80, 200])
def test_what_runs_fits_the_terminal(width: int) -> None:
    clock = Clock()
    tally = Tally(clock)
    tally.begin(20, {LONG: 100.0}, 2)
    for name in (LONG, "scales.json", *(f"step{number}" for number in range(14))):
        tally.started(name)
    tally.progress("scales.json", 12345, 1000000, "questions about shapes")
    clock.now += 3600
    stream = io.StringIO()
    Console(file=stream, width=width).print(picture(tally, width))
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert lines[0].startswith("  htp/")
    assert "12345/1000000 que" in lines[1]
    assert lines[1].rstrip().endswith("1:00:00")
    assert lines[-2:] == ["  and 4 more", "0 of 20 done, 16 running"]


def test_a_finished_step_leaves_one_line_with_time_and_memory() -> None:
    stream = Terminal()
    display = LiveDisplay(stream, console=Console(file=stream, width=80, force_terminal=True))
    display.say("before")
    display.begin(2)
    display.started("rotation.bin", "")
    display.ended("rotation.bin", False, 3.14, 212 << 20)
    display.started("int8.pth", "")
    display.ended("int8.pth", True, 61, 3 << 30)
    display.say("int8.pth: killed by SIGKILL [9]\n  | last words")
    display.finished()
    display.finished()
    text = Text.from_ansi(stream.getvalue()).plain
    assert text.startswith("before\n")
    assert f"✓ rotation.bin{'3.1 s   212 MiB':>66}\n" in text
    assert f"✗ int8.pth{'1:01   3.0 GiB':>70}\n" in text
    assert "int8.pth: killed by SIGKILL [9]\n  | last words\n" in text


def test_the_display_fits_where_it_writes() -> None:
    file = io.StringIO()
    assert type(choose_display(file, quiet=False)) is PlainDisplay
    assert type(choose_display(file, quiet=True)) is QuietDisplay
    assert type(choose_display(Terminal(), quiet=False)) is LiveDisplay
    assert type(choose_display(Terminal(), quiet=True)) is QuietDisplay
