"""`lavit publish`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ..hub import PublishReport, publish
from ..utils.atomic_files import readable_size


def run(checkpoint: Path, repository: str, *, dry_run: bool, card: bool, **options: Any) -> None:
    """Publishes a checkpoint, or shows what would be published."""
    if card and not dry_run:
        raise ValueError("--card shows the card that would be published; it goes with --dry-run.")
    report = publish(checkpoint, repository, dry_run=dry_run, **options)
    total = f"{len(report.sizes)} files, {readable_size(sum(report.sizes.values()))}"
    if card:
        print(report.card, end="")
    elif dry_run:
        _list_files(report)
        print(f"Would publish {repository}: {total}")
    else:
        print(f"Published {report.url} ({total}, commit {report.commit})")
    for name in report.removed:
        print(f"Removed {name}, which this version does not have")
    for hint in report.hints:
        print(hint, file=sys.stderr)


def _list_files(report: PublishReport) -> None:
    for name, size in report.sizes.items():
        print(f"{readable_size(size):>11}  {name}")
    for name, reason in _group(report).items():
        print(f"{'left out':>11}  {name}: {reason}")


def _group(report: PublishReport) -> dict[str, str]:
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
