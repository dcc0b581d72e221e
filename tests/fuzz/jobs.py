"""Calls in processes of their own, which start at once, as the zygote has imported everything, and may be killed.

A job has its own directory, output files, and limit of memory.
"""

import contextlib
import importlib
import json
import os
import resource
import select
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zygote import Zygote
from zygote_client import connect, read_number, start

TESTS = Path(__file__).resolve().parents[1]
# What commands and training scripts import, which takes longer than they do.
IMPORTED = (
    *(f"lavit_hf.{name}" for name in ("conversion", "data.loading", "evaluation", "hub", "pipelines", "training")),
    *("lavit_hf.training.precompute_codes.tokenize_dataset", "lavit_cli.demo_sheet", "lavit_cli.loading"),
)
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
_RUN = "import sys; from fuzz.jobs import run; run(sys.argv[1])"


@dataclass
class Result:
    """How a job ended.

    Attributes:
        code: Its exit status, negative for a signal; `None` if it had to be killed because it took too long.
        stdout: What it wrote there.
        stderr: What it wrote there.
        seconds: How long it took.
    """

    code: int | None
    stdout: str
    stderr: str
    seconds: float


class Jobs:
    """Starts jobs, one at a time.

    Args:
        folder: Where the output of jobs goes.
    """

    def __init__(self, folder: Path) -> None:
        self._outputs = [folder / name for name in ("stdout", "stderr")]
        paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
        own = {**_ENVIRONMENT, "PYTHONPATH": paths, "HF_DATASETS_CACHE": str(folder / "cache")}
        self._zygote = Zygote(os.environ | own, IMPORTED)

    def run(self, call: str, *args: Any, cwd: Path, seconds: float, memory: int | None = None) -> Result:
        """Runs a job to its end.

        Args:
            call: `module:function`.
            args: Its arguments, of JSON's types.
            cwd: Its working directory, in which it also gets its temporary files.
            seconds: How long it may take.
            memory: How many bytes it may take beyond those that it has when the module is imported.
        """
        self.start(call, *args, cwd=cwd, memory=memory)
        return self.wait(seconds)

    def start(self, call: str, *args: Any, cwd: Path, memory: int | None = None) -> None:
        """Starts a job, which has to be waited for; arguments as for `run`."""
        job = json.dumps({"call": call, "args": args, "memory": memory})
        environment = {**self._zygote.environment, "TMPDIR": str(cwd)}
        self._connection, self._started = connect(self._zygote.address), time.monotonic()
        stdout, stderr = (path.open("w") for path in self._outputs)
        with open(os.devnull) as stdin, stdout, stderr:
            streams = [stream.fileno() for stream in (stdin, stdout, stderr)]
            self._pid = start(self._connection, ["-c", _RUN, job], environment, str(cwd), streams)

    def kill(self, number: int) -> None:
        """Sends a signal to the job and to all processes that it started, as a terminal does."""
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.killpg(self._pid, number)

    def is_over(self, seconds: float) -> bool:
        """Waits at most so long for the job to end."""
        return bool(select.select([self._connection], [], [], seconds)[0])

    def wait(self, seconds: float) -> Result:
        """Waits for the job, and ends it if it takes longer than that."""
        in_time = self.is_over(seconds)
        if not in_time:
            self.kill(signal.SIGKILL)
        with self._connection:
            code = read_number(self._connection)
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in self._outputs]
        return Result(code if in_time else None, *texts, time.monotonic() - self._started)

    def close(self) -> None:
        """Ends the zygote."""
        self._zygote.close()


def lavit(*arguments: str) -> None:
    """The command line, as a job."""
    import lavit_cli

    sys.argv = ["lavit", *arguments]
    lavit_cli.main()


def script(path: str, *arguments: str) -> None:
    """A script, as a job."""
    import runpy

    sys.argv = [path, *arguments]
    sys.path.insert(0, os.path.dirname(path))
    runpy.run_path(path, run_name="__main__")


def run(text: str) -> None:
    """Does a job, in its process."""
    job = json.loads(text)
    module, _, function = job["call"].partition(":")
    call = getattr(importlib.import_module(module), function)
    if job["memory"] is not None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + job["memory"]
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    call(*job["args"])
