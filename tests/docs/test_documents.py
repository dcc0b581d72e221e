"""Every code block of the documents runs.

Python blocks of a document run as one script, in order; every bash block by itself. Both run in an empty directory
with links to what a checkout has. Lines with `make`, `pip` and `git` are left out: they would install, and `.ci/run`
runs the `make` commands itself.

Most of them start from the zygote, as importing torch takes longer than they do; those of `NEW_INTERPRETERS`, which
also show that commands and scripts are installed, do not.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from zygote import Zygote

ROOT = Path(__file__).resolve().parents[2]
INSTALLED = Path(sys.executable).parent
DOCUMENTS = (
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "docs/usage.md",
    "docs/conversion.md",
    "docs/training.md",
    "docs/scale.md",
    "docs/metrics.md",
    "docs/evaluation.md",
    "docs/emoji.md",
    "docs/publishing.md",
    "docs/serving.md",
    "docs/web.md",
    "docs/performance.md",
    "examples/README.md",
    "docs/conformance.md",
)
TUTORIAL = "docs/tutorial.md"  # whose blocks go on from one another; test_tutorial.py runs it
NOT_RUN = ("make ", "pip ", "git ")
# Python blocks by document, bash blocks by document and number.
NEW_INTERPRETERS = {"ARCHITECTURE.md", "README.md-1", "docs/training.md-2"}
NOT_CODE = {"text", "bibtex"}
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(document: str, language: str) -> list[str]:
    return [code for kind, code in _FENCE.findall((ROOT / document).read_text(encoding="utf-8")) if kind == language]


def bash_blocks() -> list:
    found = []
    for document in DOCUMENTS:
        for index, code in enumerate(blocks(document, "bash")):
            lines = [line for line in code.splitlines() if not line.startswith((*NOT_RUN, "#")) and line.strip()]
            if lines:
                name = f"{document}-{index}"
                found.append(pytest.param("\n".join(lines), name in NEW_INTERPRETERS, id=name))
    return found


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A directory that looks like the repository, into which a block may write."""
    left_out = {"out", ".git", ".venv", "build", "dist"}
    for path in ROOT.iterdir():
        if path.name not in left_out:
            (tmp_path / path.name).symlink_to(path)
    return tmp_path


def run(command: list[str], folder: Path, programs: Path, seconds: float = 1200) -> str:
    """What a command prints that finds `python` and `lavit` there."""
    path = os.pathsep.join([str(programs), os.environ["PATH"]])
    # Nested runs of pytest must not take themselves for workers of this one.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    result = subprocess.run(
        command, cwd=folder, env={**environment, "PATH": path}, capture_output=True, text=True, timeout=seconds
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("document", [document for document in DOCUMENTS if blocks(document, "python")])
def test_python_blocks_run(document: str, checkout: Path, zygote: Zygote) -> None:
    programs = INSTALLED if document in NEW_INTERPRETERS else zygote.folder
    run([str(programs / "python"), "-c", "\n".join(blocks(document, "python"))], checkout, programs)


@pytest.mark.parametrize(("code", "is_new"), bash_blocks())
def test_bash_blocks_run(code: str, is_new: bool, checkout: Path, zygote: Zygote) -> None:
    programs = INSTALLED if is_new else zygote.folder
    run(["bash", "-euo", "pipefail", "-c", code], checkout, programs)


@pytest.mark.parametrize("document", [*DOCUMENTS, TUTORIAL])
def test_no_block_is_forgotten(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    kinds = [kind for kind, _ in _FENCE.findall(text)]
    assert len(kinds) * 2 == text.count("```")
    assert set(kinds) <= {"python", "bash"} | NOT_CODE


@pytest.mark.parametrize("document", [*DOCUMENTS, TUTORIAL])
def test_links_lead_somewhere(document: str) -> None:
    text = re.sub(r"^```.*?^```", "", (ROOT / document).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    folder = (ROOT / document).parent
    assert [target for target in targets if not (folder / target).exists()] == []


def test_the_table_of_costs_is_what_the_benchmark_prints(zygote: Zygote) -> None:
    table = run([zygote.python, "benchmarks/image_cost.py"], ROOT, zygote.folder)
    assert table in (ROOT / "docs" / "usage.md").read_text(encoding="utf-8")
