"""The extension of the command `hf`, where `hf extensions install` puts it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXTENSION = Path(__file__).resolve().parents[2] / "examples" / "hf-lavit" / "hf-lavit"
HF = [sys.executable, "-m", "huggingface_hub.cli.hf", "lavit"]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A home with the extension, as its manifest says, and a command `lavit` that shows what it was asked."""
    folder = tmp_path / ".local" / "share" / "hf" / "extensions" / "hf-lavit"
    folder.mkdir(parents=True)
    executable = Path(shutil.copy(EXTENSION, folder))
    manifest = {
        "owner": "someone",
        "repo": "hf-lavit",
        "repo_id": "someone/hf-lavit",
        "short_name": "lavit",
        "executable_path": str(executable),
        "type": "binary",
        "installed_at": "2026-01-01T00:00:00+00:00",
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "lavit").write_text('#!/bin/sh\nprintf "[%s]" "$@"\nexit 3\n')
    (programs / "lavit").chmod(0o755)
    path = os.pathsep.join([str(programs), "/usr/bin", "/bin"])
    return {**os.environ, "HOME": str(tmp_path), "PATH": path, "HF_HUB_DISABLE_UPDATE_CHECK": "1"}


def test_hf_lavit_is_lavit(environment: dict[str, str], tmp_path: Path) -> None:
    command = [*HF, "ask", "a photo.jpg", "What is it?", "--beams", "2"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (result.stdout, result.returncode) == ("[ask][a photo.jpg][What is it?][--beams][2]", 3), result.stderr
    (tmp_path / "programs" / "lavit").unlink()
    missing = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert missing.returncode == 127 and "install lavit-hf" in missing.stderr
