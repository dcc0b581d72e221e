"""Examples use what users may use: names that packages export, which stay where they are."""

import ast
import importlib
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PUBLIC = (
    "lavit_hf",
    "lavit_hf.data.emoji",
    "lavit_hf.data.scenes",
    "lavit_hf.data.worlds",
    "lavit_hf.evaluation",
    "lavit_hf.hub",
    "lavit_hf.serving",
    "lavit_hf.training",
)
FILES = sorted(EXAMPLES.rglob("*.py"))


def imported_names(path: Path) -> set[tuple[str, str]]:
    """Modules of the package that a file imports anywhere, with the names that it takes from them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and not node.level:
            found |= {(node.module or "", alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
    return {(module, name) for module, name in found if module.partition(".")[0] == "lavit_hf"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_examples_import_public_names(path: Path) -> None:
    for module, name in imported_names(path):
        assert module in PUBLIC, f"{module}.{name}"
        assert name in importlib.import_module(module).__all__, f"{module}.{name}"


@pytest.mark.parametrize("module", PUBLIC)
def test_what_is_exported_is_there(module: str) -> None:
    package = importlib.import_module(module)
    assert all(getattr(package, name) is not None for name in package.__all__)
