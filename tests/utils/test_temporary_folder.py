"""Temporary folders of processes that are gone do not stay."""

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lavit_hf.utils.atomic_files import temporary_folder

PREFIX = "lavit-publish-"
HOLD = """
import os, sys
from lavit_hf.utils.atomic_files import temporary_folder
with temporary_folder("lavit-publish-") as folder:
    (folder / "file").write_text("x")
    print(os.getpid(), folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary folders are."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield tmp_path
    tempfile.tempdir = None


def hold(python: str) -> tuple[subprocess.Popen, int, Path]:
    """A process that has a temporary folder; the number of it, and the folder."""
    process = subprocess.Popen([python, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    pid, folder = process.stdout.readline().split()
    return process, int(pid), Path(folder)


def test_what_a_kill_left_goes_and_what_is_in_use_stays(python: str, place: Path) -> None:
    killed, pid, abandoned = hold(python)
    living, _, used = hold(python)
    assert {abandoned, used} == set(place.glob(f"{PREFIX}*"))  # of two living processes, none takes the other's
    os.kill(pid, signal.SIGKILL)
    killed.wait()
    (place / f"{PREFIX}link").symlink_to(place.parent)
    (place / "other").mkdir()
    with temporary_folder(PREFIX) as mine:
        assert not abandoned.exists() and (used / "file").is_file() and mine.is_dir()
        with temporary_folder(PREFIX) as second:  # of the same process
            assert mine.is_dir() and second.is_dir()
    living.communicate("")
    assert {path.name for path in place.glob(f"{PREFIX}*")} == {f"{PREFIX}link"}
    assert (place / "other").exists() and place.parent.is_dir()


def test_errors_leave_nothing(place: Path) -> None:
    with pytest.raises(KeyError), temporary_folder(PREFIX):
        raise KeyError
    assert not list(place.iterdir())
