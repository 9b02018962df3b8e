"""Kernels for CPUs with fewer instructions than this one has: compiled by a child process that is told it has such a CPU, and run here."""

import hashlib
import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers import DTYPES, check, class_inputs
from llvmlite.binding import get_host_cpu_features

import fastloss
from fastloss.kernels.cpu import half, launch, target
from fastloss.kernels.cpu.arguments import Computed, Stored, arguments
from fastloss.kernels.cpu.math import exp
from fastloss.kernels.cpu.memory import load, store
from fastloss.kernels.cpu.simd import lanes_of

AVX2 = {"avx", "avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt", "movbe", "popcnt"}
# LLVM's name of a CPU, and the instructions of its kernels that this CPU must have
MACHINES = {
    "generic": set(),  # plain x86-64
    "haswell": AVX2,
    "skylake-avx512": AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
}
SIXTEEN_BITS = ("float16", "bfloat16")


class Conversion(NamedTuple):
    narrow: Stored
    wide: Computed
    size: int
    to_narrow: int


@launch.region(Conversion)
def _convert(block: Any) -> None:
    a = arguments(block)
    while launch.next_task(block) >= 0:
        for i in range(0, a.size, lanes_of(a.narrow)):
            n = a.size - i
            if a.to_narrow:
                store(a.narrow, i, 1, n, load(a.wide, i, 1, n, 0.0))
            else:
                store(a.wide, i, 1, n, load(a.narrow, i, 1, n, 0.0))


class Powers(NamedTuple):
    exponents: Stored
    powers: Stored
    size: int


@launch.region(Powers)
def _powers(block: Any) -> None:
    a = arguments(block)
    while launch.next_task(block) >= 0:
        for i in range(0, a.size, lanes_of(a.exponents)):
            store(a.powers, i, 1, a.size - i, exp(load(a.exponents, i, 1, a.size - i, 0.0)))


def powers(exponents: torch.Tensor) -> torch.Tensor:
    """e to these, by the kernels' own exp."""
    result = torch.full_like(exponents, 7.0)
    _powers(1, Powers(exponents=exponents, powers=result, size=exponents.numel()))
    return result


def widened(numbers: torch.Tensor) -> torch.Tensor:
    result = torch.full(numbers.shape, 7.0)
    _convert(1, Conversion(narrow=numbers, wide=result, size=numbers.numel(), to_narrow=False))
    return result


def narrowed(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    result = torch.full(numbers.shape, 7.0, dtype=dtype)
    _convert(1, Conversion(narrow=result, wide=numbers, size=numbers.numel(), to_narrow=True))
    return result


def same(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Bit for bit, but one NaN is as good as another."""
    integers = torch.int32 if a.element_size() == 4 else torch.int16
    return (a.view(integers) == b.view(integers)) | (a.isnan() & b.isnan())


def check_conversions(dtype: torch.dtype) -> None:
    """Every 16-bit number widened. Every one, every middle between neighbours, its neighbours and random bits narrowed."""
    every = torch.arange(1 << 16).to(torch.int16).view(dtype)
    wide = every.float()
    assert bool(same(widened(every), wide).all())
    finite = wide[wide.isfinite()].double().sort().values
    largest = torch.finfo(dtype).max
    beyond = 2 * largest - finite[finite < largest][-1]  # from half way to there on, a number is infinite
    middles = ((finite[1:] + finite[:-1]) / 2).float().view(torch.int32)
    ends = torch.tensor([(largest + beyond) / 2, beyond, torch.inf, torch.nan, 1e-45, 2.0**-126]).float().view(torch.int32)
    chance = torch.randint(-(1 << 31), 1 << 31, (1 << 20,)).int()
    bits = torch.cat([wide.view(torch.int32), middles - 1, middles, middles + 1, ends, ends - 1, ends + 1, chance])
    numbers = torch.cat([bits, bits | -(1 << 31)]).view(torch.float32)
    result, expected = narrowed(numbers, dtype), numbers.to(dtype)
    fine = same(result, expected)
    if dtype == torch.bfloat16 and "narrow bfloat16" in half.instructions():  # that instruction knows no denormals
        fine |= (numbers.abs() < 2.0**-126) & (result == 0)
    assert bool(fine.all()), (numbers[~fine][:5], result[~fine][:5], expected[~fine][:5])


def check_exp(dtype: torch.dtype) -> str:
    """Against the truth, in units of the last place; and at the ends. What it says is the same where it computed the same."""
    smallest, unit = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).eps
    x = torch.linspace(-24, 0, (1 << 18) + 1, dtype=dtype)
    result, truth = powers(x), x.double().exp()
    if dtype == torch.float64:  # torch's own is within a unit
        assert ((result - truth).abs() <= 2 * unit * truth).all()
    else:
        last_place = torch.from_numpy(np.spacing(truth.float().numpy())).double()
        assert float(((result.double() - truth) / last_place).abs().max()) < 2.1
    far = torch.linspace(math.log(smallest) + 0.1, 16, 1 << 16, dtype=dtype)
    assert torch.allclose(powers(far).double(), far.double().exp(), rtol=4 * unit, atol=0)
    ends = torch.tensor([0.0, -0.0, -math.inf, -torch.finfo(dtype).max, math.log(smallest) - 0.1, math.nan, 1e-30], dtype=dtype)
    assert powers(ends)[:5].tolist() == [1, 1, 0, 0, 0]
    assert powers(ends)[5].isnan()
    assert powers(ends)[6] == 1
    return hashlib.sha256(result.numpy().tobytes()).hexdigest()


def check_losses(dtype: torch.dtype, everything: bool) -> None:
    """Values and gradients against float64, rows in lanes and row by row."""
    for shape, layout in (((40, 7), "contiguous"), ((3, 300), "contiguous"), ((5, 20), "every_other")):
        indices, soft = class_inputs(shape, dtype, weighted=True), class_inputs(shape, dtype, soft=True)
        only_input = {"input": indices["input"]}
        layouts = {"input": layout}
        check("nll_loss", indices, layouts=layouts, reduction="none")
        if dtype == torch.bfloat16 or everything:
            pair = {"input": soft["input"], "target": soft["target"]}
            check("binary_cross_entropy_with_logits", pair, layouts=layouts, reduction="none")
        if everything:
            check("softmax", only_input, layouts=layouts, scale=1, dim=1)
            check("log_softmax", only_input, layouts=layouts, scale=2, dim=1)
        if dtype != torch.float64 and everything:
            check("cross_entropy", indices, layouts=layouts, scale=1)


def main(what: str) -> None:
    fastloss.config.min_numel = 0
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for name in SIXTEEN_BITS:
        check_conversions(DTYPES[name])
    print("exp:", check_exp(torch.float32), check_exp(torch.float64))
    for dtype in DTYPES.values():
        check_losses(dtype, what == "everything")
    print("instructions:", ", ".join(sorted(half.instructions())))


def on(machine: str, what: str, tmp_path: Path) -> str:
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the CPUs are x86-64 ones")
    features = get_host_cpu_features()
    missing = {name for name in MACHINES[machine] if not features.get(name)}
    if missing:
        pytest.skip(f"this CPU lacks {', '.join(sorted(missing))}")
    told = {"NUMBA_CPU_NAME": machine, "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, __file__, what], env={**os.environ, **told}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("machine", ["haswell", *(pytest.param(name, marks=pytest.mark.long) for name in ("generic", "skylake-avx512"))])
def test_kernels_of_another_cpu(machine: str, tmp_path: Path) -> None:
    found = on(machine, "some", tmp_path)
    assert "bfloat16" not in found
    if machine != "generic" and target.has_256_bits():  # the same bits, by other instructions
        assert f"exp: {check_exp(torch.float32)} " in found
    assert ("narrow float16, widen float16" in found) == (machine != "generic")


@pytest.mark.long
@pytest.mark.parametrize("machine", MACHINES)
def test_every_function_on_another_cpu(machine: str, tmp_path: Path) -> None:
    on(machine, "everything", tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_exp_on_this_cpu(dtype: torch.dtype) -> None:
    check_exp(dtype)


@pytest.mark.parametrize("name", SIXTEEN_BITS)
def test_conversions_on_this_cpu(name: str) -> None:
    check_conversions(DTYPES[name])


def test_the_choice_of_instructions_is_part_of_what_the_cache_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    before = launch._sources.__wrapped__()
    monkeypatch.setattr(half, "instructions", lambda: frozenset({"something else"}))
    assert launch._sources.__wrapped__() != before


if __name__ == "__main__":
    main(sys.argv[1])
