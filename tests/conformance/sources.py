"""Where transformers' own tests come from: the source distribution of the installed version.

    python tests/conformance/sources.py

downloads it into `.cache/`, which git ignores. Nothing of it is part of this repository.
"""

import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

VERSION = version("transformers")
CACHE = Path(__file__).resolve().parents[2] / ".cache" / "conformance" / VERSION
# The tests import each other relatively, so they become a package; `tests` would be taken for ours.
PACKAGE = "transformers_tests"


def fetch() -> Path:
    """Downloads and unpacks the tests if they are not there yet; returns the folder that has the package in it."""
    if not (CACHE / PACKAGE).is_dir():
        CACHE.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE.parent) as folder:
            unpack(download(Path(folder)), Path(folder) / "unpacked")
            shutil.rmtree(CACHE, ignore_errors=True)
            (Path(folder) / "unpacked").rename(CACHE)
    return CACHE


def download(folder: Path) -> Path:
    """The source distribution of exactly the installed version."""
    # pip builds metadata of whatever it downloads; without isolation it installs nothing for that.
    options = ["--no-deps", "--no-binary", "transformers", "--no-build-isolation", "--quiet"]
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--dest", str(folder), *options]
    if subprocess.run([*pip, f"transformers=={VERSION}"]).returncode != 0:
        raise SystemExit(f"The source distribution of transformers {VERSION} could not be downloaded, see above.")
    (archive,) = folder.glob("*.tar.gz")
    return archive


def unpack(archive: Path, destination: Path) -> None:
    """Takes the files `tests/test_*.py` out of the archive, and makes a package of them."""
    package = destination / PACKAGE
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    with tarfile.open(archive) as tar:
        for member in tar:
            if found := re.fullmatch(r"[^/]+/tests/(test_\w+\.py)", member.name):
                (package / found[1]).write_bytes(tar.extractfile(member).read())
    if not (package / "test_modeling_common.py").exists():
        raise SystemExit(f"{archive.name} holds no tests/test_modeling_common.py.")


if __name__ == "__main__":
    print(fetch())
