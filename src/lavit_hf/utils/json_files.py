"""Reading of JSON files that may hold anything. What is wrong with one becomes an error that names it.

Files of code beside weights hold a copy of this.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def read_json(path: str | os.PathLike[str], error: type[Exception] = OSError) -> Any:
    """Reads a JSON file.

    Raises:
        Exception: `error`, if it cannot be read, or is no JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as reason:
        if error is OSError:  # the system's own names the file
            raise
        raise error(f"{path} cannot be read: {reason.strerror or reason}.") from reason
    except (ValueError, RecursionError) as reason:  # no JSON, no UTF-8, or nested too deeply
        raise error(f"{path} is not readable as JSON: {reason}.") from reason


def read_json_object(path: str | os.PathLike[str], error: type[Exception] = OSError) -> dict[str, Any]:
    """Reads a JSON file that has to hold an object.

    Raises:
        Exception: `error`, if it cannot be read, is no JSON, or holds something else.
    """
    content = read_json(path, error)
    if not isinstance(content, dict):
        raise error(f"{path} does not hold a JSON object, but a {type(content).__name__}.")
    return content
