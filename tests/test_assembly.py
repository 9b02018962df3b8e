"""What LLVM makes of the hot loops: vectors on x86-64, and no call to libm anywhere."""

import platform
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import numba
import pytest
import torch

from fastloss.kernels.cpu import (
    bce_with_logits,
    cross_entropy,
    cross_entropy_one_visit,
    cross_entropy_tiles,
    elementwise,
    smoothed_cross_entropy,
    soft_cross_entropy,
    softmax,
    softmax_in_turn,
)
from fastloss.kernels.cpu.arguments import floats_in, known_in
from fastloss.kernels.cpu.launch import Region
from fastloss.kernels.cpu.rows import lanes_for

MODULES = (
    bce_with_logits,
    cross_entropy,
    cross_entropy_one_visit,
    cross_entropy_tiles,
    smoothed_cross_entropy,
    soft_cross_entropy,
    softmax,
    softmax_in_turn,
)
REGIONS = {
    f"{module.__name__.rsplit('.', 1)[1]}.{name}": region
    for module in MODULES
    for name, region in vars(module).items()
    if isinstance(region, Region) and region.body.__module__ in (module.__name__, elementwise.__name__)
}
LIBM = re.compile(r"\b(expf?|exp2f?|logf?|log1pf?|log2f?|powf?|fmaf?|_ZGV\w+)(@PLT)?\b")


@cache
def assembly(region: Region, dtype: torch.dtype, tile: int) -> str:
    """Of large results, rows as many in a vector as `tile` says, elements side by side. What comes from Numba's cache has no text, and is
    compiled again."""
    side_by_side = elementwise.SIDE_BY_SIDE if region.body.__module__ == elementwise.__name__ else 0
    values = {"_way_tile": tile, "_past_caches": 1, "_layout": side_by_side, "_one_weight": 1}
    known = [values[name] for name in known_in(region.block)]
    version = [dtype] * (1 + len(floats_in(region.block))) + known
    function, _ = region.compile(*version)
    if function.cache_hits:
        function = numba.cfunc(region.signature(*version), error_model="numpy")(region.body)
    return function._library.get_asm_str()


def ways() -> Iterator[Any]:
    """Every region with rows one by one and with rows in lanes, as far as it takes them."""
    for name, region in REGIONS.items():
        if name.startswith("cross_entropy_tiles."):
            yield name, 16
            continue
        yield name, 1
        if "_way_tile" in known_in(region.block) and not name.endswith("_in_turn"):
            yield pytest.param(name, 16, marks=pytest.mark.long)


@pytest.mark.parametrize(("name", "tile"), list(ways()))
def test_no_call_to_libm(name: str, tile: int) -> None:
    assert not LIBM.search(assembly(REGIONS[name], torch.float32, tile))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the instruction names are those of x86-64")
@pytest.mark.parametrize(
    "name", ["cross_entropy._forward", "cross_entropy._backward", "cross_entropy_one_visit._rows_in_turn", "bce_with_logits._sum_backward"]
)
def test_arithmetic_is_on_vectors(name: str) -> None:
    text = assembly(REGIONS[name], torch.float32, 1)
    on_vectors = len(re.findall(r"\bv?(?:fn?m(?:add|sub)\d*|mul|add|sub)ps\b", text))
    on_scalars = len(re.findall(r"\bv?(?:fn?m(?:add|sub)\d*|mul|add|sub)ss\b", text))
    assert on_vectors > 50
    assert on_scalars < on_vectors / 4  # the ends of lane sums and a number per row


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the instruction names are those of x86-64")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("cross_entropy._backward", torch.float32),
        ("cross_entropy_one_visit._rows_in_turn", torch.float32),
        ("bce_with_logits._sum_backward", torch.float32),
        ("bce_with_logits._sum_backward", torch.bfloat16),  # LLVM loses the hint with what it takes for bfloat
        pytest.param("bce_with_logits._sum_backward", torch.float16, marks=pytest.mark.long),
        pytest.param("cross_entropy_one_visit._rows_in_turn", torch.bfloat16, marks=pytest.mark.long),
        pytest.param("cross_entropy_tiles.short_rows_in_turn", torch.float32, marks=pytest.mark.long),
        pytest.param("cross_entropy_tiles.short_rows_in_turn", torch.bfloat16, marks=pytest.mark.long),
        pytest.param("cross_entropy_tiles.tiles_in_turn", torch.float32, marks=pytest.mark.long),
    ],
)
def test_large_gradients_bypass_the_caches(name: str, dtype: torch.dtype) -> None:
    tile = lanes_for(torch.empty(0, dtype=dtype)) if name.startswith("cross_entropy_tiles.") else 1
    assert re.search(r"\bv?movntps\b", assembly(REGIONS[name], dtype, tile))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the instruction names are those of x86-64")
def test_a_maximum_of_bfloat16_compares_no_more_than_one_of_float32() -> None:
    """LLVM took one of widened numbers for a maximum of integers, which is three instructions."""
    region = REGIONS["cross_entropy._forward"]
    wide, half = (assembly(region, dtype, 1) for dtype in (torch.float32, torch.bfloat16))
    assert "maxps" in half
    assert len(re.findall(r"\bv?cmp[a-z]*ps\b", half)) == len(re.findall(r"\bv?cmp[a-z]*ps\b", wide))
