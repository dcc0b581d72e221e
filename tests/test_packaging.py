"""Wheel and source distribution: what is in them, and that they work."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
BUILT_FROM = ("setup.cfg", "pyproject.toml", "MANIFEST.in", "LICENSE", "WEIGHTS_LICENSE.md", "README.md")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_{0}(sys.argv[1])"


def build(kind: str, source: Path, destination: Path) -> Path:
    """Builds as pip does, with the setuptools that is installed: nothing is downloaded."""
    subprocess.run(
        [sys.executable, "-c", BUILD.format(kind), destination], cwd=source, capture_output=True, check=True
    )
    (found,) = destination.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return found


def package_files() -> list[Path]:
    """What belongs to the package: code, and the checkpoint that comes with it."""
    src = ROOT / "src"
    return [
        path
        for folder in ("lavit_hf", "lavit_cli")
        for path in (src / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution, built in a copy of the checkout."""
    copy = tmp_path_factory.mktemp("checkout")
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name not in ("out", "build", "dist", "src"):
            (copy / path.name).symlink_to(path)
    for path in package_files():  # copied, so that nothing is written beside the real ones
        target = copy / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    archive = build("sdist", copy, tmp_path_factory.mktemp("sdist"))
    with tarfile.open(archive) as tar:
        tar.extractall(archive.parent)
    (folder,) = (path for path in archive.parent.iterdir() if path.is_dir())
    return folder


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel that was built from the source distribution."""
    return build("wheel", sdist, tmp_path_factory.mktemp("wheel"))


def test_sdist_holds_what_tests_and_examples_need(sdist: Path) -> None:
    for name in (
        "tests/conftest.py",
        "tests/data/tiny-original/dims.json",
        "examples/train_lm.py",
        "docs/training.md",
    ):
        assert (sdist / name).is_file(), name
    assert (sdist / "checkpoints/lavit-tiny-random/model.safetensors").is_file()
    assert all((sdist / name).is_file() for name in BUILT_FROM)
    assert not list(sdist.rglob("__pycache__"))


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == {
        path.relative_to(ROOT / "src").as_posix() for path in package_files()
    }
    assert "lavit_hf/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_installed_wheel_works(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "--no-deps",
        "--no-index",
        "--no-compile",
        "--target",
        site,
        wheel,
    ]
    subprocess.run(pip, capture_output=True, check=True)
    code = (
        "import importlib.metadata, lavit_cli, lavit_hf\n"
        "from lavit_hf.remote_code import code_files\n"
        "version = importlib.metadata.version('lavit-hf')\n"
        "print(lavit_hf.__file__, version == lavit_hf.__version__, 'modeling_lavit.py' in code_files())"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout.split() == [str(site / "lavit_hf" / "__init__.py"), "True", "True"]
    assert (site / "bin" / "lavit").is_file()


def test_workflows_call_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    called = set()
    for path in workflows:
        workflow = yaml.safe_load(path.read_text())
        assert workflow["permissions"] == {"contents": "read"}, "jobs ask for more where they need it"
        for job in workflow["jobs"].values():
            named = {name for names in job.get("strategy", {}).get("matrix", {}).values() for name in names}
            for step in job["steps"]:
                assert "uses" not in step or re.search(r"@[0-9a-f]{40}$", step["uses"]), "a tag can be moved"
                words = step.get("run", "").split()
                called |= named & targets if '"$TARGET"' in words else set(words[1:2])
    assert len(workflows) == 3 and called <= targets
    assert {"lint", "types", "test", "fuzz", "conformance", "test-learning", "test-lowest", "dist"} <= called
