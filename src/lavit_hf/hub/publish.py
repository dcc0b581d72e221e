"""Publishing on the Hugging Face Hub: what a repository will hold, checked and put together, and its upload."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi, ModelCardData
from huggingface_hub.errors import HfHubHTTPError
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from ..conversion.model_card import LICENSE
from ..pipelines.pixel_decoder_files import DECODER_FOLDERS, MODEL_INDEX, link_pixel_decoders, read_parts
from ..remote_code import names_our_pipeline, save_remote_code, write_code
from ..training.assembly import PROCESSOR_FILES
from ..utils.atomic_files import temporary_folder, write_json
from ..utils.public_text import is_path, without_paths
from .card import Origin, check_origin, is_hub_name, read_card, remove_paths, write_card
from .facts import AdapterFacts, is_adapter, read_adapter, read_checkpoint, read_config
from .files import (
    CONFIGURATIONS,
    FileList,
    PublishError,
    check_licenses,
    check_weights,
    find_notices,
    is_index,
    is_weights,
    list_files,
    mapped_modules,
    read_object,
)
from .uploads import UPLOAD_ERRORS, create_commit, describe_error

_PREFIX = "lavit-publish-"
# Where libraries note what they loaded something from, which may be a directory of this machine.
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

    Files stay where they are, but for those that are made or changed: code, card, and files that name a path.

    Args:
        checkpoint: Its directory.
        repository: Where it is published to.
        origin: What no file says.
        include: As for `publish`.
        include_evaluation: As for `publish`.

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
    facts = read_checkpoint(checkpoint, files, config, adapter)
    has_processor = facts.is_whole or bool(set(PROCESSOR_FILES) & set(files))
    if has_processor and (missing := sorted(set(PROCESSOR_FILES) - set(files))):
        raise PublishError(f"{checkpoint} has no {missing[0]}: save the processor there, too.")
    data, text = read_card(checkpoint)
    local_base = adapter.base if adapter and adapter.base and _is_here(adapter.base) else None
    text, paths = remove_paths(data, text, local_base)
    if adapter is not None:
        base = _find_base(checkpoint, adapter, data, origin)
        config = read_config(Path(local_base)) if local_base and Path(local_base, "config.json").is_file() else None
        origin = replace(origin, base_models=[base])
    is_inherited = check_licenses(checkpoint, files, config, origin.license or data.license)
    licenses = [file for file in find_notices(files) if LICENSE.search(file)]
    origin = replace(origin, inherited_license=licenses[0] if is_inherited and licenses else None)
    with temporary_folder(_PREFIX) as staged:
        _stage(checkpoint, staged, sorted(set(files) - set(found.included)))
        if adapter is not None:
            path = staged / ADAPTER_CONFIG_NAME
            write_json(path, {**read_object(path), "base_model_name_or_path": base})
        if facts.is_whole:
            link_pixel_decoders(staged)
        _add_code(staged)
        (staged / "README.md").write_text(write_card(data, text, facts, repository, origin), encoding="utf-8")
        content = {file: checkpoint / file for file in files}
        content |= {path.relative_to(staged).as_posix(): path for path in staged.rglob("*") if path.is_file()}
        for module in mapped_modules(staged):
            if f"{module}.py" not in content:
                raise PublishError(f"The configurations name code in {module}.py (auto_map), which is not there.")
        yield Publication(dict(sorted(content.items())), found.left_out, _hints(data, paths))


def _check_files(root: Path, found: FileList) -> None:
    """Makes sure that what a checkpoint consists of is there, may be published and can be read."""
    for name, reason in found.refused.items():
        raise PublishError(f"{root / name} is part of the checkpoint, but {reason}. Replace or remove it.")
    check_weights(root, found.published)
    for folder in DECODER_FOLDERS:
        if f"{folder}{MODEL_INDEX}" in found.published:
            for part in read_parts(root / folder / MODEL_INDEX, PublishError)[0]:
                if not any(file.startswith(f"{folder}{part}/") for file in found.published):
                    raise PublishError(f"{root / folder / MODEL_INDEX} names {part}, but {folder}{part} is not there.")
                if not any(f"{folder}{part}/{name}" in found.published for name in CONFIGURATIONS):
                    raise PublishError(f"{root / folder / part} has no configuration: save the pixel decoder again.")


def _find_base(root: Path, adapter: AdapterFacts, data: ModelCardData, origin: Origin) -> str:
    """What others load an adapter on top of."""
    if origin.base_models:
        return origin.base_models[0]
    for base in (data.base_model, adapter.base):
        if isinstance(base, str) and is_hub_name(base) and not _is_here(base):
            return base
    raise PublishError(
        f"{root / ADAPTER_CONFIG_NAME} names no model on the Hub that others could load the adapter on top of: "
        "publish the base first, and name it (--base-model user/name)."
    )


def _is_here(name: str) -> bool:
    return is_path(name) or Path(name).exists()


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


def _add_code(staged: Path) -> None:
    path = staged / "processor_config.json"
    if path.is_file() and not isinstance(read_object(path).get("image_processor", {}), (dict, type(None))):
        raise PublishError(f"{path.name}: image_processor is no object.")
    save_remote_code(staged)
    for folder in DECODER_FOLDERS:
        if names_our_pipeline(staged / folder):
            write_code(staged / folder)


def _hints(data: ModelCardData, paths: list[str]) -> list[str]:
    options = {"license": "--license", "base_model": "--base-model", "datasets": "--dataset"}
    hints = [f"The card names no {name} ({option})." for name, option in options.items() if not getattr(data, name)]
    return [*hints, *(f"Left out of the card: {path}, a path of this machine." for path in paths)]


# The upload.


@dataclass(frozen=True)
class PublishReport:
    """What was published, or would be.

    Attributes:
        repository: Name of the repository.
        sizes: Sizes of its files in bytes.
        removed: Weights of an earlier version that were removed.
        left_out: Files of the directory that are not published, and why.
        hints: What the card does not say.
        url: Where it is; `None` if nothing was uploaded.
        commit: The commit that holds all of it.
        card: The text of the model card.
    """

    repository: str
    sizes: dict[str, int]
    removed: list[str]
    left_out: dict[str, str]
    hints: list[str]
    url: str | None = None
    commit: str | None = None
    card: str = ""


def publish(
    checkpoint: str | os.PathLike[str],
    repository: str,
    *,
    private: bool | None = None,
    dry_run: bool = False,
    license: str | None = None,
    base_models: Sequence[str] = (),
    datasets: Sequence[str] = (),
    include: Sequence[str] = (),
    include_evaluation: bool = False,
    revision: str | None = None,
    commit_message: str = "Upload LaVIT",
    token: str | bool | None = None,
) -> PublishReport:
    """Publishes a checkpoint with everything that is needed to use it.

    The repository gets all of it in one commit or nothing. What was uploaded by an interrupted run is not uploaded
    again. Files of the repository that the checkpoint does not have stay, but for weights.

    Args:
        checkpoint: Directory of a LaVIT, of a visual tokenizer or of an adapter of PEFT.
        repository: Name of the repository, `user/name`; created if needed.
        private: Whether a new repository is private; by default what is usual for its owner. `True` refuses one that
            is public already.
        dry_run: Only says what would be published; asks nothing of the Hub.
        license: License of the weights, as the Hub names it; by default what the card says.
        base_models: Models that the weights were made of; by default what the card says.
        datasets: Datasets that they were trained on; by default what the card says.
        include: Patterns of other files of the directory to publish, such as `"docs/*.md"`, matched as by `hf upload
            --include`. By default only what a checkpoint consists of is published. Never published are pickles, keys
            and tokens, hidden files, and links that lead out of the directory.
        include_evaluation: Whether to publish what `lavit evaluate` wrote of single samples, too: predictions,
            pages and pictures.
        revision: Branch to publish to; created if needed.
        commit_message: First line of the commit.
        token: Token of the Hub; by default the stored one.

    Returns:
        What was published.

    Raises:
        PublishError: If the checkpoint is incomplete or lacks a license, if `include` asks for what is never
            published, or if the Hub refuses it or does not answer.
    """
    if not is_hub_name(repository) or repository.count("/") != 1:
        raise PublishError(f"{repository} is not the name of a repository: it looks like user/name.")
    origin = Origin(license, list(base_models), list(datasets))
    with prepare(Path(checkpoint), repository, origin, include, include_evaluation) as publication:
        report = PublishReport(
            repository, publication.sizes, [], publication.left_out, publication.hints, card=publication.card
        )
        if dry_run:
            return report
        try:
            return _upload(publication, report, HfApi(token=token), private, revision, commit_message)
        except UPLOAD_ERRORS as error:
            if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
                reason = f"The Hub does not let you write to {repository}: log in with `hf auth login`. ({error})"
            else:
                why = describe_error(error)
                reason = f"{repository} was not changed: {why} The same command goes on with what is missing."
            raise PublishError(reason) from error


def _upload(
    publication: Publication,
    report: PublishReport,
    api: HfApi,
    private: bool | None,
    revision: str | None,
    message: str,
) -> PublishReport:
    api.create_repo(report.repository, private=private, exist_ok=True)
    if private and not api.model_info(report.repository).private:
        raise PublishError(f"{report.repository} exists and is public; make it private in its settings first.")
    if revision is not None:
        api.create_branch(report.repository, branch=revision, exist_ok=True)
    stored = api.list_repo_files(report.repository, revision=revision)
    removed = sorted(file for file in set(stored) - publication.files.keys() if is_weights(file))
    operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
        *(CommitOperationAdd(name, path) for name, path in publication.files.items()),
        *(CommitOperationDelete(name) for name in removed),
    ]
    name = report.repository
    commit = create_commit(api, name, operations, name, commit_message=message, revision=revision)
    url = f"{api.endpoint}/{report.repository}"
    return replace(report, removed=removed, url=url, commit=commit.oid)
