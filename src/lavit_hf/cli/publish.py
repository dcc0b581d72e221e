"""`lavit publish`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ..files.complete import readable_size
from ..hub import PublishReport, publish


def run(checkpoint: Path, repository: str, *, dry_run: bool, **options: Any) -> None:
    """Publishes a checkpoint, or lists what would be published."""
    report = publish(checkpoint, repository, dry_run=dry_run, **options)
    total = f"{len(report.sizes)} files, {readable_size(sum(report.sizes.values()))}"
    if dry_run:
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
    for name in report.left_out:
        print(f"{'left out':>11}  {name}")
