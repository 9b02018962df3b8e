"""torch.nn's modules with our forward: what they are, print, save and load is torch's."""

import torch
from torch import Tensor

from . import functional, sparse_targets


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
        return functional.softmax(input, self.dim, _stacklevel=5)


class LogSoftmax(torch.nn.LogSoftmax):
    """torch.nn.LogSoftmax, computed by `fastloss.log_softmax`.

    >>> LogSoftmax(dim=0)(torch.tensor([1.0, 2.0, 3.0]))
    tensor([-2.4076, -1.4076, -0.4076])
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.log_softmax(input, self.dim, _stacklevel=5)
