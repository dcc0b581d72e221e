"""Counts outcomes per class, and finds what `expectations.py` does not explain."""

import re
from collections import Counter, defaultdict

import pytest

from conformance.expectations import EXPECTED_FAILURES, SKIPPED

# A test with subtests has several; the first of these that occurs counts.
_KINDS = ("failed", "expected failure", "skipped", "passed")


class Outcomes:
    """A plugin of pytest. It works in the process that collects the reports of all workers."""

    def __init__(self) -> None:
        self.kinds: dict[str, set[str]] = defaultdict(set)
        self.problems: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        kind = _kind(report)
        if report.when == "call" or kind != "passed":
            self.kinds[report.nodeid].add(kind)
        if kind == "skipped" and "/peers/" not in report.nodeid:
            reason = report.longrepr[2].removeprefix("Skipped: ")
            if not any(re.search(pattern, reason) for pattern in SKIPPED):
                self.problems.append(f"{report.nodeid} was skipped, which nothing explains: {reason}")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        for nodeid, kinds in self.kinds.items():
            if _key(nodeid) in EXPECTED_FAILURES and "expected failure" not in kinds:
                self.problems.append(f"{nodeid} was expected to fail, but did not.")
        if self.problems and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        rows: dict[str, Counter[str]] = defaultdict(Counter)
        for nodeid, kinds in self.kinds.items():
            rows[_key(nodeid)[0]][next(kind for kind in _KINDS if kind in kinds)] += 1
        terminalreporter.section("outcomes per class")
        terminalreporter.line("| Class | Passed | Failed | Expected failures | Skipped |\n|---|--:|--:|--:|--:|")
        for name, counts in rows.items():
            numbers = (counts[kind] for kind in ("passed", "failed", "expected failure", "skipped"))
            terminalreporter.line(f"| {name} | {' | '.join(map(str, numbers))} |")
        for problem in self.problems:
            terminalreporter.line(problem, red=True)


def _kind(report: pytest.TestReport) -> str:
    if hasattr(report, "wasxfail"):
        return "expected failure" if report.skipped else "passed"
    return report.outcome


def _key(nodeid: str) -> tuple[str, str]:
    """Class and test."""
    _, name, test = nodeid.split("::")
    return name, test
