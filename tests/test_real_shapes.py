"""The benchmark's real shapes with fewer rows: every loss, option and dtype of the table against float64, by our kernels."""

import pytest
import torch

import fastloss
from fastloss.bench import accuracy
from fastloss.bench.cases import make_inputs
from fastloss.bench.providers import EAGER, FASTLOSS, PROVIDERS
from fastloss.bench.runner import Runner
from fastloss.bench.shapes import SHAPES, few_rows


@pytest.mark.parametrize("name", SHAPES)
def test_real_shape(name: str) -> None:
    case = few_rows(SHAPES[name], 60_000)
    inputs = make_inputs(case, 1)
    true = accuracy.truth(case, inputs[0])
    ours, theirs = (Runner(PROVIDERS[who], case, inputs).results(0, keep=True)[:2] for who in (FASTLOSS, EAGER))
    mine, allowed = accuracy.error_of(true, *ours), accuracy.allowed(case, accuracy.error_of(true, *theirs))
    assert mine.output <= allowed.output
    assert mine.gradient <= allowed.gradient
    one, call = inputs[0], getattr(fastloss, case.spec.function)
    route = fastloss.explain(case.spec.call, call, one.input, one.target, one.options)
    assert route.path == "kernel", route.reason


def test_the_table_has_every_kind_of_loss() -> None:
    functions = {case.spec.function for case in SHAPES.values()}
    assert {name for name in fastloss.__all__ if hasattr(torch.nn.functional, name)} - functions <= {"nll_loss", "binary_cross_entropy"}
    assert {case.dtype for case in SHAPES.values()} >= {"float32", "bfloat16"}
