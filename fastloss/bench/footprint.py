"""Peak memory beyond the inputs, as the system sees it: whatever allocator it came from counts, the gradient pool included."""

import re
from pathlib import Path

import torch

from .cases import Case, make_inputs
from .providers import Provider
from .runner import Runner, configured, release_memory

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory(provider: Provider, case: Case, device: str = "cpu") -> dict[str, int]:
    """Bytes: 'peak' during a step beyond what was there before it, and 'kept' after gradient and output are gone.

    For a process of its own: everything that happens in the process counts. A first step compiles and warms up; what it left behind in
    pools is given back before the second is measured, so a pooled gradient counts like any other.
    """
    runner = Runner(provider, case, make_inputs(case, 1, device))
    runner.step(0)
    release_memory()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        runner.step(0)
        return {"peak": torch.cuda.max_memory_allocated() - before, "kept": torch.cuda.memory_allocated() - before}
    _CLEAR.write_text("5")  # resets the high-water mark to what is resident now
    before = _resident("VmRSS")
    with configured(provider.settings):
        runner.step(0)
    found = {"peak": max(0, _resident("VmHWM") - before), "kept": max(0, _resident("VmRSS") - before)}
    release_memory()
    return found


def can_measure() -> bool:
    """Whether this system tells its high-water mark (Linux does)."""
    return _STATUS.exists() and _CLEAR.exists()


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s*(\d+) kB", _STATUS.read_text())
    return int(found.group(1)) << 10 if found else 0
