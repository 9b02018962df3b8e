"""The launchers of losses over single numbers, as `launchers` has those of losses over rows.

Elements are [A, B, P], all of one shape, each with its own strides (0 where it is broadcast). logits, prob, target, dlogits and dprob are
in the logits' dtype; weight, pos_weight, loss and dloss in the compute dtype.
"""

from typing import Annotated, Protocol

from torch import Tensor

from .kernels.groups import Focus
from .kinds import Facts, Gradient, Kind, LikeLogits, Total
from .storage import is_in_its_storage


class _Elements(Kind):
    rule = "[A, B, P] of float32, float64, bfloat16 or float16"

    def facts(self, t: Tensor) -> Facts | None:
        return Facts(t, 0, 0) if t.dim() == 3 else None

    def fits(self, t: Tensor, f: Facts) -> bool:
        return f.compute is not None and is_in_its_storage(t)


class _ElementNumbers(Kind):
    rule = "shape of the logits, compute dtype"

    def fits(self, t: Tensor, f: Facts) -> bool:
        return t.shape == f.shape and t.dtype is f.compute and is_in_its_storage(t)


class _ElementResults(_ElementNumbers):
    written = ours = True


Elements = Annotated[Tensor, _Elements()]
ElementNumbers = Annotated[Tensor, _ElementNumbers()]
ElementResults = Annotated[Tensor, _ElementResults()]


class ElementKernels(Protocol):
    """What a kernel package offers for them."""

    def bce_with_logits_forward(
        self, logits: Elements, target: LikeLogits, weight: ElementNumbers, pos_weight: ElementNumbers, loss: ElementResults
    ) -> None:
        """loss = w ((1 - y) x + (1 + (pos_weight - 1) y) softplus(-x)), softplus(-x) = log1p(exp(-|x|)) + max(-x, 0)."""

    def bce_with_logits_sum(
        self, logits: Elements, target: LikeLogits, weight: ElementNumbers, pos_weight: ElementNumbers, total: Total
    ) -> None:
        """total [1] = the sum of these losses, in one fixed order."""

    def bce_with_logits_backward(
        self,
        logits: Elements,
        target: LikeLogits,
        weight: ElementNumbers,
        pos_weight: ElementNumbers,
        dloss: ElementNumbers,
        dlogits: Gradient,
    ) -> None:
        """dlogits = dloss w ((1 - y) - (1 + (pos_weight - 1) y) sigmoid(-x))."""

    def bce_with_logits_sum_backward(
        self,
        logits: Elements,
        target: LikeLogits,
        weight: ElementNumbers,
        pos_weight: ElementNumbers,
        dloss: ElementNumbers,
        total: Total,
        dlogits: Gradient,
    ) -> None:
        """What sum and backward compute, in one visit where that can be."""

    def binary_cross_entropy_forward(self, prob: Elements, target: LikeLogits, weight: ElementNumbers, loss: ElementResults) -> None:
        """loss = -w (y max(log p, -100) + (1 - y) max(log(1 - p), -100))."""

    def binary_cross_entropy_sum(self, prob: Elements, target: LikeLogits, weight: ElementNumbers, total: Total) -> None:
        """total [1] = the sum of these losses, in one fixed order."""

    def binary_cross_entropy_backward(
        self, prob: Elements, target: LikeLogits, weight: ElementNumbers, dloss: ElementNumbers, dprob: Gradient
    ) -> None:
        """dprob = dloss w (p - y) / max((1 - p) p, 1e-12)."""

    def binary_cross_entropy_sum_backward(
        self, prob: Elements, target: LikeLogits, weight: ElementNumbers, dloss: ElementNumbers, total: Total, dprob: Gradient
    ) -> None:
        """What sum and backward compute, in one visit where that can be."""

    def sigmoid_focal_loss_forward(self, logits: Elements, target: LikeLogits, focus: Focus, loss: ElementResults) -> None:
        """loss = a q^gamma bce, a = positive y + negative (1 - y), q = y sigmoid(-x) + (1 - y) sigmoid(x),
        bce = (1 - y) x + softplus(-x)."""

    def sigmoid_focal_loss_sum(self, logits: Elements, target: LikeLogits, focus: Focus, total: Total) -> None:
        """total [1] = the sum of these losses, in one fixed order."""

    def sigmoid_focal_loss_backward(
        self, logits: Elements, target: LikeLogits, focus: Focus, dloss: ElementNumbers, dlogits: Gradient
    ) -> None:
        """dlogits = dloss a q^gamma ((sigmoid(x) - y) + gamma (1 - 2 y) sigmoid(x) sigmoid(-x) / q bce)."""

    def sigmoid_focal_loss_sum_backward(
        self, logits: Elements, target: LikeLogits, focus: Focus, dloss: ElementNumbers, total: Total, dlogits: Gradient
    ) -> None:
        """What sum and backward compute, in one visit where that can be."""
