"""Publishing of a checkpoint on the Hugging Face Hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from .card import Origin
from .checks import WEIGHTS
from .errors import PublishError
from .publication import Publication, prepare

_OF_WEIGHTS = (WEIGHTS, f"{WEIGHTS}.index.json")


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
            published, or if the Hub refuses it.
    """
    _check_name(repository)
    origin = Origin(license, list(base_models), list(datasets))
    with prepare(Path(checkpoint), repository, origin, include, include_evaluation) as publication:
        report = PublishReport(
            repository, publication.sizes, [], publication.left_out, publication.hints, card=publication.card
        )
        if dry_run:
            return report
        try:
            return _upload(publication, report, HfApi(token=token), private, revision, commit_message)
        except (HfHubHTTPError, RuntimeError, ConnectionError) as error:  # the second: a file could not be uploaded
            raise PublishError(_reason(repository, error)) from error


def _check_name(repository: str) -> None:
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise PublishError(str(error)) from error
    if repository.count("/") != 1:
        raise PublishError(f"{repository} is not the name of a repository: it looks like user/name.")


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
    removed = sorted(file for file in set(stored) - publication.files.keys() if file.endswith(_OF_WEIGHTS))
    operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
        *(CommitOperationAdd(name, path) for name, path in publication.files.items()),
        *(CommitOperationDelete(name) for name in removed),
    ]
    commit = api.create_commit(report.repository, operations, commit_message=message, revision=revision)
    url = f"{api.endpoint}/{report.repository}"
    return replace(report, removed=removed, url=url, commit=commit.oid)


def _reason(repository: str, error: Exception) -> str:
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return f"The Hub does not let you write to {repository}: log in with `hf auth login`. ({error})"
    return f"{repository} was not changed: {error} The same command goes on with what is missing."
