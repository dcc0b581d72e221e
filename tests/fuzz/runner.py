"""What all fuzz tests share: blocks of seeds, time limits, and what a clear error is.

A case is made of its seed alone. `FUZZ=full` runs all cases instead of the few that CI has time for, and `FUZZ_SEED=7`
only case 7 of every test that runs.
"""

import json
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from PIL import UnidentifiedImageError

# Cases of CI, and of `make fuzz FUZZ=full`.
SIZES = {
    "images": (600, 3000),
    "large_images": (4, 24),
    "prompts": (400, 2000),
    "chats": (200, 1000),
    "ids": (250, 1000),
    "checkpoints": (30, 330),
    "kills": (23, 115),
}
BLOCKS = 10

CLEAR = (ValueError, TypeError, OSError)
# These are some of the above, but tell what a library stumbled over, not what the user did.
RAW = (UnicodeError, json.JSONDecodeError, UnidentifiedImageError)
_SHORTEST = 15  # a shorter message hardly says what was wrong


def blocks(kind: str) -> Any:
    """Parametrizes a test by blocks of seeds."""
    if os.environ.get("FUZZ_SEED"):
        return pytest.mark.parametrize("seeds", [[int(os.environ["FUZZ_SEED"])]], ids=lambda seeds: str(seeds[0]))
    size = SIZES[kind][os.environ.get("FUZZ") == "full"]
    # Every block has seeds of all sizes of runs, so that a short run sees what a long one does, only less of it.
    seeds = [list(range(first, size, BLOCKS)) for first in range(min(BLOCKS, size))]
    return pytest.mark.parametrize("seeds", seeds, ids=lambda seeds: f"{seeds[0]}-{seeds[-1]}")


def seeded_rng(kind: str, seed: int) -> random.Random:
    """The randomness of a case."""
    return random.Random(f"{kind} {seed}")


def check_all(seeds: list[int], check: Callable[[int], None], seconds: float) -> None:
    """Checks every case of a block, and only then fails, naming the cases that failed and how to run each again.

    Args:
        seeds: The cases.
        check: Raises whatever is wrong about a case.
        seconds: Longest time that a case may take.
    """
    failures = []
    for seed in seeds:
        try:
            with time_limit(seconds):
                check(seed)
        except (Exception, TimeLimit) as error:
            failures.append(f"seed {seed}: {describe(error)}")
    test = os.environ["PYTEST_CURRENT_TEST"].partition("[")[0]
    again = f"FUZZ_SEED={failures[0].split()[1].rstrip(':')} pytest {test}" if failures else ""
    report = "\n".join([f"{len(failures)} of {len(seeds)} cases failed. One alone: {again}", *failures])
    if failures:
        pytest.fail(report, pytrace=False)


class TimeLimit(BaseException):
    """A case took too long; not an `Exception`, so that nobody handles it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupts what takes longer."""

    def stop(*_: Any) -> None:
        raise TimeLimit(f"it took longer than {seconds:g} s")

    assert threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(function: Callable[..., Any], *args: Any, names: str = "", **kwargs: Any) -> Any:
    """The result of a call, or the clear error that it raised.

    Args:
        function: What to call.
        args: Its arguments.
        names: Words, separated by "|", of which the message of an error has to hold one: the value, or what it is.
        kwargs: Its arguments.

    Raises:
        AssertionError: The error is not clear. Other errors than those for users go through as they are.
    """
    try:
        return function(*args, **kwargs)
    except CLEAR as error:
        if problem := unclear(error, names):
            raise AssertionError(f"{problem}: {describe(error)}") from error
        return error


def unclear(error: BaseException, names: str = "") -> str:
    """What is wrong about an error; nothing if it is clear."""
    message = str(error)
    if isinstance(error, RAW) or not isinstance(error, CLEAR):
        return "raw error"
    if len(message) < _SHORTEST:
        return "error without a useful message"
    if names and not any(name.lower() in message.lower() for name in names.split("|")):
        return f"error that names none of {names}"
    return ""


def describe(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]
