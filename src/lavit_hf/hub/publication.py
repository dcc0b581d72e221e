"""What a repository will hold, put together without touching the checkpoint."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..conversion.pixel_decoders import link_pixel_decoders
from ..pipelines.remote_code import PIPELINE_MODULE, write_code
from ..remote_code.checkpoint import save_remote_code
from .card import Origin, read_card, write_card
from .errors import PublishError
from .facts import read_config, read_facts
from .files import WEIGHTS, check_weights, list_files
from .licenses import check_licenses, find_license

_PROCESSOR = ("processor_config.json", "tokenizer_config.json", "tokenizer.json")
_PIXEL_DECODERS = ("", "lowres/")


@dataclass
class Publication:
    """The content of a repository.

    Attributes:
        files: The files by their paths there.
        left_out: What of the checkpoint is not published.
        hints: What the card does not say.
    """

    files: dict[str, Path]
    left_out: list[str]
    hints: list[str] = field(default_factory=list)

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of the files in bytes."""
        return {name: path.stat().st_size for name, path in self.files.items()}


@contextmanager
def prepare(checkpoint: Path, repository: str, origin: Origin) -> Iterator[Publication]:
    """Checks a checkpoint, and yields what is to be published of it.

    Weights stay where they are; everything else is copied to a temporary directory, where code and card are added.

    Raises:
        PublishError: If the checkpoint is incomplete, or lacks a license.
    """
    if not checkpoint.is_dir():
        raise PublishError(f"{checkpoint} is not a directory; publish takes the directory of a checkpoint.")
    files, left_out = list_files(checkpoint)
    config = read_config(checkpoint)
    check_weights(checkpoint, files)
    facts = read_facts(checkpoint, files, config)
    if facts.is_whole and (missing := sorted(set(_PROCESSOR) - set(files))):
        raise PublishError(f"{checkpoint} has no {missing[0]}: save the processor there, too.")
    data, text = read_card(checkpoint)
    stated = origin.license or data.license
    is_inherited = check_licenses(checkpoint, files, config, stated)
    origin = replace(origin, inherited_license=find_license(files) if is_inherited else None)
    with tempfile.TemporaryDirectory(prefix="lavit-publish-") as folder:
        staged = Path(folder)
        for file in files:
            if not file.endswith(WEIGHTS):
                (staged / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(checkpoint / file, staged / file)
        _add_code(staged)
        if facts.is_whole:
            link_pixel_decoders(staged)
        card = write_card(data, text, facts, repository, origin)
        (staged / "README.md").write_text(card, encoding="utf-8")
        found = {file: checkpoint / file for file in files if file.endswith(WEIGHTS)}
        found |= {path.relative_to(staged).as_posix(): path for path in staged.rglob("*") if path.is_file()}
        yield Publication(dict(sorted(found.items())), left_out, _hints(data))


def _add_code(staged: Path) -> None:
    save_remote_code(staged)
    for folder in _PIXEL_DECODERS:
        if (staged / folder / f"{PIPELINE_MODULE}.py").is_file():
            write_code(staged / folder)


def _hints(data: object) -> list[str]:
    options = {"license": "--license", "base_model": "--base-model", "datasets": "--dataset"}
    return [f"The card names no {name} ({option})." for name, option in options.items() if not getattr(data, name)]
