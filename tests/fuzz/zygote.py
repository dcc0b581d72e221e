"""Runs jobs in children of a process that has imported everything, so that each starts at once and can be killed.

A job is a call in a process with its own directory, output files, handlers of signals, and limit of memory.
"""

import gc
import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
# What commands and training scripts import, which takes longer than they do.
PRELOADED = (
    *("accelerate", "datasets", "evaluate", "lavit_cli", "peft", "typer.testing", "transformers.trainer"),
    *("diffusers.models", "diffusers.models.autoencoders.autoencoder_kl", "diffusers.models.unets.unet_2d_condition"),
    *(f"lavit_hf.{name}" for name in ("conversion", "data.loading", "evaluation", "hub", "pipelines", "training")),
    *("lavit_hf.training.precompute_codes.tokenize_dataset", "lavit_cli.demo_sheet", "lavit_cli.loading"),
)
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}


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


class Zygote:
    """The process that jobs are born of; one job at a time.

    Args:
        folder: Where the output of jobs goes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pid = 0
        self._started = 0.0
        paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fuzz.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            cwd=TESTS,
            env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": paths, "HF_DATASETS_CACHE": str(folder / "cache")},
        )
        assert self._process.stdout.readline() == b"ready\n"

    def run(self, call: str, *args: Any, cwd: Path, seconds: float, memory: int | None = None) -> Result:
        """Runs a job to its end.

        Args:
            call: `module:function`.
            args: Its arguments, of JSON's types.
            cwd: Its working directory, in which it also gets its temporary files.
            seconds: How long it may take.
            memory: How many bytes it may take beyond those that it is born with.
        """
        self.start(call, *args, cwd=cwd, memory=memory)
        return self.wait(seconds)

    def start(self, call: str, *args: Any, cwd: Path, memory: int | None = None) -> None:
        """Starts a job, which has to be waited for; arguments as for `run`."""
        job = {"call": call, "args": args, "cwd": str(cwd), "memory": memory}
        job |= {name: str(self.folder / name) for name in ("stdout", "stderr")}
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        self.pid = int(self._process.stdout.readline())
        self._started = time.monotonic()

    def kill(self, number: int) -> None:
        """Sends a signal to the job and to all processes that it started, as a terminal does."""
        os.killpg(self.pid, number)

    def is_over(self, seconds: float) -> bool:
        """Waits at most so long for the job to end."""
        return bool(select.select([self._process.stdout], [], [], seconds)[0])

    def wait(self, seconds: float) -> Result:
        """Waits for the job, and ends it if it takes longer than that."""
        in_time = self.is_over(seconds)
        if not in_time:
            self.kill(signal.SIGKILL)
        code = int(self._process.stdout.readline())
        texts = [(self.folder / name).read_text(encoding="utf-8", errors="replace") for name in ("stdout", "stderr")]
        return Result(code if in_time else None, *texts, time.monotonic() - self._started)

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


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


def _serve() -> None:
    """Forks a child for each line of the standard input; answers with its number, and then with its exit status."""
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # or collecting garbage would copy all of it into every child
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    print("ready", file=answers)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            answers.close()
            _run(json.loads(line))  # and leave the interpreter as any other program does
            return
        os.setpgid(pid, pid)  # here and there: whoever comes first
        print(pid, file=answers)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers)


def _run(job: dict[str, Any]) -> None:
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in jobs of a shell's background
    os.chdir(job["cwd"])
    os.environ["TMPDIR"], tempfile.tempdir = job["cwd"], None
    for descriptor, path in ((0, os.devnull), (1, job["stdout"]), (2, job["stderr"])):
        opened = os.open(path, os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    if job["memory"] is not None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + job["memory"]
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    module, _, function = job["call"].partition(":")
    getattr(importlib.import_module(module), function)(*job["args"])


if __name__ == "__main__":
    _serve()
