"""Sigmoid cross-entropy: w ((1 - y) x + (1 + (pos_weight - 1) y) softplus(-x)) of each element; 'mean' divides by their number."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import elementwise_misfit
from ..backends import kernels_for
from ..elements import as_elements, computed, count_of, element_gradient, gradient_ahead, loss_spec, place_of_total, put_total
from ..loss import Loss, Spec, Worth, reduced
from ..memory import empty_like
from ..rows import settle


class Tensors(NamedTuple):
    input: Tensor  # logits x of any shape
    target: Tensor  # y, shape of `input`, of a dtype that is computed with as `input` is
    weight: Tensor | None  # w, broadcastable to `input`
    pos_weight: Tensor | None  # broadcastable to `input`


class Options(NamedTuple):
    reduction: str
    dtype: torch.dtype  # of the loss


class Results(NamedTuple):
    loss: Tensor


Saved = Tensors


class BCEWithLogits(Loss[Tensors, Options, Saved]):
    tensors, options, results, saved = Tensors, Options, Results, Saved
    typed_by = (1,)  # torch computes in the target's memory
    worth = Worth(0.028, 0.01, few=1.0)  # torch takes several visits
    one_visit = 1

    def misfit(self, t: Tensors, o: Options) -> str | None:
        return elementwise_misfit(t.input, t.target, t.weight, t.pos_weight)

    def outputs(self, t: Tensors, o: Options) -> tuple[Spec, ...]:
        return (loss_spec(t.target, o.reduction, o.dtype),)

    def definition(self, t: Tensors, o: Options) -> Tensor:
        log_weight = 1.0 if t.pos_weight is None else 1 + (t.pos_weight - 1) * t.target
        loss = (1 - t.target) * t.input - log_weight * torch.nn.functional.logsigmoid(t.input)
        return reduced(loss if t.weight is None else loss * t.weight, None, o.reduction)

    def forward(self, t: Tensors, o: Options) -> tuple[Tensor, ...]:
        (loss,) = self.allocate(t, o)
        if o.reduction == "none":
            x, y, w, pos, written = as_elements(*t, loss)
            kernels_for(x).bce_with_logits_forward(x, y, computed(w, x), computed(pos, x), written)
            return (settle(loss, written),)
        x, y, w, pos = as_elements(*t)
        count, total = count_of(t.input, o.reduction), place_of_total(loss, t.input)
        kernels_for(x).bce_with_logits_sum(x, y, computed(w, x), computed(pos, x), count, total)
        put_total(total, loss)
        return (loss,)

    def forward_backward(
        self, dloss: float, t: Tensors, o: Options, needed: tuple[bool, ...]
    ) -> tuple[tuple[Tensor | None, ...], tuple[Tensor, ...]]:
        (loss,), dinput = self.allocate(t, o), empty_like(t.input)
        count, total = count_of(t.input, o.reduction), place_of_total(loss, t.input)
        x, y, w, pos, written = as_elements(*t, dinput)
        g = gradient_ahead(dloss, o.reduction, o.dtype, x)
        kernels_for(x).bce_with_logits_sum_backward(x, y, computed(w, x), computed(pos, x), g, count, total, written)
        put_total(total, loss)
        return (settle(dinput, written),), (loss,)

    def backward(self, dloss: Tensor, s: Saved, o: Options, needed: tuple[bool, ...], result: Tensor | None) -> tuple[Tensor | None, ...]:
        dinput = empty_like(s.input)
        x, y, w, pos, g, written = as_elements(*s, element_gradient(dloss, o.reduction, s.input), dinput)
        kernels_for(x).bce_with_logits_backward(x, y, computed(w, x), computed(pos, x), g, written)
        return (settle(dinput, written),)


bce_with_logits = BCEWithLogits("bce_with_logits")
