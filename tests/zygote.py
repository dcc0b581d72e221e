"""Python that has imported what takes seconds: every run is a fork of one process, the zygote.

A run is a process of its own: it can be killed, start others, and be one of several. It gets arguments, environment,
directory and standard streams of whoever started it, and imports the package anew. All that it saves is to import
torch, transformers and the like once more. For whatever these imports themselves are tested for, there is
`sys.executable`.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

CLIENT = Path(__file__).with_name("zygote_client.py")
# Nothing of the package itself: a run imports it, or shows that it can do without.
PRELOADED = (
    *("accelerate", "accelerate.commands.launch", "datasets", "evaluate", "peft", "typer.testing"),
    *("torch.distributed.run", "torch.distributed.tensor", "transformers.trainer"),
    *(f"transformers.{name}" for name in ("image_processing_backends", "processing_utils", "modeling_utils")),
    *("transformers.models.blip_2.modeling_blip_2", "transformers.models.llama.modeling_llama"),
    *("diffusers.models", "diffusers.models.autoencoders.autoencoder_kl", "diffusers.models.unets.unet_2d_condition"),
    *("diffusers.pipelines.pipeline_utils", "diffusers.loaders.lora_pipeline", "diffusers.schedulers"),
)
# Libraries read variables of these names when they are imported.
_READ_AT_IMPORT = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "DIFFUSERS_")


class Zygote:
    """Starts the process that runs are born of.

    Args:
        environment: Its environment. Runs may have others, but for what libraries read when they are imported.
        modules: What it imports besides, where the environment's `PYTHONPATH` has it.

    Attributes:
        environment: The same.
        address: Of the socket where `zygote_client` asks for runs.
        folder: Where `python`, `lavit` and `pytest` are: programs for `subprocess`, for shells, and for what starts
            `sys.executable`.
        python: The path of the former.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ, modules: Sequence[str] = ()) -> None:
        self.environment = dict(environment)
        self.folder = Path(tempfile.mkdtemp(prefix="zygote-"))  # short, as the names of sockets have to be
        self.python = str(self.folder / "python")
        self.address = str(self.folder / "socket")
        self._write("python", [sys.executable, "-I", "-S", str(CLIENT), self.address])
        for name in ("lavit", "pytest"):
            self._write(name, [self.python, str(Path(sys.executable).parent / name)])
        self._process = subprocess.Popen(
            [sys.executable, __file__, self.address, self.python, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={name: value for name, value in environment.items() if name != "PYTHONPATH" or modules},
        )
        assert self._process.stdout.readline() == b"ready\n"

    def _write(self, name: str, command: list[str]) -> None:
        path = self.folder / name
        path.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
        path.chmod(0o755)

    def close(self) -> None:
        """Ends the process, after all runs."""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def main(address: str, python: str, *modules: str) -> None:
    """Serves; in each of the processes that are forked for it, runs what a client asks for."""
    before = dict(os.environ)
    sys.path.pop(0)  # the directory of this file
    ending = _Ending()  # before what others want to do at the end, to come after it
    for name in (*PRELOADED, *modules):
        importlib.import_module(name)
    gc.freeze()  # or collecting garbage would copy all of it into every run
    request = _serve(address)
    if request is None:
        shutil.rmtree(os.path.dirname(address))  # here, as tests may have been killed
    else:
        with ending:
            _prepare(request, before)
            sys.executable = python
            _run(request["arguments"])


class _Ending:
    """Ends a run as Python does, except that memory is given back as a whole: piece by piece takes half a second."""

    def __init__(self) -> None:
        self.code: int | None = None
        atexit.register(self)

    def __enter__(self) -> None:
        self.code = 0

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> bool:
        if isinstance(error, SystemExit):
            is_message = not isinstance(error.code, int | None)
            self.code = 1 if is_message else error.code or 0
            if is_message:
                print(error.code, file=sys.stderr)
        elif error is not None:
            self.code = 1 if isinstance(error, Exception) else -signal.SIGINT
            sys.excepthook(kind, error, traceback.tb_next)
        return True

    def __call__(self) -> None:
        if self.code is None:
            return  # the zygote itself
        sys.stdout.flush()
        sys.stderr.flush()
        if self.code < 0:
            signal.signal(-self.code, signal.SIG_DFL)
            os.kill(os.getpid(), -self.code)
        os._exit(self.code & 0xFF)


def _serve(address: str) -> dict[str, Any] | None:
    """Forks for every client until the standard input ends. Returns what is asked for, in the run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal interrupts clients, and they their runs
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen(64)
        print("ready", flush=True)
        keepers = set()
        while sys.stdin not in select.select([server, sys.stdin], [], [])[0]:
            connection, _ = server.accept()
            keeper = os.fork()
            if keeper == 0:
                server.close()
                return _keep(connection)
            connection.close()
            keepers.add(keeper)
            keepers = {pid for pid in keepers if os.waitpid(pid, os.WNOHANG) == (0, 0)}
    for keeper in keepers:
        os.waitpid(keeper, 0)
    return None


def _keep(connection: socket.socket) -> dict[str, Any]:
    """Forks the run, and stays to tell the client how it ends, or to kill it if the client is killed."""
    head, streams, _, _ = socket.recv_fds(connection, 8, 3)
    with connection.makefile("rb") as file:
        request = json.loads(file.read(int.from_bytes(head, "big")))
    run = os.fork()
    if run == 0:
        os.setpgid(0, 0)
        connection.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        return request
    os.setpgid(run, run)  # here and there: whoever comes first
    for stream in streams:
        os.close(stream)
    connection.sendall(b"%d\n" % run)

    def kill_with_client() -> None:
        with contextlib.suppress(ConnectionError, ProcessLookupError):  # both have ended
            if not connection.recv(1):
                os.kill(run, signal.SIGKILL)

    threading.Thread(target=kill_with_client, daemon=True).start()
    code = os.waitstatus_to_exitcode(os.waitpid(run, 0)[1])
    with contextlib.suppress(BrokenPipeError):  # the client was killed
        connection.sendall(b"%d\n" % code)
    os._exit(0)


def _prepare(request: dict[str, Any], before: Mapping[str, str]) -> None:
    """Makes this process what the client's would be."""
    environment = request["environment"]
    for name in before.keys() | environment.keys():
        if name.startswith(_READ_AT_IMPORT) and before.get(name) != environment.get(name):
            sys.exit(f"{name} is {environment.get(name)} here and {before.get(name)} in the zygote; it needs its own")
    added = {name: value for name, value in os.environ.items() if name not in before}  # by what was imported
    os.environ.clear()
    os.environ.update({**added, **environment})
    os.chdir(request["folder"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tempfile.tempdir = None
    sys.modules["numpy"].random.seed()  # or all runs would draw the same; `random` does it by itself
    sys.modules["torch"].set_num_threads(int(environment.get("OMP_NUM_THREADS") or os.cpu_count()))


def _run(arguments: list[str]) -> None:
    """What Python does with its arguments."""
    if arguments[0] == "-u":
        arguments = arguments[1:]
        sys.stdout.reconfigure(write_through=True)
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    kind = arguments[0] if arguments[0].startswith("-") else "script"
    first = {"-c": "", "-m": os.getcwd(), "script": os.path.dirname(os.path.realpath(arguments[0]))}[kind]
    sys.path[:0] = [first, *paths]
    importlib.invalidate_caches()
    if kind == "-m":
        sys.argv = arguments[1:]
        sys.modules.pop(arguments[1], None)
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    sys.modules["__main__"] = program = ModuleType("__main__")
    if kind == "-c":
        sys.argv = ["-c", *arguments[2:]]
        code = compile(arguments[1], "<string>", "exec")
    else:
        sys.argv = arguments
        program.__file__ = arguments[0]
        code = compile(Path(arguments[0]).read_bytes(), arguments[0], "exec")
    exec(code, program.__dict__)


if __name__ == "__main__":
    main(*sys.argv[1:])
