"""Weights that derive from others are published with the licenses of these, or not at all."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..conversion.layout import LAYOUT
from ..modeling.configuration_lavit import LavitConfig
from .checks import read_object
from .errors import PublishError

# `lavit convert` puts the folder's name before that of a license of one part.
_LICENSE = re.compile(r"(^|-)licen[cs]e", re.IGNORECASE)
_NOTICE = re.compile(r"(^|-)notice", re.IGNORECASE)
_POLICY = re.compile(r"(^|-)use[-_]policy", re.IGNORECASE)
_TEXT = re.compile(r"[^.]*(\.\d+)*(\.(html?|md|pdf|rst|rtf|txt))?", re.IGNORECASE)
# What a card says of weights that have no license of their own.
_INHERITED = (None, "other", "llama2")

_NEEDED = """{root} holds weights that derive from LaVIT's and Llama 2's{why}, but {missing}.
Add the license files of what they were converted from to the directory: the LaVIT community license, the Llama 2 Community License Agreement and its acceptable use policy, and a NOTICE with "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All Rights Reserved."
Or, if these weights derive from none of them, name their license: --license apache-2.0"""  # noqa: E501 - one line each


def find_notices(files: list[str]) -> list[str]:
    """The licenses, notices and use policies among files at the root."""
    return [file for file in files if "/" not in file and is_notice(file)]


def find_license(files: list[str]) -> str | None:
    """The license file, if there is one."""
    return next((file for file in find_notices(files) if _LICENSE.search(file)), None)


def check_licenses(root: Path, files: list[str], config: Any, stated: str | None) -> bool:
    """Refuses to publish derived weights without the files that have to go with them.

    Args:
        root: The checkpoint.
        files: The files to publish.
        config: The checkpoint's configuration; that of their base for adapters, `None` if nothing is known of it.
        stated: The license that its card or its owner states, as the Hub names it.

    Returns:
        Whether the weights have the licenses of others.

    Raises:
        PublishError: If a license or notice is missing.
    """
    is_converted = (root / LAYOUT).is_file()
    if is_converted:
        copied = [target for target in copied_files(root) if "/" not in target and is_notice(target)]
        if missing := sorted({*(copied or ["NOTICE"])} - set(files)):
            raise PublishError(f"{root} was converted with {', '.join(missing)}, which is gone: put it back.")
    if stated not in _INHERITED or not (is_converted or _has_published_sizes(config)):
        return False
    notices = find_notices(files)
    kinds = {"a license": _LICENSE, "a notice": _NOTICE}
    lacking = [kind for kind, pattern in kinds.items() if not any(map(pattern.search, notices))]
    if lacking:
        why = " (it was converted)" if is_converted else " (it has the sizes of the published model)"
        raise PublishError(_NEEDED.format(root=root, why=why, missing=f"{' and '.join(lacking)} is missing"))
    return True


def copied_files(root: Path) -> list[str]:
    """What `lavit convert` took over as it was, by its own record; paths relative to the directory.

    Raises:
        PublishError: If the record is damaged.
    """
    copied = read_object(root / LAYOUT).get("copied") if (root / LAYOUT).is_file() else {}
    if not isinstance(copied, dict) or not all(isinstance(target, str) for target in copied.values()):
        raise PublishError(f"{root / LAYOUT} is damaged: `copied` is no object of paths.")
    return list(copied.values())


def is_notice(name: str) -> bool:
    """Whether a file is a license, a notice or a use policy, by its name."""
    return bool(_TEXT.fullmatch(name)) and any(pattern.search(name) for pattern in (_LICENSE, _NOTICE, _POLICY))


def _has_published_sizes(config: Any) -> bool:
    """Whether this is the published architecture, as a fine-tuned copy of the published weights is."""
    if config is None or config.model_type != "lavit":
        return False
    text, published = config.text_config, LavitConfig().text_config
    names = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")
    return all(getattr(text, name, None) == getattr(published, name) for name in names)
