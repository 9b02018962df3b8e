"""torch.nn's modules with our forward: what they are, print, save and load is torch's."""

import math
from typing import Any

import torch
from torch import Tensor

from . import functional, linear, probabilities, sparse_targets


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss, computed by `fastloss.cross_entropy`.

    >>> loss = CrossEntropyLoss(label_smoothing=0.1)
    >>> loss(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([2]))
    tensor(0.5076)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class SparseSoftCrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """`fastloss.sparse_soft_cross_entropy` with the arguments of torch.nn.CrossEntropyLoss, of which `ignore_index` is always -100.

    >>> loss = SparseSoftCrossEntropyLoss(label_smoothing=0.1)
    >>> loss(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[2, 0]]), torch.tensor([0.7, 0.3]))
    tensor(1.0476)
    """

    def __init__(self, weight: Tensor | None = None, *, reduction: str = "mean", label_smoothing: float = 0.0) -> None:
        super().__init__(weight, reduction=reduction, label_smoothing=label_smoothing)

    def forward(self, input: Tensor, indices: Tensor, probabilities: Tensor) -> Tensor:  # type: ignore[override]
        return sparse_targets.sparse_soft_cross_entropy(
            input, indices, probabilities, self.weight, reduction=self.reduction, label_smoothing=self.label_smoothing
        )


class NLLLoss(torch.nn.NLLLoss):
    """torch.nn.NLLLoss, computed by `fastloss.nll_loss`.

    >>> NLLLoss()(LogSoftmax(dim=1)(torch.tensor([[1.0, 2.0, 3.0]])), torch.tensor([2]))
    tensor(0.4076)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.nll_loss(input, target, weight=self.weight, ignore_index=self.ignore_index, reduction=self.reduction)


class BCEWithLogitsLoss(torch.nn.BCEWithLogitsLoss):
    """torch.nn.BCEWithLogitsLoss, computed by `fastloss.binary_cross_entropy_with_logits`.

    >>> BCEWithLogitsLoss()(torch.tensor([5.0, 8.0]), torch.tensor([0.0, 1.0]))
    tensor(2.5035)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(input, target, self.weight, pos_weight=self.pos_weight, reduction=self.reduction)


class BCELoss(torch.nn.BCELoss):
    """torch.nn.BCELoss, computed by `fastloss.binary_cross_entropy`.

    >>> BCELoss()(torch.tensor([0.5, 0.5]), torch.tensor([0.0, 1.0]))
    tensor(0.6931)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.binary_cross_entropy(input, target, weight=self.weight, reduction=self.reduction)


class Softmax(torch.nn.Softmax):
    """torch.nn.Softmax, computed by `fastloss.softmax`.

    >>> Softmax(dim=0)(torch.tensor([1.0, 2.0, 3.0]))
    tensor([0.0900, 0.2447, 0.6652])
    """

    def forward(self, input: Tensor) -> Tensor:
        return probabilities.softmax(input, self.dim, _stacklevel=5)


class LogSoftmax(torch.nn.LogSoftmax):
    """torch.nn.LogSoftmax, computed by `fastloss.log_softmax`.

    >>> LogSoftmax(dim=0)(torch.tensor([1.0, 2.0, 3.0]))
    tensor([-2.4076, -1.4076, -0.4076])
    """

    def forward(self, input: Tensor) -> Tensor:
        return probabilities.log_softmax(input, self.dim, _stacklevel=5)


class _LinearCrossEntropyLoss(torch.nn.modules.loss._WeightedLoss):
    """torch.nn.LinearCrossEntropyLoss for torch before 2.13, which has none."""

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
    ) -> None:
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(f"expected weight shape to be {(num_classes,)}, got {tuple(weight.shape)}")
        if label_smoothing < 0 or label_smoothing > 1.0:
            raise RuntimeError(f"expected label_smoothing to be in range [0, 1], got {label_smoothing}")
        super().__init__(weight=weight, reduction=reduction)
        self.num_classes, self.out_features = num_classes, out_features
        self.ignore_index, self.label_smoothing, self.options = ignore_index, label_smoothing, options
        self.linear = torch.nn.Linear(in_features, math.prod(out_features, start=num_classes), bias=bias, device=device, dtype=dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.linear.in_features}, num_classes={self.num_classes}, out_features={self.out_features}, "
            f"bias={self.linear.bias is not None}, reduction={self.reduction}, ignore_index={self.ignore_index}, "
            f"label_smoothing={self.label_smoothing}, options={self.options}"
        )


_LinearBase: Any = getattr(torch.nn, "LinearCrossEntropyLoss", _LinearCrossEntropyLoss)


class LinearCrossEntropyLoss(_LinearBase):  # type: ignore[misc]
    """torch.nn.LinearCrossEntropyLoss, the last linear layer and its cross-entropy, computed by `fastloss.linear_cross_entropy`.

    >>> loss = LinearCrossEntropyLoss(4, 1000, bias=True)
    >>> loss(torch.randn(8, 4), torch.randint(1000, (8,))).shape
    torch.Size([])
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        linear_weight, linear_bias = self.linear.weight, self.linear.bias
        if self.out_features:
            linear_weight = linear_weight.reshape(self.num_classes, *self.out_features, -1)
            linear_bias = None if linear_bias is None else linear_bias.reshape(self.num_classes, *self.out_features)
        return linear.linear_cross_entropy(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
        )
