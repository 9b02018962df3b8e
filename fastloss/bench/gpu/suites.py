"""The stages that ask whether the kernels are right on this device: a look at every function, the device's own tests, the parity tests."""

import importlib.util
import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fastloss

from ... import contract, self_checks
from .stage import Day

CHECKOUT = Path(__file__).resolve().parents[3]
DEVICE_TESTS = tuple(f"tests/cuda/test_cuda_{name}.py" for name in ("device", "foresight", "linear", "token_statistics_compiled"))
_WORKERS = 14


def smoke(day: Day) -> None:
    """Every function in two dtypes through the public API, against float64; and which launchers that took: torch would be right, too."""
    launched: list[str] = []

    def noting(name: str, launcher: Any, arguments: Sequence[Any], places: Sequence[contract.Place]) -> None:
        launched.append(name)
        launcher(*arguments)

    before, contract.watch = contract.watch, noting
    backend = fastloss.backends.backend_of(day.device)
    assert backend is not None
    with fastloss.use_backend(backend):  # as is, so few logits would go to torch
        found = self_checks.errors(day.device)
    contract.watch = before
    lines = [{"call": call, "error": error, "allowed": limit, "right": error <= limit} for call, error, limit in found]
    day.save(smoke=lines, smoke_launchers=sorted(set(launched)))


def device_tests(day: Day) -> None:
    """Every launcher in four dtypes, more than 2^31 logits, streams, graphs. In a rehearsal there is no device: all of them are skipped."""
    _pytest(day, "device_tests", "-m", "gpu", *DEVICE_TESTS[: 1 if day.tiny else None])


def parity(day: Day) -> None:
    """The tests against torch, on tensors of this device. Not where the look at every function found it wrong: they would all fail."""
    wrong = [one["call"] for one in day.before.get("smoke", ()) if not one["right"]]
    if wrong:
        day.save(parity={"passed": 0, "failed": {}, "left_out": f"wrong at first sight: {', '.join(wrong)}"})
    elif day.tiny:
        _pytest(day, "parity", "--device", day.device, "tests/test_inplace.py", "-k", "refused_where")
    else:
        _pytest(day, "parity", "-m", "not long", "--device", day.device, "tests")


class _Recorder:
    """Counts outcomes as they come, so that tests that are cut off have said something."""

    def __init__(self, day: Day, name: str) -> None:
        self.day, self.name, self.saved = day, name, 0.0
        self.passed, self.skipped = 0, 0
        self.failed: Counter[str] = Counter()
        self.first: dict[str, str] = {}  # what the first failure of a test said

    def pytest_runtest_logreport(self, report: Any) -> None:
        test = report.nodeid.partition("[")[0]
        if report.failed:
            self.failed[test] += 1
            self.first.setdefault(test, f"{report.nodeid}: {str(report.longrepr).strip().splitlines()[-1:]}"[:400])
        elif report.skipped:
            self.skipped += 1
        elif report.when == "call":
            self.passed += 1
        if time.monotonic() - self.saved > 1:
            self.save()

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.failed[f"collecting {report.nodeid}"] += 1
            self.first.setdefault(f"collecting {report.nodeid}", str(report.longrepr)[-400:])

    def save(self, **more: Any) -> None:
        self.saved = time.monotonic()
        found = {"passed": self.passed, "skipped": self.skipped, "failed": dict(self.failed), "first": self.first, **more}
        self.day.save(**{self.name: found})


def _pytest(day: Day, name: str, *what: str) -> None:
    """Run tests side by side where pytest-xdist is, each with a time limit where pytest-timeout is; needs neither."""
    import pytest

    os.chdir(CHECKOUT)
    options = [
        "-o",
        "addopts=-q --strict-markers",
        "--maxfail",
        "300",
        "-p",
        "no:cacheprovider",
        "--junitxml",
        str(day.out / f"{name}.xml"),
    ]
    if not day.tiny and importlib.util.find_spec("xdist"):
        options += ["-n", str(min(_WORKERS, os.cpu_count() or 1))]
    if not day.tiny and importlib.util.find_spec("pytest_timeout"):
        options += ["--timeout", "60"]
    recorder = _Recorder(day, name)
    status = pytest.main([*options, *what], plugins=[recorder])
    recorder.save(exit_status=int(status), whole=status in (0, 1, 5))
