"""The files that name versions agree with each other."""

import configparser
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_BOUND = re.compile(r"^([\w-]+)(?:\[\w+\])?>=([\d.]+)$", re.MULTILINE)
_PIN = re.compile(r"^([\w-]+)==([\d.]+)", re.MULTILINE)


def bounds() -> dict[str, str]:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    texts = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    return dict(found for text in texts for found in _BOUND.findall(text))


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def test_lowest_versions_are_the_bounds() -> None:
    pins = dict(_PIN.findall((ROOT / "constraints-lowest.txt").read_text(encoding="utf-8")))
    wanted = {name: numbers(version) for name, version in bounds().items()}
    assert {name: numbers(version)[: len(wanted.get(name, ()))] for name, version in pins.items()} == wanted


def test_tested_versions_are_within_the_bounds() -> None:
    pins = _PIN.findall((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    for name, bound in bounds().items():
        versions = [numbers(version) for pinned, version in pins if pinned.replace("-", "_") == name.replace("-", "_")]
        assert versions and min(versions) >= numbers(bound), name
