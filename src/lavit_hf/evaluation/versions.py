"""Versions of the software that made something."""

from __future__ import annotations

import platform
from importlib import metadata

_PACKAGES = ("lavit-hf", "torch", "transformers", "diffusers", "numpy", "pillow")


def library_versions() -> dict[str, str]:
    """Of the packages that results depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


__all__ = ["library_versions"]
