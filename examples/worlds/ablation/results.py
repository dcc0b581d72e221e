"""Numbers of variants that are finished, in a file, and as tables."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TABLES = TOKENIZERS, CAPTIONS, PATCHES, GUIDANCE = "tokenizers", "captions", "patches", "guidance"


class Results:
    """What was measured, by table and variant.

    Args:
        path: The file. What is in it is not measured again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tables: dict[str, dict[str, dict[str, Any]]] = {table: {} for table in TABLES}
        if path.exists():
            self.tables.update(json.loads(path.read_text(encoding="utf-8")))

    def add(self, table: str, variant: str, measure: Callable[..., dict[str, Any]], *arguments: Any) -> None:
        """Measures a variant unless that is done, and writes the file."""
        if variant in self.tables[table]:
            return
        start = time.monotonic()
        values = measure(*arguments)
        self.tables[table][variant] = values | {"seconds": round(time.monotonic() - start)}
        partial = self.path.with_suffix(".partial")  # a run that is killed leaves the last results whole
        partial.write_text(json.dumps(self.tables, indent=2) + "\n", encoding="utf-8")
        partial.replace(self.path)
        print(f"{table}: {variant}: {self.tables[table][variant]}", flush=True)

    def to_markdown(self) -> str:
        """All tables that have rows."""
        lines = []
        if self.tables[TOKENIZERS]:
            lines = ["| Kept patches | Tokens | Cosine | Patches of objects read right |", "|---|--:|--:|--:|"]
        for name, row in self.tables[TOKENIZERS].items():
            share = f"{100 * row['patches_right']:.1f} %"
            lines.append(f"| {name} | {row['tokens']:.1f} | {row['cosine']:.3f} | {share} |")
        for table, title in ((CAPTIONS, "Captions from"), (PATCHES, "Patches"), (GUIDANCE, "Guidance")):
            lines += _shares_to_markdown(title, self.tables[table])
        return "\n".join(lines).lstrip() + "\n" + self._budgets_to_markdown()

    def _budgets_to_markdown(self) -> str:
        """What is left of a picture at every budget, of the variants that were measured so."""
        text = ""
        for table, title in ((TOKENIZERS, "Patches of objects read right"), (CAPTIONS, "Captions fully right")):
            rows = {name: row["budgets"] for name, row in self.tables[table].items() if row.get("budgets")}
            if not rows:
                continue
            budgets = list(next(iter(rows.values())))
            text += f"\n| {title}, by tokens | {' | '.join(budgets)} |\n|---|{'--:|' * len(budgets)}\n"
            for name, row in rows.items():
                if table == TOKENIZERS:
                    cells = [f"{100 * row[budget]['patches_right']:.1f} %" for budget in budgets]
                else:
                    cells = [_share(row[budget]["fully_right"]) for budget in budgets]
                text += f"| {name} | {' | '.join(cells)} |\n"
        return text


def _shares_to_markdown(title: str, rows: dict[str, dict[str, Any]]) -> list[str]:
    """A table of everything of which a share was measured, the whole first."""
    measured = [name for name, value in next(iter(rows.values()), {}).items() if _as_dict(value).get("interval")]
    if not measured:
        return []
    heads = [name.replace("_", " ") for name in measured]
    lines = ["", f"| {title} | {' | '.join(heads)} |", f"|---|{'--:|' * len(heads)}"]
    return lines + [f"| {name} | {' | '.join(_share(row[one]) for one in measured)} |" for name, row in rows.items()]


def _as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _share(measured: dict[str, Any]) -> str:
    low, high = (round(100 * end) for end in measured["interval"])
    return f"{100 * measured['value']:.0f} % ({low} to {high})"
