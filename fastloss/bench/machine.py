"""Where a measurement was made: machine, versions, commit, and how fast this machine copies."""

import ctypes
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import fastloss

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
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "commit": commit(),
        "versions": {name: version(name) for name in ("fastloss", "torch", "numba", "llvmlite", "numpy", "triton")},
    }


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
    """The commit of the checkout that fastloss runs from, with + for local changes; None outside of one."""
    folder = Path(fastloss.__file__).parent.parent
    if not (folder / ".git").exists():
        return None
    try:
        short = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True, check=True, timeout=10)
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=folder, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return short.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def copy_bandwidth(device: str = "cpu", size: int = 512 << 20, rounds: int = 7) -> float:
    """Bytes per second, read and written, of dst.copy_(src) into memory that is mapped already."""
    source = torch.ones(size // 4, device=device)
    sink = torch.zeros_like(source)
    times = []
    for _ in range(rounds):
        start = perf_counter()
        sink.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(perf_counter() - start)
    return 2 * size / sorted(times)[rounds // 2]


def _memory_bytes() -> int:
    found = re.search(r"MemTotal:\s*(\d+)", _read("/proc/meminfo"))
    return int(found.group(1)) << 10 if found else 0


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
