"""Blocks of named arguments: what arrives in a region is what was given, by name; what does not fit is refused before it is an address."""

from typing import Annotated, Any, NamedTuple

import numba
import pytest
import torch
from torch import Tensor

from fastloss.kernels.cpu.arguments import COMPUTED, Computed, Float64, Floats, Int64, Known, Stored, arguments, floats_in, known_in
from fastloss.kernels.cpu.launch import Region, next_task, region
from fastloss.kernels.cpu.memory import load_one


class Pair(NamedTuple):
    first: int
    second: Known


class Part(NamedTuple):
    share: float
    seen: Computed
    nothing: Computed | None
    pair: Pair


class Whole(NamedTuple):
    start: int
    values: Stored
    numbers: Int64
    sums: Float64
    part: Part
    strides: Annotated[tuple[int, ...], 3]


@numba.njit(forceinline=True)
def see_part(part: Any, sums: Any) -> None:
    sums[0] = part.share
    sums[1] = part.seen[0]
    sums[2] = part.pair.first * 10 + part.pair.second


@region(Whole)
def _region(block: Any) -> None:
    a = arguments(block)
    task = next_task(block)
    while task >= 0:
        see_part(a.part, a.sums)
        a.sums[3] = load_one(a.values, 1)
        a.sums[4] = a.numbers[0] + a.start
        a.sums[5] = a.strides[0] * 100 + a.strides[1] * 10 + a.strides[2]
        task = next_task(block)


def block(dtype: torch.dtype) -> Whole:
    computed = torch.tensor([0.25], dtype=COMPUTED[dtype])
    part = Part(share=0.1, seen=computed, nothing=None, pair=Pair(3, 4))
    sums = torch.zeros(6, dtype=torch.float64)
    return Whole(start=-5, values=torch.tensor([1.5, 2.5], dtype=dtype), numbers=torch.tensor([7]), sums=sums, part=part, strides=(1, 2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_everything_arrives_under_its_name(dtype: torch.dtype) -> None:
    given = block(dtype)
    assert not _region(1, given)
    share = torch.tensor(0.1, dtype=COMPUTED[dtype]).double().item()  # a real number is what the logits are computed in
    assert given.sums.tolist() == [share, 0.25, 34.0, 2.5, 2.0, 123.0]


def test_a_known_number_has_a_version_of_its_own() -> None:
    assert known_in(Whole) == ("_part_pair_second",)
    for second in (4, 5, 4):
        given = block(torch.float32)
        given = given._replace(part=given.part._replace(pair=Pair(3, second)))
        _region(1, given)
        assert given.sums[2] == 30 + second
    assert {(torch.float32, 4), (torch.float32, 5)} <= set(_region._compiled)


WRONG: dict[str, tuple[Any, str]] = {
    "numbers": (lambda a, t: a._replace(numbers=t), r"Whole\.numbers must be torch\.int64"),
    "sums": (lambda a, t: a._replace(sums=t), r"Whole\.sums must be torch\.float64"),
    "seen": (lambda a, t: a._replace(part=a.part._replace(seen=t)), r"Part\.seen must be torch\.float32"),
    "nothing": (lambda a, t: a._replace(part=a.part._replace(nothing=t)), r"Part\.nothing must be torch\.float32"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_tensor_of_another_dtype_is_refused_by_name(name: str) -> None:
    replace, message = WRONG[name]
    with pytest.raises(TypeError, match=f"{message}, got torch.int32"):
        _region(1, replace(block(torch.bfloat16), torch.zeros(9, dtype=torch.int32)))


class Mixed(NamedTuple):
    others: Floats
    values: Stored
    more: Floats
    sums: Float64


@region(Mixed)
def _mixed(block: Any) -> None:
    a = arguments(block)
    task = next_task(block)
    while task >= 0:
        a.sums[0] = load_one(a.values, 1)
        a.sums[1] = load_one(a.others, 1)
        a.sums[2] = load_one(a.more, 1)
        task = next_task(block)


def mixed(values: torch.dtype, others: torch.dtype, more: torch.dtype) -> Mixed:
    numbers = [torch.tensor([0.0, number], dtype=dtype) for number, dtype in ((2.0, others), (1.0, values), (3.0, more))]
    return Mixed(*numbers, sums=torch.zeros(3, dtype=torch.float64))


def test_floats_are_read_in_their_own_dtype() -> None:
    """Whatever comes first in the block: `Stored` alone says what is computed in, and each mixture is a version."""
    assert floats_in(Mixed) == ("_others", "_more")
    for dtypes in ((torch.bfloat16, torch.float32, torch.float16), (torch.float32, torch.float16, torch.float32)):
        given = mixed(*dtypes)
        assert not _mixed(1, given)
        assert given.sums.tolist() == [1.0, 2.0, 3.0]
        assert dtypes in _mixed._compiled


@pytest.mark.parametrize(
    ("values", "others"), [(torch.float32, torch.float64), (torch.float64, torch.bfloat16), (torch.float16, torch.int64)]
)
def test_floats_that_are_not_computed_with_alike_are_refused_by_name(values: torch.dtype, others: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"Mixed\.others must be computed with in {COMPUTED[values]}, got {others}"):
        _mixed(1, mixed(values, others, values))


def test_none_is_no_tensor_where_one_is_needed() -> None:
    with pytest.raises((TypeError, AttributeError)):
        _region(1, block(torch.float32)._replace(sums=None))


def test_every_region_has_a_block_and_every_tensor_in_it_a_kind() -> None:
    import importlib
    import pkgutil

    import fastloss.kernels.cpu as package

    modules = [importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]
    regions = [value for module in modules for value in vars(module).values() if isinstance(value, Region)]
    assert len({id(r) for r in regions}) > 20
    for r in regions:
        assert not any(hint is Tensor for hint in r.block.__annotations__.values()), r.block
