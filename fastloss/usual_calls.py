"""The calls that programs make of each loss, on zeros: together they launch every version of the kernels that such programs launch.

A kernel has versions for dtypes, for rows of many classes and of few, for classes that lie side by side and apart ((N, C, d1, ...)), and
for results so large that they are written past the caches.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .functional import binary_cross_entropy, binary_cross_entropy_with_logits, cross_entropy, nll_loss, sigmoid_focal_loss
from .linear import linear_cross_entropy, linear_token_statistics
from .loss import each
from .probabilities import log_softmax, softmax
from .sparse_targets import sparse_soft_cross_entropy
from .statistics import TokenStatistics, token_statistics

Shape = tuple[int, ...]
LARGE = 1 << 25  # bytes: results from here on are written past the caches (`kernels/cpu/rows.py`)
_MANY, _FEW, _APART, _ALONE = (64, 257), (64, 8), (2, 8, 16, 16), (1, 4096)  # the last one is shared out among threads
_FEATURES = 16  # of a linear layer


class Use(NamedTuple):
    """How programs call a loss."""

    call: Callable[..., Any]  # with logits, or what else the loss takes, and options; its answers
    options: tuple[dict[str, Any], ...]
    small: tuple[Shape, ...]  # of the logits
    large: tuple[Shape, ...]  # these, with as many more along the first dimension as make them large


def _indices(x: Tensor) -> Tensor:
    return torch.zeros((x.shape[0], *x.shape[2:]), dtype=torch.int64, device=x.device)


def _two_classes(x: Tensor) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], 2, *x.shape[2:])
    return torch.zeros(shape, dtype=torch.int64, device=x.device), torch.zeros(shape, dtype=x.dtype, device=x.device)


def _layer(x: Tensor) -> tuple[Tensor, Tensor]:
    """An input that wants a gradient, and a linear layer, whose logits have the shape of `x`."""
    return x.new_zeros(x.shape[0], _FEATURES, requires_grad=x.requires_grad), x.new_zeros(x.shape[1], _FEATURES)


_REDUCTIONS = tuple({"reduction": reduction} for reduction in ("mean", "sum", "none"))
_STATISTICS: tuple[dict[str, Any], ...] = ({}, {"outputs": ("log_prob",)}, {"outputs": TokenStatistics._fields})
_ROWS = (_MANY, _FEW, _APART, _ALONE), (_MANY, _FEW, _APART)
_FLAT_ROWS = (_MANY, _FEW, _ALONE), (_MANY, _FEW)
_ELEMENTS = (_MANY,), (_MANY,)
_CHUNKS = (_MANY, _FEW, _ALONE), ()  # the gradient of a chunk takes the place of its logits

USES: dict[str, Use] = {
    "cross_entropy": Use(lambda x, **o: cross_entropy(x, _indices(x), **o), _REDUCTIONS, *_ROWS),
    "smoothed_cross_entropy": Use(lambda x, **o: cross_entropy(x, _indices(x), label_smoothing=0.1, **o), _REDUCTIONS, *_ROWS),
    "soft_cross_entropy": Use(lambda x, **o: cross_entropy(x, torch.zeros_like(x), **o), _REDUCTIONS, *_ROWS),
    "sparse_soft_cross_entropy": Use(
        lambda x, **o: sparse_soft_cross_entropy(x, *_two_classes(x), **o),
        (*_REDUCTIONS, *({**o, "label_smoothing": 0.1} for o in _REDUCTIONS)),
        *_ROWS,
    ),
    "nll_loss": Use(lambda x, **o: nll_loss(x, _indices(x), **o), _REDUCTIONS, *_ROWS),
    "binary_cross_entropy_with_logits": Use(
        lambda x, **o: binary_cross_entropy_with_logits(x, torch.zeros_like(x), **o), _REDUCTIONS, *_ELEMENTS
    ),
    "binary_cross_entropy": Use(lambda x, **o: binary_cross_entropy(x, torch.zeros_like(x), **o), _REDUCTIONS, *_ELEMENTS),
    "sigmoid_focal_loss": Use(lambda x, **o: sigmoid_focal_loss(x, torch.zeros_like(x), **o), _REDUCTIONS, *_ELEMENTS),
    "softmax": Use(softmax, ({"dim": 1},), *_ROWS),
    "log_softmax": Use(log_softmax, ({"dim": 1},), *_ROWS),
    "token_statistics": Use(lambda x, **o: token_statistics(x, _indices(x), **o), _STATISTICS, *_FLAT_ROWS),
    "linear_cross_entropy": Use(lambda x, **o: linear_cross_entropy(*_layer(x), _indices(x), **o), _REDUCTIONS, *_CHUNKS),
    "linear_token_statistics": Use(lambda x, **o: linear_token_statistics(*_layer(x), _indices(x), **o), _STATISTICS, *_CHUNKS),
}
"""By function; `smoothed_cross_entropy` is `cross_entropy` with label_smoothing, `soft_cross_entropy` with probabilities."""


class Call(NamedTuple):
    """Some of the calls, for one shape of the logits."""

    options: dict[str, Any]
    shape: Shape
    gradient: bool


def calls(use: Use, dtype: torch.dtype, shapes: Sequence[Shape] | None = None) -> list[Call]:
    """With gradients, foreseen and not, and without; for these shapes, or those that reach every version of a kernel on CPU."""
    found = [Call(o, shape, gradient) for shape in shapes or use.small for o in use.options for gradient in (False, True)]
    if shapes is None:
        # what is written past the caches is a gradient, or softmax; a sum's gradient is written by the kernels that write a mean's
        options = [o for o in use.options if o.get("reduction") != "sum"]
        found += [Call(o, _enlarged(shape, dtype), True) for shape in use.large for o in options]
    return found


def _enlarged(shape: Shape, dtype: torch.dtype) -> Shape:
    return -(-LARGE // (math.prod(shape[1:]) * dtype.itemsize)), *shape[1:]


def make(call: Call, use: Use, dtype: torch.dtype, device: torch.device) -> None:
    """Make the call, and its backward."""
    logits = torch.zeros(call.shape, dtype=dtype, device=device, requires_grad=call.gradient)
    answers = [t for t in each(use.call(logits, **call.options)) if t is not None and t.requires_grad]
    if answers:
        torch.autograd.backward(answers, [torch.ones_like(t) for t in answers])
