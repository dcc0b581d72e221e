"""What is saved can be loaded where this package is not installed, with `trust_remote_code=True`."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

# Where this is remote code, everything is left to transformers.
IS_PACKAGE = __name__.startswith("lavit_hf.")


class RemoteCodeMixin:
    """Saves the code that the Auto classes need along with a configuration, a processor or a part of one.

    transformers does this for classes that were registered with `register_for_auto_class`, but copies the modules of
    one folder only.
    """

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> Any:
        """Saves as in transformers, and writes the files of code beside it.

        Args:
            save_directory: Where to; created if needed.
            args: As in transformers.
            push_to_hub: Whether to upload it as well, as `push_to_hub` does.
            kwargs: As in transformers; with `push_to_hub=True` those of `push_to_hub`, of which `repo_id` is the name
                of the directory by default.
        """
        save: Any = super().save_pretrained  # type: ignore[misc]
        if not IS_PACKAGE:  # transformers copies the files of remote code by itself
            return save(save_directory, *args, push_to_hub=push_to_hub, **kwargs)
        saved = save(save_directory, *args, **({} if push_to_hub else kwargs))
        # Named by a string: transformers takes every package that remote code imports for one that it needs.
        importlib.import_module("lavit_hf.remote_code.checkpoint").save_remote_code(Path(save_directory))
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", Path(save_directory).name)
            self.push_to_hub(repo_id, **kwargs)  # type: ignore[attr-defined]
        return saved


class RemoteCodeDictMixin(RemoteCodeMixin):
    """The same for classes that are saved as a dictionary, which is then equal to that of what was saved."""

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, without what only the files say: which classes there are in the files of code."""
        values: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        if IS_PACKAGE:
            values.pop("auto_map", None)
        return values
