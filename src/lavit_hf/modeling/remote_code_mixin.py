"""What is saved can be loaded where this package is not installed, with `trust_remote_code=True`.

The mixins of this file have `lavit_hf.remote_code` write the package's own files beside what is saved. It travels with
them, and so it knows whether it is a part of the package or a copy.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

# Where this is remote code, saving is left to transformers.
IS_PACKAGE = __name__.startswith("lavit_hf.")


def import_composition() -> Any:
    """The module `lavit_hf.composition`, which makes new models and does not travel with weights.

    Raises:
        ImportError: If this is remote code.
    """
    if not IS_PACKAGE:
        raise ImportError(
            "Remote code makes no new LaVIT out of other models. Install the package, lavit-hf, and call this method "
            "of its class: `from lavit_hf import ...`."
        )
    return _import_from_package("composition")


def _import_from_package(name: str) -> Any:
    # Named by a string: transformers takes every package that remote code imports for one that it needs.
    return importlib.import_module(f"lavit_hf.{name}")


class RemoteCodeMixin:
    """Saves the code that the Auto classes need along with a configuration, a processor or a part of one.

    transformers does this for classes that were registered with `register_for_auto_class`, but copies the modules of
    one folder only.
    """

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> Any:
        """Saves as in transformers, and writes the files of code beside it.

        `push_to_hub=True` uploads it as `push_to_hub` does, by default to a repository of the directory's name.
        """
        save: Any = super().save_pretrained  # type: ignore[misc]
        if not IS_PACKAGE:  # transformers copies the files of remote code by itself
            return save(save_directory, *args, push_to_hub=push_to_hub, **kwargs)
        saved = save(save_directory, *args, **({} if push_to_hub else kwargs))
        _import_from_package("remote_code").save_remote_code(Path(save_directory))
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", Path(save_directory).name)
            self.push_to_hub(repo_id, **kwargs)  # type: ignore[attr-defined]
        return saved


class RemoteCodeDictMixin(RemoteCodeMixin):
    """The same for classes that are saved by `to_dict`: a loaded object has the dictionary of the saved one."""

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, without what only the files say: which classes there are in the files of code."""
        values: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        if IS_PACKAGE:
            values.pop("auto_map", None)
        return values
