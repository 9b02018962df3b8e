"""Cross-entropy of probabilities: -w (y log p + (1 - y) log(1 - p)) of each element, no logarithm below -100; 'mean' divides by their
number."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import autocast_is_active, dtype_misfit, elementwise_misfit
from ..backends import kernels_for
from ..elements import as_elements, computed, count_of, element_gradient, gradient_ahead, loss_spec, place_of_total, put_total
from ..loss import Loss, Spec, Worth, compute_dtype, reduced
from ..memory import empty_like
from ..rows import settle

_EPSILON = 1e-12  # torch's: no denominator is smaller


class Tensors(NamedTuple):
    input: Tensor  # probabilities p of any shape
    target: Tensor  # y, shape of `input`, of a dtype that is computed with as `input` is
    weight: Tensor | None  # w, broadcastable to `input`


class Options(NamedTuple):
    reduction: str
    dtype: torch.dtype  # of the loss


class Results(NamedTuple):
    loss: Tensor


Saved = Tensors


class BinaryCrossEntropy(Loss[Tensors, Options, Saved]):
    tensors, options, results, saved = Tensors, Options, Results, Saved
    worth = Worth(0.006, 0.0025, few=1.0)  # torch takes two logarithms, one by one
    one_visit = 1

    def misfit(self, t: Tensors, o: Options) -> str | None:
        return elementwise_misfit(t.input, t.target, t.weight)

    def mixture_misfit(self, t: Tensors) -> str | None:
        if not autocast_is_active(t.input):
            return dtype_misfit(t.input, "target", t.target)
        return None if t.input.is_cpu else "autocast is active"  # elsewhere torch refuses whatever comes

    def outputs(self, t: Tensors, o: Options) -> tuple[Spec, ...]:
        return (loss_spec(t.input, o.reduction, o.dtype),)

    def definition(self, t: Tensors, o: Options) -> Tensor:
        loss = (t.target - 1) * torch.log1p(-t.input).clamp(min=-100) - t.target * torch.log(t.input).clamp(min=-100)
        return reduced(loss if t.weight is None else loss * t.weight, None, o.reduction)

    def forward(self, t: Tensors, o: Options) -> tuple[Tensor, ...]:
        (loss,) = self.allocate(t, o)
        if o.reduction == "none":
            p, y, w, written = as_elements(*t, loss)
            kernels_for(p).binary_cross_entropy_forward(p, y, computed(w, p), written)
            return (settle(loss, written),)
        p, y, w = as_elements(*t)
        count, total = count_of(t.input, o.reduction), place_of_total(loss, t.input)
        kernels_for(p).binary_cross_entropy_sum(p, y, computed(w, p), count, total)
        put_total(total, loss)
        return (loss,)

    def forward_backward(
        self, dloss: float, t: Tensors, o: Options, needed: tuple[bool, ...]
    ) -> tuple[tuple[Tensor | None, ...], tuple[Tensor, ...]]:
        (loss,), dinput = self.allocate(t, o), empty_like(t.input)
        count, total = count_of(t.input, o.reduction), place_of_total(loss, t.input)
        p, y, w, written = as_elements(*t, dinput)
        g = gradient_ahead(dloss, o.reduction, o.dtype, p)
        kernels_for(p).binary_cross_entropy_sum_backward(p, y, computed(w, p), g, count, total, written)
        put_total(total, loss)
        return (settle(dinput, written),), (loss,)

    def backward(self, dloss: Tensor, s: Saved, o: Options, needed: tuple[bool, ...], result: Tensor | None) -> tuple[Tensor | None, ...]:
        dinput = empty_like(s.input)
        p, y, w, g, written = as_elements(*s, element_gradient(dloss, o.reduction, s.input), dinput)
        kernels_for(p).binary_cross_entropy_backward(p, y, computed(w, p), g, written)
        return (settle(dinput, written),)

    def gradient(self, dloss: Tensor, s: Saved, o: Options, needed: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        """The kernel's number, and derivatives that stay finite, as torch's do: the definition has 0 times infinity where p is 0 or 1."""
        with torch.enable_grad():
            p, y, g = (t.to(compute_dtype(t)) for t in (s.input, s.target, dloss))
            d = (1 - y) / (1 - p + _EPSILON) - y / (p + _EPSILON)
            d = g * (d + ((p - y) / (p * (1 - p)).clamp(min=_EPSILON) - d).detach())
            if s.weight is not None:
                d = d * s.weight.to(compute_dtype(s.weight))
            if o.reduction == "mean":
                d = d / s.input.numel()
        return (d.to(s.input.dtype),)


binary_cross_entropy = BinaryCrossEntropy("binary_cross_entropy")
