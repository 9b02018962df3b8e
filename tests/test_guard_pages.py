"""Every tensor of a call against pages that may not be touched: no read or write outside of it, no wrong number, in any layout.

The calls are made in child processes: one element too far is a SIGSEGV, which is a finding and not the end of pytest.
"""

import contextlib
import ctypes
import faulthandler
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import guard_pages
import pytest
import torch
from guarded import guarded, read_only

from fastloss import contract
from fastloss.kernels.cpu.launch import Region

PROGRAM = Path(__file__).with_name("guard_pages.py")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mprotect by ctypes")


def fuzz(first: int, cases: int) -> None:
    """Run the cases; after a crash, go on behind the one that crashed. Fail with the first five findings, crashes before wrong numbers."""
    seed, served, crashes, failures = first, 0, [], []
    while seed < first + cases and len(crashes) < 5:
        command = [sys.executable, str(PROGRAM), "--seed", str(seed), "--cases", str(first + cases - seed)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        begun = [line for line in run.stdout.splitlines() if line.startswith("seed ")]
        assert begun, run.stdout + run.stderr
        failures += [finding(begun, part) for part in run.stdout.split("\nFAILED ")[1:]]
        if run.returncode not in (0, 1):
            stack = run.stderr.replace("\n\n", "\n")[:2000]
            crashes.append(finding(begun, f"{seed + len(begun) - 1}: exit status {run.returncode}\n{stack}"))
        else:
            served += int(run.stdout.splitlines()[-1].split(", ")[1].split()[0])
        seed += len(begun)
    found = crashes + failures
    if found:
        pytest.fail(f"{len(crashes)} crashes, {len(failures)} failures; of these\n\n" + "\n".join(found[:5]), pytrace=False)
    assert served > 0.9 * cases, f"the kernels served {served} of {cases} calls only"


def compile_what_they_call(cases: int) -> None:
    """Fill the cache with the kernels of the first cases, and run none of them. To be called in a fork of a process that has compiled
    others: what those share is half of the work."""

    def compiled_only(self: Region, version: tuple[Any, ...], tasks: int) -> Callable[[int], None]:
        self.compile(*version)
        return lambda block: None

    Region.bound = compiled_only  # type: ignore[method-assign]
    contract.watch = None  # it would miss what is not written
    for seed in range(cases):
        with contextlib.suppress(Exception):  # of wrong numbers: nothing was computed
            guard_pages.run(*guard_pages.make(seed))


def finding(begun: list[str], text: str) -> str:
    """The case, what happened (up to the empty line), and how to see it again."""
    seed, _, what = text.split("\n\n")[0].partition(": ")
    (case,) = (line for line in begun if line.startswith(f"seed {seed}: "))
    return f"{case}\n{what}\nreproduce: python tests/guard_pages.py --seed {seed} --cases 1\n"


def test_sixty_calls() -> None:
    assert signal_of(lambda: compile_what_they_call(60)) == 0
    fuzz(0, 60)


@pytest.mark.long
def test_a_thousand_more() -> None:
    fuzz(60, 1040)


@pytest.mark.long
def test_twenty_thousand_calls() -> None:
    fuzz(random.randrange(1000, 2**31), 20_000)


def signal_of(action: Callable[[], object]) -> int:
    """What kills a child process that does this; 0 if nothing."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("count", [1, 17, 4096, 5000])
def test_who_leaves_a_tensor_or_writes_into_it_dies(count: int) -> None:
    for at_the_end in (False, True):
        tensor = guarded(count, torch.float32, at_the_end)
        edge = tensor.data_ptr() + tensor.nbytes if at_the_end else tensor.data_ptr() - 1
        assert bool(tensor.isnan().all())
        assert signal_of(lambda edge=edge: ctypes.string_at(edge, 1)) == -signal.SIGSEGV
        assert signal_of(lambda tensor=tensor: ctypes.string_at(tensor.data_ptr(), tensor.nbytes)) == 0
        assert signal_of(lambda tensor=tensor: ctypes.memset(tensor.data_ptr(), 0, 1)) == 0
        read_only(tensor)
        assert signal_of(lambda tensor=tensor: ctypes.memset(tensor.data_ptr(), 0, 1)) == -signal.SIGSEGV
