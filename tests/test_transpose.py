"""Rows turned about in registers: every number of rows and of classes."""

from typing import Any, NamedTuple

import pytest
import torch
from helpers import DTYPES

from fastloss.kernels.cpu import launch
from fastloss.kernels.cpu.arguments import COMPUTED, Computed, Stored, arguments
from fastloss.kernels.cpu.memory import load, store
from fastloss.kernels.cpu.rows import lanes_for
from fastloss.kernels.cpu.simd import lane_max, lane_sum, lanes_of
from fastloss.kernels.cpu.transpose import largest_of_each, sum_of_each, turn_in, turn_out


class ThereAndBack(NamedTuple):
    source: Stored
    stride: int
    rows: int
    count: int
    terms: Computed
    result: Stored


@launch.region(ThereAndBack)
def _there_and_back(block: Any) -> None:
    a = arguments(block)
    while launch.next_task(block) >= 0:
        turn_in(a.source, 1, a.stride, a.rows, a.count, a.terms, 0)
        turn_out(a.terms, 0, a.result, 1, a.stride, a.rows, a.count)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", pytest.param("float16", marks=pytest.mark.long)])
def test_lanes_are_rows_and_again_classes(dtype: str) -> None:
    stored = DTYPES[dtype]
    source = torch.randn(20, 20).to(stored)
    lanes = lanes_for(source)
    for rows in range(1, lanes + 1):
        for count in range(1, lanes + 1):
            terms, result = torch.full((lanes, lanes), torch.nan, dtype=COMPUTED[stored]), torch.full_like(source, 7.0)
            _there_and_back(1, ThereAndBack(source=source, stride=20, rows=rows, count=count, terms=terms, result=result))
            numbers = source[:rows, 1 : count + 1]
            assert torch.equal(terms[:count, :rows], numbers.T.to(terms.dtype))
            expected = torch.full_like(source, 7.0)
            expected[:rows, 1 : count + 1] = numbers
            assert torch.equal(result, expected)


class Folded(NamedTuple):
    vectors: Stored
    sums: Stored  # of all of them at once, then one by one, as `largest`
    largest: Stored


@launch.region(Folded)
def _folded(block: Any) -> None:
    a = arguments(block)
    lanes = lanes_of(a.vectors)
    while launch.next_task(block) >= 0:
        store(a.sums, 0, 1, lanes, sum_of_each(a.vectors, 0))
        store(a.largest, 0, 1, lanes, largest_of_each(a.vectors, 0))
        for k in range(lanes):
            v = load(a.vectors, k * lanes, 1, lanes, 0.0)
            a.sums[lanes + k], a.largest[lanes + k] = lane_sum(v), lane_max(v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vectors_folded_together_have_the_bits_of_each_alone(dtype: torch.dtype) -> None:
    lanes = lanes_for(torch.empty(0, dtype=dtype))
    vectors = torch.randn(lanes, lanes, dtype=dtype) * torch.logspace(-6, 6, lanes, dtype=dtype)
    vectors[1, 2] = -torch.inf
    sums, largest = torch.empty(2, lanes, dtype=dtype), torch.empty(2, lanes, dtype=dtype)
    _folded(1, Folded(vectors, sums, largest))
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(largest[0], largest[1])
    assert torch.equal(largest[0], vectors.max(1).values)
