"""A Hub on this machine, and clients of it."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hub.hub_server import HubServer
from zygote import Zygote

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "checkpoints" / "lavit-tiny-random"

# Runs code against the Hub: `client(code, *arguments)`; `is_owner=False` is not logged in.
Client = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="session")
def server() -> Iterator[HubServer]:
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def hub(server: HubServer) -> HubServer:
    """An empty Hub."""
    server.clear()
    return server


@pytest.fixture(scope="session")
def variables() -> dict[str, str]:
    """The environment of clients, but for what the Hub adds."""
    own = ("HF_TOKEN", "HF_HOME", "HF_MODULES_CACHE")
    return {name: value for name, value in os.environ.items() if name not in own}


@pytest.fixture(scope="session")
def owner(server: HubServer, variables: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """Whoever is logged in: libraries read which Hub there is, and where its files go, when they are imported."""
    zygote = Zygote(variables | server.environment(tmp_path_factory.mktemp("owner") / "home"))
    yield zygote
    zygote.close()


@pytest.fixture
def client(server: HubServer, variables: dict[str, str], owner: Zygote, tmp_path: Path) -> Client:
    """Runs Python code in a process that knows this Hub, with a cache that is empty at the beginning of the test."""
    shutil.rmtree(owner.environment["HF_HOME"], ignore_errors=True)

    def run(code: str, *arguments: object, is_owner: bool = True) -> subprocess.CompletedProcess:
        stranger = variables | server.environment(tmp_path / "stranger", token=None)
        python, environment = (owner.python, owner.environment) if is_owner else (sys.executable, stranger)
        command = [python, "-c", code, *map(str, arguments)]
        result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result

    return run


@pytest.fixture(scope="session")
def tiny_checkpoint() -> Path:
    """The checkpoint in the repository."""
    return CHECKPOINT
