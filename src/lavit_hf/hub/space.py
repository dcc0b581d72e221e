"""A Space: the page of `lavit demo --web` for a published checkpoint.

It holds the package's own code, so that it runs what was tried here, whatever version an index has.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, SpaceCardData

from .card import is_hub_name
from .facts import read_config
from .files import PublishError
from .uploads import UPLOAD_ERRORS, create_commit, describe_error

GRADIO = "6.31.0"
"""The version of gradio that the page was tested with; Spaces install it by themselves."""

_PYTHON = "3.12"
_PACKAGE = Path(__file__).resolve().parents[1]
_DISTRIBUTION, _EXTRAS = "lavit-hf", ("demo", "pixels")
_LEFT_OUT = ("checkpoints", "__pycache__")
_EXTRA = re.compile(r"""extra\s*==\s*['"]([\w-]+)['"]""")
_TEXT = """A page to play with [{model}](https://huggingface.co/{model}): captions, answers and drawings, which patches
of a picture become tokens, and what they cost. Made by `lavit publish --space`.
"""


@dataclass(frozen=True)
class SpaceReport:
    """What became of a Space, or would.

    Attributes:
        space: Its name.
        sizes: Sizes of its files in bytes.
        hints: What its owner has to do.
        url: Where it is; `None` if nothing was uploaded.
        commit: The commit that holds all of it.
    """

    space: str
    sizes: dict[str, int]
    hints: list[str] = field(default_factory=list)
    url: str | None = None
    commit: str | None = None


def space_files(space: str, model: str, checkpoint: str | Path) -> dict[str, bytes | Path]:
    """The files of a Space, as their content or where they are.

    Args:
        space: Its name, `user/name`.
        model: Name of the published checkpoint.
        checkpoint: Its directory here.

    Raises:
        PublishError: If it is no whole LaVIT, or one of the names is none.
    """
    for name in (space, model):
        if not is_hub_name(name) or name.count("/") != 1:
            raise PublishError(f"{name} is not the name of a repository: it looks like user/name.")
    if read_config(Path(checkpoint)).model_type != "lavit":
        raise PublishError(f"{checkpoint} is a visual tokenizer alone; the page of a Space needs a whole LaVIT.")
    data = SpaceCardData(
        title=model.partition("/")[2],
        emoji="🧩",
        colorFrom="yellow",
        colorTo="pink",
        sdk="gradio",
        sdk_version=GRADIO,
        python_version=_PYTHON,
        app_file="app.py",
        models=[model],
        tags=["lavit"],
        suggested_hardware="zero-a10g",
        short_description="Read and draw pictures as words",
    )
    app = (_PACKAGE / "web" / "space_app.py").read_text(encoding="utf-8")
    files: dict[str, bytes | Path] = {
        "README.md": f"---\n{data.to_yaml()}\n---\n\n{_TEXT.format(model=model)}".encode(),
        "app.py": re.sub(
            r'^MODEL = ".*"$', lambda _: f"MODEL = {json.dumps(model)}", app, flags=re.MULTILINE
        ).encode(),
        "requirements.txt": "".join(f"{line}\n" for line in _requirements()).encode(),
    }
    for path in sorted(_PACKAGE.rglob("*")):
        inside = path.relative_to(_PACKAGE)
        if path.is_file() and not set(inside.parts) & set(_LEFT_OUT) and not inside.name.startswith("."):
            files[f"{_PACKAGE.name}/{inside.as_posix()}"] = path
    return files


def _requirements() -> list[str]:
    """What the package and the page need, but gradio, which `sdk_version` names."""
    found = {"spaces"}
    for line in metadata.requires(_DISTRIBUTION) or ():
        requirement, _, marker = line.partition(";")
        extra = _EXTRA.search(marker)
        if (extra is None or extra.group(1) in _EXTRAS) and not requirement.startswith("gradio"):
            found.add(requirement.strip())
    return sorted(found)


def publish_space(
    space: str,
    model: str,
    checkpoint: str | Path,
    *,
    private: bool | None = None,
    dry_run: bool = False,
    token: str | bool | None = None,
) -> SpaceReport:
    """Publishes the page of `lavit demo --web` for a published checkpoint as a Space, in one commit.

    Args:
        space: Name of the Space, `user/name`; created if needed.
        model: Name of the published checkpoint.
        checkpoint: Its directory here.
        private: Whether a new Space is private; by default what is usual for its owner. `True` refuses one that is
            public already.
        dry_run: Only says what would be published; asks nothing of the Hub.
        token: Token of the Hub; by default the stored one.

    Returns:
        What was published.

    Raises:
        PublishError: If the checkpoint is no whole LaVIT, a name is none, or the Hub refuses it or does not answer.
    """
    files = space_files(space, model, checkpoint)
    sizes = {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in files.items()}
    hints = [f"{space}: choose ZeroGPU or another hardware in its settings; without, it runs on a CPU."]
    if private:
        hints.append(f"{space}: so that it can read a private model, give it a secret HF_TOKEN in its settings.")
    if dry_run:
        return SpaceReport(space, sizes, hints)
    api = HfApi(token=token)
    operations = [CommitOperationAdd(name, file) for name, file in files.items()]
    try:
        api.create_repo(space, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        if private and not api.space_info(space).private:  # it would show a private model to everybody
            raise PublishError(f"The Space {space} exists and is public; make it private in its settings first.")
        message = "Upload a page for LaVIT"
        commit = create_commit(api, space, operations, f"The Space {space}", commit_message=message, repo_type="space")
    except UPLOAD_ERRORS as error:
        raise PublishError(f"The Space {space} was not changed: {describe_error(error)}") from error
    return SpaceReport(space, sizes, hints, f"{api.endpoint}/spaces/{space}", commit.oid)


__all__ = ["GRADIO", "SpaceReport", "publish_space", "space_files"]
