"""Compile what the later stages launch, on all cores: one core would take minutes of the device's time."""

import multiprocessing
import os
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch

from .compiled import watched
from .launches import Launch, kernel_package, planned
from .questions import rows_in_registers
from .stage import Day

_WORKERS = 14


def warm(day: Day) -> None:
    """Everything in Triton's cache on disk; on CPU, in a rehearsal, every launcher is launched once."""
    launches = [*planned(day.tiny), *rows_in_registers(day.tiny)]
    workers = 1 if day.tiny else min(_WORKERS, os.cpu_count() or 1)
    shares = [launches[i::workers] for i in range(workers)]
    start = perf_counter()
    failed: dict[str, str] = {}
    if workers == 1:
        failed = compile_all(launches, day.device)
    else:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            for found in pool.starmap(compile_all, [(share, day.device) for share in shares]):
                failed |= found
    day.save(warm={"launches": len(launches), "workers": workers, "seconds": perf_counter() - start, "failed": failed})


def compile_all(launches: Sequence[Launch], device: str) -> dict[str, str]:
    """What went wrong, by launch."""
    failed = {}
    for launch in launches:
        try:
            if device == "cpu":
                getattr(kernel_package("cpu"), launch.name)(*launch.arguments("cpu"))
            else:
                compile_only(launch)
        except Exception as problem:
            failed[f"{launch.name} {launch.shape} {launch.dtype}"] = f"{type(problem).__name__}: {problem}"[:300]
    return failed


def compile_only(launch: Launch) -> list[dict[str, Any]]:
    """The kernels that Triton makes for a launch, for the GPU that is here, on tensors without memory."""
    from ...kernels.cuda import launch as how

    if torch.cuda.is_available():
        how.ASSUMED = how._device(0)
    with watched(launch=False) as noted:
        getattr(kernel_package("cuda"), launch.name)(*launch.arguments("meta"))
    return noted
