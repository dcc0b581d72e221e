"""Files and directories that are there as a whole, or not at all."""

import errno
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors import SafetensorError

from lavit_hf.utils.atomic_files import (
    complete_file,
    complete_folder,
    exit_on_write_errors,
    new_file_mode,
    remove_partials,
    temporary_folder,
)

# Writes half of it, says who it is, and waits: to be killed, or for the other's end.
WRITER = """
import os, sys
from pathlib import Path
from lavit_hf.utils.atomic_files import complete_file, complete_folder

path = Path(sys.argv[2])
if sys.argv[1] == "file":
    with complete_file(path) as file:
        file.write(b"half")
        file.flush()
        print(os.getpid(), flush=True)
        sys.stdin.read()
else:
    with complete_folder(path) as folder:
        (folder / "half").write_text("half")
        print(os.getpid(), flush=True)
        sys.stdin.read()
"""
KINDS = ["file", "folder"]


def write(kind: str, path: Path, error: Callable[[], BaseException] | None = None) -> None:
    if kind == "file":
        with complete_file(path) as file:
            file.write(b"whole")
            if error:
                raise error()
    else:
        with complete_folder(path) as folder:
            (folder / "whole").write_text("whole")
            if error:
                raise error()


@pytest.fixture
def writer(python, tmp_path):
    """Another process that is in the middle of writing `out`."""
    started = []

    def start(kind: str) -> tuple[subprocess.Popen, int]:
        command = [python, "-c", WRITER, kind, str(tmp_path / "out")]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process, int(process.stdout.readline())

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_killed_process_left_is_cleaned_by_the_next(writer, tmp_path, kind):
    process, pid = writer(kind)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.") and left.name.endswith(".partial")
    os.kill(pid, signal.SIGKILL)
    process.wait()
    write(kind, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_another_process_still_writes_stays(writer, tmp_path, kind):
    process, _ = writer(kind)
    (partial,) = tmp_path.iterdir()
    remove_partials(tmp_path)
    assert partial.exists()
    write("file", tmp_path / "out") if kind == "file" else remove_partials(tmp_path, "out")
    assert partial.exists()
    process.stdin.close()
    assert process.wait() == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_files_of_other_names_stay(tmp_path):
    for name in (".out.abcdefgh.partial", ".other.abcdefgh.partial", ".out.partial", "out.abcdefgh.partial"):
        (tmp_path / name).write_text("")
    write("file", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".other.abcdefgh.partial", ".out.partial", "out", "out.abcdefgh.partial"
    ]  # fmt: skip
    remove_partials(tmp_path)
    assert not (tmp_path / ".other.abcdefgh.partial").exists()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_failures_leave_nothing(tmp_path, error):
    (tmp_path / "file").write_text("before")
    for kind in KINDS:
        with pytest.raises(error):
            write(kind, tmp_path / kind, error)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "before"


def test_permissions_are_those_of_any_new_file(tmp_path):
    write("file", tmp_path / "file")
    write("folder", tmp_path / "folder")
    assert (tmp_path / "file").stat().st_mode & 0o777 == new_file_mode(0o666)
    assert (tmp_path / "folder").stat().st_mode & 0o777 == new_file_mode(0o777)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a.txt"), "a.txt could not be written: No space left"),
        (OSError(errno.EROFS, "Read-only file system", "out"), "out could not be written: Read-only file system"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), "out could not be written: Permission denied"),
        (
            SafetensorError("I/O error: No space left on device (os error 28)"),
            "The result could not be written: No space",
        ),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
            "the disk is full, or must",
        ),
        (
            RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
            "the disk is full, or must",
        ),
    ],
)
def test_scripts_end_with_one_line(error, message):
    with pytest.raises(SystemExit, match=f"error: .*{message}"), exit_on_write_errors():
        raise error


def test_a_failure_that_was_passed_on_is_one_line_too():
    message = "error: merged could not be written: it is full. Make room"
    with pytest.raises(SystemExit, match=message), exit_on_write_errors():
        raise ValueError("merged could not be written: it is full.") from OSError(errno.ENOSPC, "No space left")
    with pytest.raises(ValueError, match="something else"), exit_on_write_errors():
        raise ValueError("something else") from FileNotFoundError(errno.ENOENT, "No such file or directory", "a")


def test_a_full_disk_names_the_file(tmp_path):
    """The system does not say which one it was."""

    def full() -> OSError:
        return OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(SystemExit, match=r"/a.png could not be written: No space"), exit_on_write_errors():
        write("file", tmp_path / "a.png", full)
    with pytest.raises(OSError, match=r"b.txt"):
        write("file", tmp_path / "a.png", lambda: FileNotFoundError(errno.ENOENT, "No such file", "b.txt"))
    with pytest.raises(OSError, match=r"^the image is truncated$"):
        write("file", tmp_path / "a.png", lambda: OSError("the image is truncated"))


@pytest.mark.parametrize(
    "error",
    [
        NotADirectoryError(errno.ENOTDIR, "Not a directory", "data.json/images"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "data.json"),
        SafetensorError("Error while deserializing header: invalid header"),
        RuntimeError("shapes do not match"),
        ValueError("something else"),
    ],
)
def test_other_errors_of_scripts_stay_as_they_are(error):
    with pytest.raises(type(error)) as caught, exit_on_write_errors():
        raise error
    assert caught.value is error


@pytest.mark.parametrize("kind", KINDS)
def test_an_input_that_must_not_be_read_is_no_output(tmp_path, monkeypatch, kind):
    path = tmp_path / "data"
    path.mkdir() if kind == "folder" else path.write_text("")
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.R_OK)  # root may read what it likes
    with pytest.raises(PermissionError), exit_on_write_errors():
        raise PermissionError(errno.EACCES, "Permission denied", str(path))
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(SystemExit, match="data could not be written: Permission denied"), exit_on_write_errors():
        raise PermissionError(errno.EACCES, "Permission denied", str(path))


@pytest.mark.parametrize("make", [Path.mkdir, os.makedirs])
def test_a_directory_that_cannot_be_made_is_an_output(tmp_path, make):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="out could not be written: Not a directory"), exit_on_write_errors():
        make(tmp_path / "file" / "out")


# Temporary folders of processes that are gone do not stay.


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
