"""Runs of the zygote are what a new interpreter would be."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from zygote import Zygote
from zygote_client import connect, read_number, start

PROGRAM = """
import json, os, sys
print(json.dumps([sys.argv, sys.path[:2], os.getcwd(), os.environ["WORD"], __name__, sys.stdin.read()]))
sys.exit(int(sys.argv[1]))
"""


def run(python: str, *arguments: object, **options) -> subprocess.CompletedProcess:
    return subprocess.run([python, *map(str, arguments)], capture_output=True, text=True, **options)


def test_arguments_environment_and_streams(python: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {**os.environ, "WORD": "ä b", "PYTHONPATH": str(tmp_path)}
    for arguments in (["-c", PROGRAM], ["-m", "program"], [tmp_path / "program.py"], ["-u", tmp_path / "program.py"]):
        one, other = (
            run(executable, *arguments, 3, "x y", env=environment, cwd=tmp_path, input="read")
            for executable in (python, sys.executable)
        )
        assert one.stdout == other.stdout and one.stdout
        assert (one.returncode, one.stderr) == (other.returncode, other.stderr) == (3, "")


@pytest.mark.parametrize(
    "code",
    [
        "import sys; sys.exit('a message')",
        "import sys; sys.exit()",
        "import atexit; atexit.register(print, 'at the end'); print('first')",
        "import threading; threading.Timer(0.1, print, ['later']).start()",
        "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    ],
)
def test_endings(python: str, code: str) -> None:
    one, other = run(python, "-c", code), run(sys.executable, "-c", code)
    assert (one.returncode, one.stdout, one.stderr) == (other.returncode, other.stdout, other.stderr)


def test_errors(python: str) -> None:
    result = run(python, "-c", "1 / 0")
    assert result.returncode == 1 and result.stderr.endswith("ZeroDivisionError: division by zero\n")
    result = run(python, "-c", "raise KeyboardInterrupt")
    assert result.returncode == -signal.SIGINT and result.stderr.endswith("KeyboardInterrupt\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals_reach_the_run(python: str, number: signal.Signals) -> None:
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    process = subprocess.Popen([python, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    with process:
        assert int(process.stdout.readline()) != process.pid
        process.send_signal(number)
        assert process.stdout.read() == ""  # ends when the run has ended, as nobody else could write
        assert process.wait() == -number


def test_without_a_client(zygote: Zygote, tmp_path: Path) -> None:
    code = "import time; time.sleep(60)"
    for number in (signal.SIGTERM, signal.SIGKILL):
        with connect(zygote.address) as connection, open(os.devnull, "r+") as nothing:
            run = start(connection, ["-c", code], zygote.environment, str(tmp_path), [nothing.fileno()] * 3)
            os.killpg(run, number)  # the group is there at once
            assert read_number(connection) == -number


def test_nothing_of_the_package_is_there_and_much_else_is(python: str) -> None:
    code = "import sys; print({'torch', 'transformers', 'diffusers', 'lavit_hf', 'lavit_cli'} & set(sys.modules))"
    assert set(eval(run(python, "-c", code).stdout)) == {"torch", "transformers", "diffusers"}


def test_what_starts_python_starts_it_here(python: str) -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import sys; print(*sys.modules)'])"
    assert "torch" in run(python, "-c", code).stdout.split()


def test_variables_that_libraries_have_read_cannot_change(python: str) -> None:
    result = run(python, "-c", "", env={**os.environ, "HF_HOME": "elsewhere"})
    assert result.returncode == 1 and "HF_HOME is elsewhere here and" in result.stderr
