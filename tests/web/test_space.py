"""A published Space, as its machine would start it: its own code, ZeroGPU's real decorator, the model from a Hub."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

from gradio_client import Client, handle_file

from hub.hub_server import HubServer
from web.conftest import ROOT, TINY

PUBLISH = [sys.executable, "-m", "lavit_cli", "publish"]


def test_a_space_runs_what_was_published(tmp_path: Path) -> None:
    server = HubServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {**os.environ, **server.environment(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    environment.pop("HF_MODULES_CACHE", None)
    subprocess.run(
        [*PUBLISH, TINY, "owner/tiny", "--space", "owner/page"], cwd=ROOT / "src", env=environment, check=True
    )
    folder = tmp_path / "space"
    for name, content in server.files("spaces:owner/page").items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    shutil.rmtree(tmp_path / "home", ignore_errors=True)  # nothing is there from publishing
    # A machine of its own: neither this checkout nor its tests.
    for name in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX"):
        environment.pop(name, None)
    environment |= {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_ANALYTICS_ENABLED": "False", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "app.py"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "Running on local URL" in line:
                break
        assert process.poll() is None, "".join(lines)
        client = Client(lines[-1].split()[-1], verbose=False)
        picture = handle_file(str(ROOT / "examples" / "images" / "chelsea.jpg"))
        assert isinstance(client.predict(picture, 0, api_name="/caption"), str)
        drawing, facts = client.predict("a cat", [], 0, 2, 2, api_name="/draw")
        assert Path(drawing).is_file() and "tokens" in facts
        assert any(path == "/owner/tiny/resolve/main/config.json" for _, path in server.requests)
        loaded = {path.parent.parent for path in folder.rglob("*.pyc")}
        assert folder / "lavit_hf" / "web" in loaded  # its own code, not that of this checkout
    finally:
        process.kill()
        process.communicate()
        server.shutdown()
