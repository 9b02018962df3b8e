"""Sigmoid focal loss: the cross-entropy of each element, times how wrong it is to the power gamma. With p = sigmoid(x)

    loss = (alpha y + (1 - alpha) (1 - y)) (1 - p_t)^gamma ((1 - y) x + softplus(-x)),    p_t = p y + (1 - p) (1 - y)

without the first factor if alpha is negative; 'mean' divides by the number of elements.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import elementwise_misfit
from ..backends import kernels_for
from ..elements import as_elements, count_of, element_gradient, gradient_ahead, loss_spec, place_of_total, put_total
from ..kernels.groups import Focus
from ..loss import Loss, Spec, Worth, reduced
from ..memory import empty_like
from ..rows import settle


class Tensors(NamedTuple):
    input: Tensor  # logits x of any shape
    target: Tensor  # y, shape of `input`, of a dtype that is computed with as `input` is


class Options(NamedTuple):
    alpha: float
    gamma: float
    reduction: str
    dtype: torch.dtype  # of the loss


class Results(NamedTuple):
    loss: Tensor


Saved = Tensors


class SigmoidFocalLoss(Loss[Tensors, Options, Saved]):
    tensors, options, results, saved = Tensors, Options, Results, Saved
    typed_by = 0, 1
    worth = Worth(0.001, 0.001, few=1.0)  # the composition is many operations
    one_visit = 1

    def misfit(self, t: Tensors, o: Options) -> str | None:
        if not isinstance(o.alpha, (float, int)) or not isinstance(o.gamma, (float, int)) or not 0 <= o.gamma <= 64:
            return f"alpha is {o.alpha!r}, gamma is {o.gamma!r}"
        return elementwise_misfit(t.input, t.target)

    def outputs(self, t: Tensors, o: Options) -> tuple[Spec, ...]:
        return (loss_spec(t.input, o.reduction, o.dtype),)

    def definition(self, t: Tensors, o: Options) -> Tensor:
        x, y = t.input, t.target
        wrong = y * torch.sigmoid(-x) + (1 - y) * torch.sigmoid(x)  # 1 - p_t, without its rounding
        loss = ((1 - y) * x - torch.nn.functional.logsigmoid(x)) * wrong**o.gamma
        return reduced(loss * (o.alpha * y + (1 - o.alpha) * (1 - y)) if o.alpha >= 0 else loss, None, o.reduction)

    def forward(self, t: Tensors, o: Options) -> tuple[Tensor, ...]:
        (loss,) = self.allocate(t, o)
        if o.reduction == "none":
            x, y, written = as_elements(*t, loss)
            kernels_for(x).sigmoid_focal_loss_forward(x, y, _focus(o), written)
            return (settle(loss, written),)
        x, y = as_elements(*t)
        count, total = count_of(t.input, o.reduction), place_of_total(loss, t.input)
        kernels_for(x).sigmoid_focal_loss_sum(x, y, _focus(o), count, total)
        put_total(total, loss)
        return (loss,)

    def forward_backward(
        self, dloss: float, t: Tensors, o: Options, needed: tuple[bool, ...]
    ) -> tuple[tuple[Tensor | None, ...], tuple[Tensor, ...]]:
        (loss,), dinput = self.allocate(t, o), empty_like(t.input)
        count, total = count_of(t.input, o.reduction), place_of_total(loss, t.input)
        x, y, written = as_elements(*t, dinput)
        g = gradient_ahead(dloss, o.reduction, o.dtype, x)
        kernels_for(x).sigmoid_focal_loss_sum_backward(x, y, _focus(o), g, count, total, written)
        put_total(total, loss)
        return (settle(dinput, written),), (loss,)

    def backward(self, dloss: Tensor, s: Saved, o: Options, needed: tuple[bool, ...], result: Tensor | None) -> tuple[Tensor | None, ...]:
        dinput = empty_like(s.input)
        x, y, g, written = as_elements(*s, element_gradient(dloss, o.reduction, s.input), dinput)
        kernels_for(x).sigmoid_focal_loss_backward(x, y, _focus(o), g, written)
        return (settle(dinput, written),)


def _focus(o: Options) -> Focus:
    return Focus(o.alpha, 1 - o.alpha, o.gamma) if o.alpha >= 0 else Focus(1.0, 1.0, o.gamma)


sigmoid_focal_loss = SigmoidFocalLoss("sigmoid_focal_loss")
