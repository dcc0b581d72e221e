"""What ARCHITECTURE.md promises: imports go one way, and importing the package stays cheap."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import lavit_cli

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "lavit_hf"
# Each may import what stands before it. The commands, in a package beside it, may import all; nothing imports them.
ORDER = [
    "utils",
    "data",
    "remote_code",
    "modeling",
    "processing",
    "composition",
    "pipelines",
    "conversion",
    "training",
    "evaluation",
    "hub",
    "serving",
    "batch",
    "web",
]
FILES = sorted(path for part in ORDER for path in (*(PACKAGE / part).rglob("*.py"), *PACKAGE.glob(f"{part}.py")))


def imported_parts(path: Path) -> set[str]:
    """Parts of the package that a file imports anywhere, also within functions.

    "" is the package itself, and "lavit_cli" stands for the commands.
    """
    package = ["lavit_hf", *path.relative_to(PACKAGE).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            modules = [base] if len(base) > 1 else [[*base, alias.name] for alias in node.names]
        else:
            continue
        found |= {(module[1] if len(module) > 1 else "") for module in modules if module[0] == "lavit_hf"}
        found |= {"lavit_cli" for module in modules if module[0] == "lavit_cli"}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    allowed = set(ORDER[: ORDER.index(part) + 1])
    if part in ("modeling", "processing", "composition", "pipelines", "conversion"):
        allowed -= {"data"}  # made-up data is for training and evaluation
    assert imported_parts(path) <= allowed


def test_the_check_sees_wrong_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    path = tmp_path / "modeling" / "module.py"
    path.parent.mkdir()
    path.write_text(
        "from lavit_cli.loading import load\n"
        "def f():\n    from ..conversion import convert\n    import lavit_hf.hub.card\n    from . import x"
    )
    assert imported_parts(path) == {"conversion", "hub", "lavit_cli", "modeling"}


def test_every_command_has_its_file() -> None:
    for command in lavit_cli.app.registered_commands:
        assert command.callback.__module__ == f"lavit_cli.{command.callback.__name__}"


def test_importing_the_package_loads_nothing_heavy() -> None:
    unwanted = (
        "diffusers",
        "typer",
        "torchvision",
        "lavit_hf.conversion",
        "lavit_cli",
        "transformers.models.blip_2.modeling_blip_2",
        "transformers.models.llama.modeling_llama",
    )
    code = f"import sys, lavit_hf; print([name for name in {unwanted} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_importing_the_package_takes_no_time() -> None:
    """At most a twentieth of what it stands on takes: the Auto and base classes of transformers.

    A busy machine, or a slow one, is that for both.
    """
    code = (
        "import time\n"
        "begin = time.process_time()\n"
        "from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText\n"
        "from transformers import AutoProcessor, AutoTokenizer, GenerationMixin, PreTrainedModel, ProcessorMixin\n"
        "from transformers.image_processing_backends import PilBackend, TorchvisionBackend\n"
        "from transformers.tokenization_utils_tokenizers import TokenizersBackend\n"
        "start = time.process_time()\n"
        "import lavit_hf\n"
        "print((time.process_time() - start) / (start - begin))"
    )
    shares: list[float] = []
    while len(shares) < 3 and min(shares, default=1) > 0.05:  # once, unless it was compiled just now
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        shares.append(float(result.stdout))
    assert min(shares) <= 0.05


LIBRARIES = (
    "accelerate",
    "datasets",
    "diffusers",
    "evaluate",
    "huggingface_hub",
    "peft",
    "tokenizers",
    "transformers",
)
DEFINITIONS = (ast.AsyncFunctionDef, ast.ClassDef, ast.FunctionDef)
PUBLIC = {"_asdict", "_make"}  # documented, of named tuples
NOT_IMPORTED = ("lmms_eval_model", "vllm", "web")  # need what may not be installed


def is_private(name: object) -> bool:
    return isinstance(name, str) and name.startswith("_") and not name.startswith("__") and name.isidentifier()


def names_of_others(files: list[Path]) -> dict[str, str]:
    """Private names that are read in these files, and that none of them gives to anything; with a file of each."""
    nodes = [(path, node) for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    own = {node.name for _, node in nodes if isinstance(node, DEFINITIONS)}
    own |= {node.id for _, node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    own |= {node.attr for _, node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    read = {node.attr: path.name for path, node in nodes if isinstance(node, ast.Attribute)}
    for path, node in nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            read |= {node.args[1].value: path.name} if isinstance(node.args[1], ast.Constant) else {}
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            read |= {alias.name: path.name for alias in node.names}
    return {name: path for name, path in read.items() if is_private(name) and name not in own | PUBLIC}


def names_of_bases(path: Path) -> dict[str, str]:
    """Private names of classes of libraries that classes of this file define, with a class of each."""
    module = importlib.import_module(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts))
    found = {}
    for cls in vars(module).values():
        if isinstance(cls, type) and cls.__module__ == module.__name__:
            bases = [base for base in cls.__mro__ if base.__module__.split(".")[0] in LIBRARIES]
            names = {name for base in bases for name in {**vars(base), **vars(base).get("__annotations__", {})}}
            found |= {name: cls.__name__ for name in vars(cls) if is_private(name) and name in names}
    return {name: cls for name, cls in found.items() if name != "_abc_impl"}


def test_private_names_of_libraries_are_listed() -> None:
    text = (PACKAGE.parents[1] / "ARCHITECTURE.md").read_text(encoding="utf-8")
    table = text.partition("## Private names of libraries")[2].partition("\n## ")[0]
    found = names_of_others(list(PACKAGE.parent.rglob("*.py")))
    for path in FILES:
        if not set(NOT_IMPORTED) & {*path.relative_to(PACKAGE).parts, path.stem}:
            found |= names_of_bases(path)
    assert {"_execution_device", "_hf_hook", "_sample", "_mark_tower_model"} <= set(found), "the search finds them"
    assert {name: where for name, where in found.items() if name not in table} == {}
