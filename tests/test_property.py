"""Random shapes, strides, dtypes and options against torch and float64."""

from typing import Any

import pytest
import torch
from helpers import DTYPES, LAYOUTS, REDUCTIONS, Tensors, check, class_inputs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

quick = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
thorough = settings(quick, max_examples=2000, derandomize=False)

sizes = st.one_of(st.integers(1, 70), st.sampled_from([15, 16, 17, 31, 32, 33, 47, 48, 49, 64, 65, 127, 128, 129, 255, 256, 257, 1000]))
dtypes = st.sampled_from(list(DTYPES.values()))
layouts = st.sampled_from(list(LAYOUTS))


@st.composite
def shapes(draw: Any, least: int = 2) -> tuple[int, ...]:
    """(N, C, ...) of at most some ten thousand numbers."""
    shape = [draw(st.integers(1, 40)), draw(sizes), *draw(st.lists(st.integers(1, 6), max_size=2))]
    return tuple(shape[: max(least, len(shape))])


@st.composite
def class_losses(draw: Any) -> tuple[str, Tensors, dict[str, Any]]:
    shape, dtype, seed = draw(shapes()), draw(dtypes), draw(st.integers(0, 2**31))
    torch.manual_seed(seed)
    kind = draw(st.sampled_from(["indices", "probabilities", "nll_loss"]))
    ignored = draw(st.sampled_from([None, -100, 0, -1, 300])) if kind != "probabilities" else None
    spread = draw(st.sampled_from([0.1, 3.0, 30.0]))
    tensors = class_inputs(shape, dtype, ignored=ignored, weighted=draw(st.booleans()), soft=kind == "probabilities", spread=spread)
    options: dict[str, Any] = {"reduction": draw(st.sampled_from(REDUCTIONS))}
    if ignored is not None:
        options["ignore_index"] = ignored
    if kind != "nll_loss":
        options["label_smoothing"] = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    return "nll_loss" if kind == "nll_loss" else "cross_entropy", tensors, options


@st.composite
def element_losses(draw: Any) -> tuple[str, Tensors, dict[str, Any]]:
    shape, dtype = draw(shapes()), draw(dtypes)
    torch.manual_seed(draw(st.integers(0, 2**31)))
    function = draw(st.sampled_from(["binary_cross_entropy_with_logits", "binary_cross_entropy"]))
    logits = torch.randn(shape) * 3

    def weight() -> torch.Tensor | None:
        if not draw(st.booleans()):
            return None
        kept = shape[draw(st.integers(0, len(shape))) :]
        return (torch.rand([size if draw(st.booleans()) else 1 for size in kept]) + 0.1).to(dtype)

    tensors: Tensors = {
        "input": (logits if "logits" in function else logits.sigmoid()).to(dtype),
        "target": torch.rand(shape).to(dtype),
        "weight": weight(),
    }
    if "logits" in function:
        tensors["pos_weight"] = weight()
    return function, tensors, {"reduction": draw(st.sampled_from(REDUCTIONS))}


def compare(made: tuple[str, Tensors, dict[str, Any]], input: str, target: str) -> None:
    function, tensors, options = made
    soft = function == "cross_entropy" and tensors["target"].is_floating_point()
    where = {"input": input, "weight": "every_other"} if function in ("cross_entropy", "nll_loss") else {"input": input}
    if tensors["target"].is_floating_point():
        where["target"] = target
    check(function, tensors, wanted=("input", "target") if soft else ("input",), layouts=where, ulps=8, scale=0.5, **options)


@given(class_losses(), layouts, layouts)
@quick
def test_class_losses(made: tuple[str, Tensors, dict[str, Any]], input: str, target: str) -> None:
    compare(made, input, target)


@given(element_losses(), layouts, layouts)
@quick
def test_element_losses(made: tuple[str, Tensors, dict[str, Any]], input: str, target: str) -> None:
    compare(made, input, target)


@given(shapes(), dtypes, layouts, st.data())
@quick
def test_softmax(shape: tuple[int, ...], dtype: torch.dtype, layout: str, data: Any) -> None:
    function, dim = data.draw(st.sampled_from(["softmax", "log_softmax"])), data.draw(st.integers(-len(shape), len(shape) - 1))
    check(function, {"input": (torch.randn(shape) * 3).to(dtype)}, layouts={"input": layout}, dim=dim, ulps=8, scale=4.0)


@pytest.mark.long
@given(st.one_of(class_losses(), element_losses()), layouts, layouts)
@thorough
def test_all_losses_at_length(made: tuple[str, Tensors, dict[str, Any]], input: str, target: str) -> None:
    compare(made, input, target)
