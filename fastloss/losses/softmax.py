"""softmax and log_softmax along any dimension. Both save their result only, so the logits may be freed or edited before the backward."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import rows
from ..backends import kernels_for
from ..loss import COMPUTE, Loss, Spec, Worth, compute_dtype
from ..memory import empty_like


class Tensors(NamedTuple):
    input: Tensor  # logits of any shape


class Options(NamedTuple):
    dim: int  # not negative
    dtype: torch.dtype  # of the result: one that `input` is computed with in
    input_dtype: torch.dtype  # of what is not saved


class Results(NamedTuple):
    result: Tensor


Saved = Results


class Softmax(Loss[Tensors, Options, Saved]):
    """p = exp(input) / sum of exp(input), or its logarithm."""

    tensors, options, results, saved = Tensors, Options, Results, Saved
    worth = Worth(2.6, 0.4, few=1 / 100, half=1.0)

    def misfit(self, t: Tensors, o: Options) -> str | None:
        if not 0 <= o.dim < t.input.dim():
            return f"dim {o.dim} is not a dimension of logits of shape {tuple(t.input.shape)}"
        fits = COMPUTE.get(o.dtype) == COMPUTE.get(o.input_dtype) == compute_dtype(t.input)
        return None if fits else f"the result is {o.dtype}, logits are {o.input_dtype}"

    def outputs(self, t: Tensors, o: Options) -> tuple[Spec, ...]:
        return (Spec(tuple(t.input.shape), o.dtype),)

    def definition(self, t: Tensors, o: Options) -> Tensor:
        return torch.log_softmax(t.input, o.dim) if self.name == "log_softmax" else torch.softmax(t.input, o.dim)

    def forward(self, t: Tensors, o: Options) -> tuple[Tensor, ...]:
        (result,) = self.allocate(t, o)
        logits, written, kernels = rows.as_rows(t.input, o.dim), rows.as_rows(result, o.dim), kernels_for(t.input)
        (kernels.log_softmax_forward if self.name == "log_softmax" else kernels.softmax_forward)(logits, written)
        return (result,)

    def backward(self, dloss: Tensor, s: Saved, o: Options, needed: tuple[bool, ...], result: Tensor | None) -> tuple[Tensor | None, ...]:
        dinput, kernels = empty_like(s.result, o.input_dtype), kernels_for(s.result)
        found, upstream, written = (rows.as_rows(t, o.dim) for t in (s.result, dloss, dinput))
        (kernels.log_softmax_backward if self.name == "log_softmax" else kernels.softmax_backward)(found, upstream, written)
        return (rows.settle(dinput, written),)

    def gradient_spec(self, s: Saved, o: Options, which: int) -> Spec:
        return Spec(tuple(s.result.shape), o.input_dtype, s.result)

    def given(self, s: Saved) -> Tensors:
        return Tensors(s.result)  # like the logits, of which nothing was saved

    def gradient(self, dloss: Tensor, s: Saved, o: Options, needed: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        """By the formula, in which the result stands for the logits."""
        with torch.enable_grad():
            d, found = (t.to(compute_dtype(t)) for t in (dloss, s.result))
            if self.name == "log_softmax":
                gradient = d - found.exp() * d.sum(o.dim, keepdim=True)
            else:
                gradient = found * (d - (d * found).sum(o.dim, keepdim=True))
        return (gradient.to(o.input_dtype),)


softmax = Softmax("softmax")
log_softmax = Softmax("log_softmax")
log_softmax.worth = Worth(0.9, 0.4, few=1 / 35, half=1.0)  # whose backward torch computes an exp for, too
