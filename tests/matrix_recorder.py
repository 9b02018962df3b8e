"""Runs pytest and writes down what happens as it happens, so that an abort is seen: matrix_recorder.py FILE [pytest arguments]."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any


class Recorder:
    """A pytest plugin: a line of JSON when a test starts and when it is over."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("w", buffering=1)

    def say(self, **what: Any) -> None:
        self.file.write(json.dumps(what) + "\n")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.say(start=nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or not report.passed:
            self.say(end=report.nodeid, outcome=report.outcome, why=_why(report))

    def pytest_collectreport(self, report: Any) -> None:
        if not report.passed:
            self.say(end=report.nodeid, outcome=report.outcome, why=_why(report))


def _why(report: Any) -> str:
    if report.passed:
        return ""
    if isinstance(report.longrepr, tuple):  # of a skipped test: file, line, reason
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash else str(report.longrepr)).strip()[:300]


def summary(path: Path, end: str) -> dict[str, Any]:
    """Counts, what failed and why, why tests were skipped. `end`: how the process ended if not by itself: a failure of what was running."""
    passed: dict[str, str] = {}
    failed: dict[str, str] = {}
    skipped: dict[str, str] = {}
    running = ""
    for line in path.read_text().splitlines() if path.exists() else []:
        said = json.loads(line)
        running = said.get("start", "")
        if "end" in said:
            {"passed": passed, "failed": failed, "skipped": skipped}[said["outcome"]][said["end"]] = said["why"]
    if end:
        failed[running or path.stem] = end
    return {
        "passed": len(passed.keys() - failed.keys()),  # a test can pass and its teardown fail
        "failed": len(failed),
        "skipped": len(skipped),
        "failures": failed,
        "skips": dict(Counter(skipped.values()).most_common()),
    }


if __name__ == "__main__":
    import pytest

    sys.path.pop(0)  # this file's folder: another checkout may be the one that is tested
    sys.exit(pytest.main(sys.argv[2:], plugins=[Recorder(Path(sys.argv[1]))]))
