"""What a repository will hold, put together without touching the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from ..data.public_text import is_path, without_paths
from ..pipelines.pixel_decoder_files import DECODER_FOLDERS, MODEL_INDEX, link_pixel_decoders
from ..remote_code import PIPELINE_MODULE, save_remote_code, write_code
from ..utils.atomic_files import temporary_folder, write_json
from .card import Origin, check_origin, is_hub_name, read_card, remove_paths, write_card
from .checks import check_weights, is_index, read_object
from .errors import PublishError
from .facts import ADAPTER_CONFIG, Adapter, is_adapter, read_adapter, read_config, read_facts
from .files import CONFIGURATIONS, FileList, list_files, mapped_modules, read_parts
from .licenses import check_licenses, find_license

_PROCESSOR = ("processor_config.json", "tokenizer_config.json", "tokenizer.json")
_PREFIX = "lavit-publish-"
# Where libraries note what they loaded something from, be it a directory of whoever saved it.
_NAMES = ("_name_or_path", "name_or_path")


@dataclass
class Publication:
    """The content of a repository.

    Attributes:
        files: The files by their paths there.
        left_out: What of the directory is not published, and why.
        hints: What the card does not say.
    """

    files: dict[str, Path]
    left_out: dict[str, str]
    hints: list[str] = field(default_factory=list)

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of the files in bytes."""
        return {name: path.stat().st_size for name, path in self.files.items()}

    @property
    def card(self) -> str:
        """The text of the model card."""
        return self.files["README.md"].read_text(encoding="utf-8")


@contextmanager
def prepare(
    checkpoint: Path,
    repository: str,
    origin: Origin,
    include: Sequence[str] = (),
    include_evaluation: bool = False,
) -> Iterator[Publication]:
    """Checks a checkpoint, and yields what is to be published of it.

    Files stay where they are, but for those that are made or changed: code, card, and whatever names a path.

    Args:
        checkpoint: Its directory.
        repository: Where it is published to.
        origin: What no file says.
        include: As for `list_files`.
        include_evaluation: As for `list_files`.

    Raises:
        PublishError: If the checkpoint is incomplete, or lacks a license, or must not be published.
    """
    if not checkpoint.is_dir():
        raise PublishError(f"{checkpoint} is not a directory; publish takes the directory of a checkpoint.")
    check_origin(origin)
    adapter = read_adapter(checkpoint) if is_adapter(checkpoint) else None
    config = None if adapter else read_config(checkpoint)
    found = list_files(checkpoint, include, include_evaluation)
    files = found.published
    _check_files(checkpoint, found)
    facts = read_facts(checkpoint, files, config, adapter)
    has_processor = facts.is_whole or bool(set(_PROCESSOR) & set(files))
    if has_processor and (missing := sorted(set(_PROCESSOR) - set(files))):
        raise PublishError(f"{checkpoint} has no {missing[0]}: save the processor there, too.")
    data, text = read_card(checkpoint)
    local_base = adapter.base if adapter and adapter.base and _is_here(adapter.base) else None
    text, paths = remove_paths(data, text, local_base)
    if adapter is not None:
        base = _find_base(checkpoint, adapter, data, origin)
        config = _read_base_config(Path(local_base)) if local_base else None
        origin = replace(origin, base_models=[base])
    is_inherited = check_licenses(checkpoint, files, config, origin.license or data.license)
    origin = replace(origin, inherited_license=find_license(files) if is_inherited else None)
    with temporary_folder(_PREFIX) as staged:
        _stage(checkpoint, staged, sorted(set(files) - set(found.included)))
        if adapter is not None:
            _change(staged / ADAPTER_CONFIG, base_model_name_or_path=base)
        _add_code(staged)
        if facts.is_whole:
            link_pixel_decoders(staged)
        (staged / "README.md").write_text(write_card(data, text, facts, repository, origin), encoding="utf-8")
        content = {file: checkpoint / file for file in files}
        content |= {path.relative_to(staged).as_posix(): path for path in staged.rglob("*") if path.is_file()}
        _check_code(staged, set(content))
        yield Publication(dict(sorted(content.items())), found.left_out, _hints(data, paths))


def _check_files(root: Path, found: FileList) -> None:
    """Makes sure that what a checkpoint consists of is there, may be published and can be read."""
    for name, reason in found.refused.items():
        raise PublishError(f"{root / name} is part of the checkpoint, but {reason}. Replace or remove it.")
    check_weights(root, found.published)
    for folder in DECODER_FOLDERS:
        if f"{folder}{MODEL_INDEX}" in found.published:
            for part in read_parts(root / folder / MODEL_INDEX)[0]:
                if not any(file.startswith(f"{folder}{part}/") for file in found.published):
                    raise PublishError(f"{root / folder / MODEL_INDEX} names {part}, but {folder}{part} is not there.")
                if not any(f"{folder}{part}/{name}" in found.published for name in CONFIGURATIONS):
                    raise PublishError(f"{root / folder / part} has no configuration: save the pixel decoder again.")


def _find_base(root: Path, adapter: Adapter, data: ModelCardData, origin: Origin) -> str:
    """What others load an adapter on top of."""
    if origin.base_models:
        return origin.base_models[0]
    for base in (data.base_model, adapter.base):
        if isinstance(base, str) and is_hub_name(base) and not _is_here(base):
            return base
    raise PublishError(
        f"{root / ADAPTER_CONFIG} names no model on the Hub that others could load the adapter on top of: publish the "
        "base first, and name it (--base-model user/name)."
    )


def _is_here(name: str) -> bool:
    return is_path(name) or Path(name).exists()


def _read_base_config(base: Path) -> Any:
    return read_config(base) if (base / "config.json").is_file() else None


def _stage(root: Path, staged: Path, files: list[str]) -> None:
    """Copies the configurations and what was measured, without the paths that these name."""
    for file in files:
        if file.endswith(".json") and not is_index(file) and not file.startswith("original/"):
            content = read_object(root / file)
            if Path(file).name in ("metrics.json", "settings.json"):
                content = without_paths(content)
            for name in _NAMES:
                if isinstance(content.get(name), str) and is_path(content[name]):
                    del content[name]
            (staged / file).parent.mkdir(parents=True, exist_ok=True)
            if content == read_object(root / file):
                (staged / file).write_bytes((root / file).read_bytes())
            else:
                write_json(staged / file, content)


def _change(path: Path, **values: Any) -> None:
    write_json(path, {**read_object(path), **values})


def _add_code(staged: Path) -> None:
    path = staged / "processor_config.json"
    if path.is_file() and not isinstance(read_object(path).get("image_processor", {}), (dict, type(None))):
        raise PublishError(f"{path.name}: image_processor is no object.")
    save_remote_code(staged)
    for folder in DECODER_FOLDERS:
        index = staged / folder / MODEL_INDEX
        if index.is_file() and PIPELINE_MODULE in read_parts(index)[1]:
            write_code(staged / folder)


def _check_code(staged: Path, files: set[str]) -> None:
    for module in mapped_modules(staged):
        if f"{module}.py" not in files:
            raise PublishError(f"The configurations name code in {module}.py (auto_map), which is not there.")


def _hints(data: ModelCardData, paths: list[str]) -> list[str]:
    options = {"license": "--license", "base_model": "--base-model", "datasets": "--dataset"}
    hints = [f"The card names no {name} ({option})." for name, option in options.items() if not getattr(data, name)]
    return [*hints, *(f"Left out of the card: {path}, a path of this machine." for path in paths)]
