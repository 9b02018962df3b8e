"""Where a measurement was made: machine, versions, commit, and how fast this machine copies."""

import ctypes
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch

import fastloss

from .clock import clock_of

HUGE_PAGES = "/sys/kernel/mm/transparent_hugepage/enabled"
_PR_GET_THP_DISABLE = 42  # linux/prctl.h
_UNKNOWN_CACHE = 32 << 20
_LARGEST_CACHE = 512 << 20  # a guest may see the cache of a whole host; rotating through more than this costs memory for nothing


def describe() -> dict[str, Any]:
    """What a reader needs to know to believe a number."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(_memory_bytes() / 2**30, 1),
        "cache_mib": last_level_cache() >> 20,
        "huge_pages": huge_pages(),
        "gpu": gpu() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "commit": commit(),
        "versions": {name: version(name) for name in ("fastloss", "torch", "numba", "llvmlite", "numpy", "triton")},
    }


def gpu() -> dict[str, Any]:
    """What there is to know of the current GPU."""
    here = torch.cuda.get_device_properties(torch.cuda.current_device())
    free, total = torch.cuda.mem_get_info()
    return {
        "name": here.name,
        "capability": f"{here.major}.{here.minor}",
        "processors": here.multi_processor_count,
        "cache_mib": cache_of("cuda") >> 20,
        "memory_gib": round(total / 2**30, 1),
        "free_gib": round(free / 2**30, 1),
        "runtime": f"CUDA {torch.version.cuda}" if torch.version.cuda else f"HIP {torch.version.hip}",
        **nvidia_smi(),
    }


_ASKED = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu")


def nvidia_smi() -> dict[str, str]:
    """Driver, clocks, power and temperature of the first GPU as they are now; nothing where there is no such program. It only reads."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_ASKED)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(_ASKED, (word.strip() for word in done.stdout.strip().split(",")), strict=False))


def version(distribution: str) -> str | None:
    if distribution == "fastloss":
        return fastloss.__version__
    if distribution == "torch":
        return torch.__version__
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The model, with its widest vector unit: the name a cloud shows often hides it."""
    text = _read("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", text)
    name = found.group(1).strip() if found else platform.processor() or platform.machine()
    for flag, word in (("avx512f", "AVX-512"), ("avx2", "AVX2"), ("asimd", "NEON")):
        if re.search(rf"\b{flag}\b", text):
            return f"{name}, {word}"
    return name


def last_level_cache() -> int:
    """Bytes, at most 512 MiB."""
    sizes = [_read(path) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    bytes_ = [int(size.strip()[:-1]) << {"K": 10, "M": 20}[size.strip()[-1]] for size in sizes if size.strip()[-1:] in ("K", "M")]
    return min(max(bytes_, default=_UNKNOWN_CACHE), _LARGEST_CACHE)


def cache_of(device: str) -> int:
    """Bytes of the cache that inputs must miss: the last level's of this CPU, or the GPU's."""
    if device != "cuda":
        return last_level_cache()
    here = torch.cuda.get_device_properties(torch.cuda.current_device())
    return int(getattr(here, "L2_cache_size", 0)) or _UNKNOWN_CACHE


def huge_pages() -> str:
    """The kernel's policy for anonymous memory: 'always', 'madvise', 'never' or 'unknown'; 'off' if this process is denied them."""
    try:
        if ctypes.CDLL(None).prctl(_PR_GET_THP_DISABLE, 0, 0, 0, 0) == 1:
            return "off"
    except (AttributeError, OSError, TypeError):  # not Linux
        return "unknown"
    found = re.search(r"\[(\w+)\]", _read(HUGE_PAGES))
    return found.group(1) if found else "unknown"


def commit() -> str | None:
    """The commit of the checkout that fastloss runs from, with + for local changes; None outside of one. A copy of a checkout without its
    history is told by FASTLOSS_COMMIT."""
    told = os.environ.get("FASTLOSS_COMMIT")
    if told:
        return told
    folder = Path(fastloss.__file__).parent.parent
    if not (folder / ".git").exists():
        return None
    try:
        short = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True, check=True, timeout=10)
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=folder, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return short.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def copy_times(device: str = "cpu", size: int | None = None, rounds: int | None = None) -> tuple[int, list[float]]:
    """Bytes read and written by one dst.copy_(src) into memory that is mapped already, and the seconds of `rounds` of them.

    512 MiB and 7 rounds on CPU; 4 GiB, or a quarter of what is free, and 20 rounds on CUDA, where clocks rise under load.
    """
    if size is None:
        size = 512 << 20 if device == "cpu" else min(4 << 30, torch.cuda.mem_get_info()[0] // 4)
    source = torch.ones(size // 4, device=device)
    sink, clock = torch.zeros_like(source), clock_of(device)
    if device != "cpu":
        sink.copy_(source)
    clock.start(ahead=1e-3)
    for _ in range(rounds or (7 if device == "cpu" else 20)):
        sink.copy_(source)
        clock.mark()
    return 2 * size, clock.laps()


def copy_bandwidth(device: str = "cpu") -> float:
    """Bytes per second of such a copy, the median."""
    moved, times = copy_times(device)
    return moved / median(times)


def _memory_bytes() -> int:
    found = re.search(r"MemTotal:\s*(\d+)", _read("/proc/meminfo"))
    return int(found.group(1)) << 10 if found else 0


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
