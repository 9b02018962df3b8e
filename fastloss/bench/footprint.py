"""Peak memory beyond the inputs. On CPU as the system sees it: whatever allocator it came from counts, the gradient pool included."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .cases import Case, make_inputs
from .providers import Provider
from .runner import Runner, configured, release_memory

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory(provider: Provider, case: Case) -> dict[str, int]:
    """Bytes: 'peak' during a step beyond what was there before it, and 'kept' after gradient and output are gone.

    For a process of its own: everything that happens in the process counts. A first step compiles and warms up; what it left behind in
    pools is given back before the second is measured, so a pooled gradient counts like any other.
    """
    runner = Runner(provider, case, make_inputs(case, 1))
    runner.step(0)
    release_memory()
    _CLEAR.write_text("5")  # resets the high-water mark to what is resident now
    before = _resident("VmRSS")
    with configured(provider.settings):
        runner.step(0)
    found = {"peak": max(0, _resident("VmHWM") - before), "kept": max(0, _resident("VmRSS") - before)}
    release_memory()
    return found


def peak_memory_on_gpu(step: Callable[[int], Any]) -> dict[str, int]:
    """The same on CUDA, where torch's allocator knows it: in this process, of a step that has been taken before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(0)
    torch.cuda.synchronize()
    return {"peak": torch.cuda.max_memory_allocated() - before, "kept": torch.cuda.memory_allocated() - before}


def can_measure() -> bool:
    """Whether this system tells its high-water mark (Linux does)."""
    return _STATUS.exists() and _CLEAR.exists()


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s*(\d+) kB", _STATUS.read_text())
    return int(found.group(1)) << 10 if found else 0
