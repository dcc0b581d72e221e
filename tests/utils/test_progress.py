"""Progress: bars on a terminal, lines in a log."""

import io
import sys

import pytest
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from lavit_hf.utils import progress
from lavit_hf.utils.progress import bar_options, progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def count(total: int = 4, **options) -> None:
    with progress_bar("Counting", total, unit="sheep", **options) as bar:
        for _ in range(total):
            bar.update(1)


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    count()
    assert "\rCounting: 100%" in sys.stderr.getvalue() and "4/4" in sys.stderr.getvalue()


def test_a_log_gets_nothing_of_short_jobs_and_a_line_now_and_then_of_long_ones(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    count()
    assert sys.stderr.getvalue() == ""
    monkeypatch.setattr(progress, "_LOG_SECONDS", 1e-9)
    with progress_bar("Counting", 2, unit="sheep") as outer:
        count(3, leave=False)
        outer.update(1)
        outer.write("between", file=sys.stderr)
        outer.update(1)
    lines = sys.stderr.getvalue().splitlines()
    assert [line.partition(" [")[0] for line in lines] == [
        *(f"Counting: {number} of 3" for number in (1, 2, 3)),
        "Counting: 1 of 2",
        "between",
        *["Counting: 2 of 2"] * 2,
    ]
    assert not set("\r\x1b") & set(sys.stderr.getvalue())


def test_lines_are_seconds_apart(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert bar_options("x")["mininterval"] == bar_options("x")["delay"] == 30


def test_switches_of_huggingface_hub_are_obeyed(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    disable_progress_bars()
    try:
        count()
    finally:
        enable_progress_bars()
    count(show=False)
    assert sys.stderr.getvalue() == ""


def test_bars_of_diffusers_take_the_options(monkeypatch) -> None:
    from tqdm.auto import tqdm

    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(progress, "_LOG_SECONDS", 1e-9)
    for _ in tqdm(range(2), **bar_options("Drawing")):
        pass
    assert sys.stderr.getvalue().splitlines()[0].startswith("Drawing: 1 of 2")
