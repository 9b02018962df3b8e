"""The launchers of losses over single numbers, as `launchers` has those of losses over rows.

Elements are [A, B, P], all of one shape, each with its own strides (0 where it is broadcast). dlogits and dprob have the dtype of logits
and prob; all others each have a dtype of their own that is computed with in the same.
"""

from typing import Annotated, Protocol

from torch import Tensor

from .kernels.groups import Focus
from .kinds import Facts, FloatResults, Floats, Gradient, Kind, Total
from .storage import is_in_its_storage


class _Elements(Kind):
    rule = "[A, B, P] of float32, float64, bfloat16 or float16"

    def facts(self, t: Tensor) -> Facts | None:
        return Facts(t, 0, 0) if t.dim() == 3 else None

    def fits(self, t: Tensor, f: Facts) -> bool:
        return f.compute is not None and is_in_its_storage(t)


Elements = Annotated[Tensor, _Elements()]


class ElementKernels(Protocol):
    """What a kernel package offers for them."""

    def bce_with_logits_forward(self, logits: Elements, target: Floats, weight: Floats, pos_weight: Floats, loss: FloatResults) -> None:
        """loss = w ((1 - y) x + (1 + (pos_weight - 1) y) softplus(-x)), softplus(-x) = log1p(exp(-|x|)) + max(-x, 0)."""

    def bce_with_logits_sum(self, logits: Elements, target: Floats, weight: Floats, pos_weight: Floats, count: int, total: Total) -> None:
        """total [1] = the sum of these losses, in one fixed order, over `count`."""

    def bce_with_logits_backward(
        self,
        logits: Elements,
        target: Floats,
        weight: Floats,
        pos_weight: Floats,
        dloss: Floats,
        dlogits: Gradient,
    ) -> None:
        """dlogits = dloss w ((1 - y) - (1 + (pos_weight - 1) y) sigmoid(-x))."""

    def bce_with_logits_sum_backward(
        self,
        logits: Elements,
        target: Floats,
        weight: Floats,
        pos_weight: Floats,
        dloss: Floats,
        count: int,
        total: Total,
        dlogits: Gradient,
    ) -> None:
        """What sum and backward compute, in one visit where that can be."""

    def binary_cross_entropy_forward(self, prob: Elements, target: Floats, weight: Floats, loss: FloatResults) -> None:
        """loss = -w (y max(log p, -100) + (1 - y) max(log(1 - p), -100))."""

    def binary_cross_entropy_sum(self, prob: Elements, target: Floats, weight: Floats, count: int, total: Total) -> None:
        """total [1] = the sum of these losses, in one fixed order, over `count`."""

    def binary_cross_entropy_backward(self, prob: Elements, target: Floats, weight: Floats, dloss: Floats, dprob: Gradient) -> None:
        """dprob = dloss w (p - y) / max((1 - p) p, 1e-12)."""

    def binary_cross_entropy_sum_backward(
        self, prob: Elements, target: Floats, weight: Floats, dloss: Floats, count: int, total: Total, dprob: Gradient
    ) -> None:
        """What sum and backward compute, in one visit where that can be."""

    def sigmoid_focal_loss_forward(self, logits: Elements, target: Floats, focus: Focus, loss: FloatResults) -> None:
        """loss = a q^gamma bce, a = positive y + negative (1 - y), q = y sigmoid(-x) + (1 - y) sigmoid(x),
        bce = (1 - y) x + softplus(-x)."""

    def sigmoid_focal_loss_sum(self, logits: Elements, target: Floats, focus: Focus, count: int, total: Total) -> None:
        """total [1] = the sum of these losses, in one fixed order, over `count`."""

    def sigmoid_focal_loss_backward(self, logits: Elements, target: Floats, focus: Focus, dloss: Floats, dlogits: Gradient) -> None:
        """dlogits = dloss a q^gamma ((sigmoid(x) - y) + gamma (1 - 2 y) sigmoid(x) sigmoid(-x) / q bce)."""

    def sigmoid_focal_loss_sum_backward(
        self, logits: Elements, target: Floats, focus: Focus, dloss: Floats, count: int, total: Total, dlogits: Gradient
    ) -> None:
        """What sum and backward compute, in one visit where that can be."""
