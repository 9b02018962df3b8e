"""Compiled kernels on disk: a damaged cache, or one that cannot be written, costs a compilation and nothing else."""

import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import pytest
import torch
from numba.core import caching

from fastloss.kernels.cpu import cache, reduction
from fastloss.kernels.cpu.launch import Region


def was_cached(dtype: torch.dtype = torch.float32) -> bool:
    """Do what a new process does at its first call: whether that found the kernel compiled."""
    region = Region(reduction._sum.body, reduction.Sum)
    values, total = torch.randn(100, dtype=dtype), torch.full((1,), 7.0, dtype=dtype)
    to = reduction.Total(total, None, torch.empty(1, dtype=torch.float64), blocks=1, narrowed=0)
    region(1, reduction.Sum(values=values, size=values.numel(), total=to))
    torch.testing.assert_close(total[0], values.sum())
    return bool(region.compile(dtype)[0].cache_hits)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where kernels are kept during the test."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def cut(share: float) -> Callable[[bytes], bytes]:
    return lambda content: content[: int(len(content) * share)]


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
@pytest.mark.parametrize(
    "damage",
    [
        cut(0),
        cut(0.1),
        cut(0.999),
        lambda content: b"\x80\x05garbage" * 100,
        lambda content: content[: len(content) // 2] + bytes(64) + content[len(content) // 2 + 64 :],
    ],
    ids=["empty", "cut to a tenth", "cut at the end", "garbage", "zeros in the middle"],
)
def test_a_damaged_file_is_replaced(suffix: str, damage: Callable[[bytes], bytes], place: Path) -> None:
    assert not was_cached()
    assert was_cached()
    (path,) = place.rglob(f"*.{suffix}")
    path.write_bytes(damage(path.read_bytes()))
    assert not was_cached()
    assert was_cached()


def test_another_kernels_code_is_not_taken(place: Path) -> None:
    """Two processes that save at the same time may leave one's code under the other's key."""
    assert not was_cached(torch.float32)
    (path,) = place.rglob("*.nbc")
    of_float32 = path.read_bytes()
    assert not was_cached(torch.float64)
    for path in place.rglob("*.nbc"):
        path.write_bytes(of_float32)
    assert not was_cached(torch.float64)
    assert was_cached(torch.float64)


@pytest.mark.skipif(sys.platform == "win32", reason="a limit of Unix")
def test_a_full_disk(place: Path) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        assert not was_cached()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not was_cached()
    assert was_cached()


def test_a_directory_that_is_no_more(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = cache.KernelCache.save_overload

    def save_too_late(self: Any, *args: Any) -> None:
        shutil.rmtree(self.cache_path)
        Path(self.cache_path).write_text("no directory")
        save(self, *args)

    monkeypatch.setattr(cache.KernelCache, "save_overload", save_too_late)
    assert not was_cached()


def test_no_place_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    assert not was_cached()


@pytest.mark.parametrize("collecting", [True, False])
def test_garbage_is_collected_afterwards_as_before(collecting: bool, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meanwhile: list[bool] = []

    def compile_and_fail(self: Any) -> None:
        meanwhile.append(gc.isenabled())
        raise MemoryError

    try:
        if not collecting:
            gc.disable()
        assert not was_cached()
        assert gc.isenabled() == collecting
        monkeypatch.setattr(cache.CFunc, "_compile_uncached", compile_and_fail)
        with pytest.raises(MemoryError):
            was_cached(torch.float64)
        assert meanwhile == [False]
        assert gc.isenabled() == collecting
    finally:
        gc.enable()


FIND_ONE = """
import sys, torch
from fastloss.kernels.cpu import reduction
print("ready", flush=True)
sys.stdin.readline()
print(reduction._sum.compile(torch.float64)[0].cache_hits, flush=True)
"""


def test_of_processes_that_want_a_kernel_at_once_one_compiles_it(tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    ranks = [
        subprocess.Popen([sys.executable, "-c", FIND_ONE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    for rank in ranks:
        assert rank.stdout.readline() == "ready\n"  # type: ignore[union-attr]
    for rank in ranks:
        rank.stdin.write("\n")  # type: ignore[union-attr]
        rank.stdin.flush()  # type: ignore[union-attr]
    assert sorted(int(rank.communicate()[0]) for rank in ranks) == [0, 1]


@pytest.mark.skipif(sys.platform == "win32", reason="files are not locked there")
def test_a_process_that_never_ends_its_turn(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    assert not was_cached(torch.float32)
    (lock,) = place.rglob("*.lock")
    monkeypatch.setattr(cache, "_PATIENCE", 0.1)
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert was_cached(torch.float32)  # what is there does not take a turn
        assert not was_cached(torch.float64)
    assert was_cached(torch.float64)
