"""Joining of source files."""

import subprocess
import sys
from pathlib import Path

import pytest

from lavit_hf.remote_code.bundle import bundle, bundle_files


def test_order_and_comments(tmp_path):
    (tmp_path / "base.py").write_text("import os\n\n# why\nBASE = 1\n\ndef unused():\n    os.abort()\n")
    (tmp_path / "middle.py").write_text("from .base import BASE\n\nclass Middle:\n    value = BASE\n")
    main = tmp_path / "main.py"
    main.write_text(
        '"""Main."""\nimport sys as system\nfrom .middle import Middle\nfrom .base import BASE\n'
        "A, B = 1, 2\nclass Main(Middle):\n    here = (BASE, A, system.path)\n__all__ = ['Main']\n"
    )
    code = bundle(main)
    assert "import sys as system" in code and "import os" not in code and "unused" not in code
    assert code.index("# why\nBASE") < code.index("class Middle") < code.index("class Main")
    namespace: dict = {}
    exec(code, namespace)
    assert namespace["Main"].value == 1 and namespace["Main"].here[1] == 1


def test_missing_definition(tmp_path):
    (tmp_path / "base.py").write_text("")
    (tmp_path / "main.py").write_text("from .base import gone\nx = gone\n")
    with pytest.raises(ValueError, match="base.py does not define gone"):
        bundle(tmp_path / "main.py")


def write(folder: Path, sources: dict[str, str]) -> list[Path]:
    for name, source in sources.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(source)
    return [folder / name for name in sources]


def test_files_import_each_other(tmp_path):
    paths = write(
        tmp_path,
        {
            "high/tool.py": "from ..low.base import BASE\n\ndef tool():\n    return BASE\n",
            "high/main.py": (
                '"""Main."""\nfrom ..low.base import BASE\n\ndef main():\n'
                "    from .tool import (\n        tool,\n    )\n\n    return BASE + tool()\n"
            ),
            "low/base.py": (
                '"""Base."""\nBASE = 1\n\ndef late():\n    from ..high.tool import tool\n    return tool()\n'
            ),
        },
    )
    files = bundle_files(paths[1:], lambda path: path.parent.name)
    assert files["high"].startswith('"""Main.') and files["low"].startswith('"""Base.')
    assert "\nfrom .low import BASE\n" in files["high"] and "    from .high import tool\n" in files["low"]
    package = tmp_path / "package"
    write(package, {"__init__.py": "", **{f"{name}.py": source for name, source in files.items()}})
    code = "from package.low import late; from package.high import main; print(late(), main())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert result.stdout == "1 2\n"


@pytest.mark.parametrize(
    ("base", "message"),
    [("def same():\n    return 1\n", "another same"), ("from os import path as same\n", "same: imported")],
)
def test_names_that_collide(tmp_path, base, message):
    main = "from .base import base\n\ndef same():\n    return base\n"
    paths = write(tmp_path, {"main.py": main, "base.py": f"{base}base = same\n"})
    with pytest.raises(ValueError, match=message):
        bundle(paths[0])


def test_equal_definitions_are_written_once(tmp_path):
    shared = "import logging\n\nlogger = logging.getLogger(__name__)\n"
    base = shared + "\ndef base():\n    logger.info('')\n"
    main = f"from .base import base\n{shared}\ndef main():\n    logger.info(base())\n"
    assert bundle(write(tmp_path, {"main.py": main, "base.py": base})[0]).count("logger = ") == 1


@pytest.mark.parametrize("line", ["from . import base", "from .base import thing as other"])
def test_imports_that_rename(tmp_path, line):
    paths = write(tmp_path, {"main.py": f"{line}\n", "base.py": "thing = 1\n"})
    with pytest.raises(ValueError, match=line):
        bundle(paths[0])


def test_statements_that_would_be_lost(tmp_path):
    (tmp_path / "main.py").write_text("import os\nif os.name:\n    value = 1\n")
    with pytest.raises(ValueError, match=r"main.py:2: only imports and definitions"):
        bundle(tmp_path / "main.py")
    (tmp_path / "main.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import os\nx = 1\n")
    assert "TYPE_CHECKING" not in bundle(tmp_path / "main.py")
