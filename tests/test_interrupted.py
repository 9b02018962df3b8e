"""Numba and the kernels are imported at the first call that wants them. What if that is interrupted, or cannot be."""

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numba
import pytest
import torch

from fastloss import backends
from fastloss.kernels.cpu import cache, launch, reduction


def run(code: str, **environment: str) -> None:
    command = [sys.executable, "-P", "-c", code] if sys.version_info >= (3, 11) else [sys.executable, "-c", code]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_imports_after_interrupted_ones() -> None:
    run("""
import importlib, sys
import fastloss, torch
fastloss.config.min_numel = 0

class Interrupt:
    "Ctrl-C at the k-th import, or at that of a module"
    def __init__(self, when):
        self.when, self.k = when, 0
    def find_spec(self, name, path=None, target=None):
        self.k += 1
        if self.when in (self.k, name):
            raise KeyboardInterrupt

x = torch.randn(5, 3)
interrupted = 0
for when in (1, 2, 10, 40, 90, 150, "numba.experimental", "fastloss.kernels.cpu.softmax"):
    sys.meta_path.insert(0, Interrupt(when))
    try:
        fastloss.backends.unavailable("numba") or fastloss.backends.kernels("numba")
    except KeyboardInterrupt:
        interrupted += 1
    finally:
        del sys.meta_path[0]
assert interrupted == 8
assert fastloss.explain(fastloss.nll_loss, x, torch.tensor([0, 1, 2, 0, 1])).backend == "numba"
values, total = torch.randn(100), torch.zeros(1)
fastloss.backends.kernels("numba").sum_rows(values, total)
torch.testing.assert_close(total[0], values.sum())
import llvmlite.binding, numba
numba.core.config, numba.typed.List, llvmlite.binding.get_host_cpu_name()
""")


def test_an_interrupted_compilation_is_finished_first(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(cache._Function):
        def compile(self) -> None:
            signal.raise_signal(signal.SIGINT)
            super().compile()

    monkeypatch.setattr(cache, "_Function", Interrupted)
    handler = signal.default_int_handler
    before = signal.signal(signal.SIGINT, handler)  # a process started in the background of a shell ignores Ctrl-C
    region = launch.Region(reduction._sum.body, reduction.Sum)
    try:
        with pytest.raises(KeyboardInterrupt):
            region.compile(torch.float32)
        assert (torch.float32,) in region._compiled
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_numba_that_does_not_compile() -> None:
    run(
        """
import fastloss, torch
x = torch.randn(4096, 128)
route = fastloss.explain(fastloss.softmax, x, 1)
assert route.backend == "torch" and "NUMBA_DISABLE_JIT" in route.reason, route
torch.testing.assert_close(fastloss.softmax(x, 1), x.softmax(1))
try:
    fastloss.set_backend("numba")
except fastloss.backends.BackendError as error:
    assert "NUMBA_DISABLE_JIT" in str(error)
else:
    raise AssertionError
""",
        NUMBA_DISABLE_JIT="1",
    )


def test_numba_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    original: Callable[..., Any] = importlib.import_module

    def refuse(name: str, *args: Any) -> Any:
        if name == "numba":
            raise ImportError("Numba needs NumPy 2.5 or less")
        return original(name, *args)

    monkeypatch.setattr(importlib, "import_module", refuse)
    assert backends._problem.__wrapped__("numba") == "numba cannot be imported: Numba needs NumPy 2.5 or less"
    assert sys.modules["numba"] is numba
