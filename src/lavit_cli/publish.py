"""`lavit publish`: publishes a checkpoint on the Hugging Face Hub."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .checks import check_source, find_checkpoint

if TYPE_CHECKING:
    from lavit_hf.hub import PublishReport


def publish(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="Directory to publish.", show_default=False)
    ],
    repository: Annotated[str, typer.Argument(metavar="USER/NAME", help="Repository on the Hub.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list what would be published, and what not and why.")
    ] = False,
    card: Annotated[bool, typer.Option("--card", help="With --dry-run: show the model card instead.")] = False,
    include: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Other files to publish, such as 'docs/*'; may be given several times."),
    ] = None,
    include_evaluation: Annotated[
        bool,
        typer.Option("--include-evaluation", help="Also publish predictions, pages and pictures of lavit evaluate."),
    ] = False,
    license: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="License as the Hub names it, such as apache-2.0.", show_default="as the card says"
        ),
    ] = None,
    base_model: Annotated[
        list[str] | None,
        typer.Option(metavar="USER/NAME", help="Model the weights were made of; may be given several times."),
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(metavar="USER/NAME", help="Dataset they were trained on; may be given several times."),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="Branch to publish to.", show_default="main")
    ] = None,
    space: Annotated[
        str | None,
        typer.Option(
            metavar="USER/NAME", help="Also publish the page of lavit demo --web for it, as this Space; needs main."
        ),
    ] = None,
) -> None:
    """Publish a checkpoint on the Hugging Face Hub.

    Everything in one commit: weights, processor, pixel decoders, the code that loads them where lavit-hf is not
    installed, and a model card. Other files of the directory are left out unless --include names them; pickles, keys
    and tokens always are. Of an interrupted run, the same command uploads the rest.

    \b
    Examples:
      lavit publish lavit-7b-v2 me/lavit-7b --dry-run
      lavit publish lavit-7b-v2 me/lavit-7b --private --base-model rain1011/LaVIT-7B-v2
      lavit publish out/my-lavit me/my-lavit --space me/try-my-lavit
      lavit publish out/my-lavit me/my-lavit --license apache-2.0 --dataset me/pictures
    """
    if card and not dry_run:
        raise ValueError("--card shows the card that would be published; it goes with --dry-run.")
    if space and revision not in (None, "main"):
        raise ValueError(
            f"The page of a Space loads the branch main, so --space cannot be given with --revision {revision}: "
            "publish to main, or leave --space out."
        )
    source = Path(find_checkpoint(str(checkpoint)))
    check_source(source, "CHECKPOINT")

    from lavit_hf import hub
    from lavit_hf.utils.atomic_files import readable_size

    visibility = True if private else None  # by default as is usual for the owner
    page = hub.publish_space(space, repository, source, private=visibility, dry_run=True) if space else None
    report = hub.publish(
        source,
        repository,
        private=visibility,
        dry_run=dry_run,
        include=include or [],
        include_evaluation=include_evaluation,
        license=license,
        base_models=base_model or [],
        datasets=dataset or [],
        revision=revision,
    )
    total = f"{len(report.sizes)} files, {readable_size(sum(report.sizes.values()))}"
    if card:
        print(report.card, end="")
    elif dry_run:
        for name, size in report.sizes.items():
            print(f"{readable_size(size):>11}  {name}")
        for name, reason in _group_left_out(report).items():
            print(f"{'left out':>11}  {name}: {reason}")
        print(f"Would publish {repository}: {total}")
    else:
        print(f"Published {report.url} ({total}, commit {report.commit})")
    for name in report.removed:
        print(f"Removed {name}, which this version does not have")
    hints = report.hints
    if space and page:
        if not dry_run:
            page = hub.publish_space(space, repository, source, private=visibility)
        amount = f"{len(page.sizes)} files, {readable_size(sum(page.sizes.values()))}"
        print(f"Would publish the Space {space}: {amount}" if dry_run else f"Published {page.url} ({amount})")
        hints = [*hints, *page.hints]
    for hint in hints:
        print(hint, file=sys.stderr)


def _group_left_out(report: PublishReport) -> dict[str, str]:
    """What is left out, with folders of which nothing is published as one entry, such as thousands of pictures."""
    kept = {name.partition("/")[0] for name in report.sizes}
    reasons: dict[str, list[str]] = {}
    for name, reason in report.left_out.items():
        top, _, rest = name.partition("/")
        reasons.setdefault(f"{top}/" if rest and top not in kept else name, []).append(reason)
    entries = {}
    for name, found in reasons.items():
        count = f" ({len(found)} files)" if len(found) > 1 else ""
        entries[f"{name}{count}"] = "; ".join(dict.fromkeys(found))
    return entries
