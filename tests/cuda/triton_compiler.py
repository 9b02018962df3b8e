"""Compile the kernels that the launchers would launch, for GPUs that are not here.

`compiling(target)` replaces Triton's driver by one that needs no device: a launch on CPU tensors goes through Triton's own
specialisation and compiler (ptxas included), and then is recorded instead of run.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass
class Launch:
    """A compiled kernel and how often it would run."""

    name: str
    grid: tuple[int, int, int]
    kernel: Any

    @property
    def registers_spilled(self) -> int:
        if "amdgcn" in self.kernel.asm:
            return sum(map(int, re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", self.kernel.asm["amdgcn"])))
        return len(re.findall(r"\b(?:STL|LDL)\b", self.kernel.asm["sass"]))

    def loops(self) -> list[str]:
        """The PTX of every innermost loop."""
        lines = [line.strip() for line in self.kernel.asm["ptx"].splitlines()]
        lines = [line for line in lines if line and not line.startswith((".loc", "//", "$L__tmp", ".pragma"))]
        label_at = {line.split(":")[0]: i for i, line in enumerate(lines) if re.match(r"\$L__BB\w+:", line)}
        spans = []
        for i, line in enumerate(lines):
            jump = re.search(r"bra(?:\.uni)?\s+(\$L__BB\w+)", line)
            if jump and label_at.get(jump[1], i) < i:
                spans.append((label_at[jump[1]], i))
        innermost = [s for s in spans if not any(s != t and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
        return ["\n".join(lines[a : b + 1]) for a, b in innermost]


class _Utils:
    def get_device_properties(self, device: Any) -> dict[str, int]:
        return {"max_shared_mem": 166912, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}

    def load_binary(self, *args: Any) -> tuple[Any, ...]:
        return None, ("function",), 0, 0, 1024

    def unload_module(self, module: Any) -> None:
        pass


class _NoDevice(DriverBase):
    def __init__(self, target: GPUTarget) -> None:
        self.target, self.utils, self.launches = target, _Utils(), []

        class Launcher:
            def __init__(self, src: Any, metadata: Any) -> None:
                self.src = src

            def __call__(self, x: int, y: int, z: int, *rest: Any) -> None:
                # compiled kernels outlive this driver and keep their launcher: ask for the driver of the day
                driver = triton.runtime.driver.active
                kernels = [
                    k for cache in self.src.fn.device_caches.values() for k in cache[0].values() if getattr(k, "src", None) is self.src
                ]
                driver.launches.append(Launch(self.src.fn.__name__, (x, y, z), kernels[0]))

        self.launcher_cls = Launcher

    @staticmethod
    def is_active() -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> Any:
        return ("none", str(self.target.arch))  # the key of Triton's cache of compiled kernels

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise RuntimeError("nothing may be timed here")


@contextmanager
def compiling(target: str) -> Iterator[list[Launch]]:
    """Within, launches are compiled for the target and appended to the list."""
    driver, config = _NoDevice(TARGETS[target]), triton.runtime.driver
    saved = dict(vars(config))
    config.set_active(driver)
    try:
        yield driver.launches
    except Exception as error:
        if "ld.lld not found" in str(error):
            pytest.skip("Triton before 3.5 has no linker for AMD of its own, and ROCm is not installed")
        raise
    finally:
        vars(config).clear()
        vars(config).update(saved)
