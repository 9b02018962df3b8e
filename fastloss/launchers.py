"""What a kernel package offers, with the kind of every argument of every launcher; `contract` holds each call against it.

`logits` is [N, C] or [B, C, P] with any strides; a *row* is one position, number b * P + p (N = B * P rows). Rows whose target equals
`ignore_index` are not rows: whatever their logits hold counts for nothing (kernels that take one row at a time do not read them), their
loss, row_weight and mass are 0, their gradient is written as zero. A target outside [0, C) that is not `ignore_index` is never used as an
index: on CPU IndexError, on CUDA the row's loss, row_weight, mass and gradient are NaN. `top` is the largest logit of a row, `total` the
sum of exp(x - top). Results are written whole, every element, exactly once; `dlogits` may be the memory of `logits`.
"""

from typing import Protocol

from .element_launchers import ElementKernels
from .kernels.groups import Smoothing
from .kinds import (
    AnswerResults,
    AnyIndices,
    ClassWeight,
    EntryIndices,
    EntryNumbers,
    EntryResults,
    FirstNumber,
    FloatResults,
    Floats,
    Gradient,
    IndexRowResults,
    IndexRows,
    Indices,
    KeptGradient,
    LastNumbers,
    LikeLogits,
    Logits,
    Numbers,
    OneNumber,
    OnlyGradient,
    Reduced,
    ReducedForeseen,
    RowGradient,
    RowNumbers,
    RowResults,
    SlopeNumbers,
    SmoothedRowResults,
    SmoothedRows,
    SoftRowResults,
    SoftRows,
    SomeEntryNumbers,
    TopRowResults,
    TopRows,
    Total,
    WeightAlone,
)


class Kernels(ElementKernels, Protocol):
    """What a kernel package offers. Launchers fill the results they are given and return None."""

    def cross_entropy_forward(
        self, logits: Logits, target: Indices, weight: ClassWeight, ignore_index: int, loss: RowResults, rows: IndexRowResults
    ) -> None:
        """row_weight = w_y; loss = w_y (log total - (x_y - top))."""

    def cross_entropy_backward(
        self, logits: Logits, target: Indices, ignore_index: int, rows: IndexRows, dloss: RowGradient, dlogits: Gradient
    ) -> None:
        """dlogits = dloss w_y (p - onehot(y)), p = exp(x - top) / total."""

    def cross_entropy_forward_backward(
        self,
        logits: Logits,
        target: Indices,
        weight: ClassWeight,
        ignore_index: int,
        dloss: RowGradient,
        loss: RowResults,
        rows: IndexRowResults,
        dlogits: Gradient,
    ) -> None:
        """What forward and backward compute, in one visit to the logits where that can be."""

    def reduced_cross_entropy_forward_backward(
        self,
        logits: Logits,
        target: Indices,
        weight: ClassWeight,
        ignore_index: int,
        reduction: Reduced,
        loss: RowResults,
        rows: IndexRowResults,
        dlogits: Gradient,
    ) -> None:
        """The same for the sum of all losses, or their mean, and its upstream gradient: with them, `sum_weights` and `sum_rows`."""

    def foreseen_cross_entropy_forward_backward(
        self,
        logits: Logits,
        target: Indices,
        weight: ClassWeight,
        ignore_index: int,
        foreseen: ReducedForeseen,
        loss: RowResults,
        rows: IndexRowResults,
        dlogits: KeptGradient,
    ) -> None:
        """The same for an upstream gradient that the host does not know. `dlogits` may stay as it is if none is foreseen."""

    def cross_entropy_repair(
        self,
        logits: Logits,
        target: Indices,
        ignore_index: int,
        rows: IndexRows,
        dloss: RowGradient,
        upstream: OneNumber,
        foreseen: LastNumbers,
        dlogits: KeptGradient,
    ) -> None:
        """After it: what `cross_entropy_backward` computes, if `upstream`, whose share `dloss` is, is not what was foreseen."""

    def smoothed_cross_entropy_forward(
        self,
        logits: Logits,
        target: Indices,
        weight: ClassWeight,
        ignore_index: int,
        smoothing: Smoothing,
        loss: RowResults,
        rows: SmoothedRowResults,
    ) -> None:
        """mass = keep w_y + spread sum(w); loss = keep w_y (-log p_y) + spread sum_c w_c (-log p_c); keep = 1 - eps, spread = eps / C."""

    def smoothed_cross_entropy_backward(
        self,
        logits: Logits,
        target: Indices,
        weight: ClassWeight,
        ignore_index: int,
        smoothing: Smoothing,
        rows: SmoothedRows,
        dloss: RowGradient,
        dlogits: Gradient,
    ) -> None:
        """dlogits = dloss (mass p - spread w - keep w_y onehot(y))."""

    def smoothed_cross_entropy_forward_backward(
        self,
        logits: Logits,
        target: Indices,
        weight: ClassWeight,
        ignore_index: int,
        smoothing: Smoothing,
        dloss: RowGradient,
        loss: RowResults,
        rows: SmoothedRowResults,
        dlogits: Gradient,
    ) -> None:
        """What forward and backward compute, in one visit to the logits where that can be."""

    def soft_cross_entropy_forward(
        self, logits: Logits, target: Floats, weight: ClassWeight, smoothing: Smoothing, loss: RowResults, rows: SoftRowResults
    ) -> None:
        """target q is shaped like logits, own dtype and strides. k_c = w_c (keep q_c + spread); mass = sum k; loss = sum k_c (-log p_c)."""

    def soft_cross_entropy_backward(
        self,
        logits: Logits,
        target: Floats,
        weight: ClassWeight,
        smoothing: Smoothing,
        rows: SoftRows,
        dloss: RowGradient,
        dlogits: Gradient,
    ) -> None:
        """dlogits = dloss (mass p - k)."""

    def soft_cross_entropy_forward_backward(
        self,
        logits: Logits,
        target: Floats,
        weight: ClassWeight,
        smoothing: Smoothing,
        dloss: RowGradient,
        loss: RowResults,
        rows: SoftRowResults,
        dlogits: Gradient,
    ) -> None:
        """What forward and backward compute, in one visit to the logits where that can be."""

    def soft_cross_entropy_target_backward(
        self, logits: Logits, weight: ClassWeight, keep: float, rows: SoftRows, dloss: RowGradient, dtarget: FloatResults
    ) -> None:
        """dtarget = dloss keep w_c (-log p_c)."""

    # Sparse soft targets: the entries of a row are classes y_k, -100 for one that counts for nothing, and their probabilities q_k. Rows
    # without entries are not rows unless spread is above 0; row_weight is 0 for these, else 1.

    def sparse_soft_cross_entropy_forward(
        self,
        logits: Logits,
        indices: EntryIndices,
        prob: EntryNumbers,
        weight: ClassWeight,
        smoothing: Smoothing,
        loss: RowResults,
        rows: SmoothedRowResults,
    ) -> None:
        """k_k = keep w_{y_k} q_k; mass = sum_k k_k + spread sum(w); loss = sum_k k_k (-log p_{y_k}) + spread sum_c w_c (-log p_c)."""

    def sparse_soft_cross_entropy_backward(
        self,
        logits: Logits,
        indices: EntryIndices,
        prob: EntryNumbers,
        weight: ClassWeight,
        smoothing: Smoothing,
        rows: SmoothedRows,
        dloss: RowGradient,
        dlogits: Gradient,
    ) -> None:
        """dlogits = dloss (mass p - spread w - sum_k k_k onehot(y_k))."""

    def sparse_soft_cross_entropy_forward_backward(
        self,
        logits: Logits,
        indices: EntryIndices,
        prob: EntryNumbers,
        weight: ClassWeight,
        smoothing: Smoothing,
        dloss: RowGradient,
        loss: RowResults,
        rows: SmoothedRowResults,
        dlogits: Gradient,
    ) -> None:
        """What forward and backward compute, in one visit to the logits where that can be."""

    def sparse_soft_cross_entropy_prob_backward(
        self,
        logits: Logits,
        indices: EntryIndices,
        weight: ClassWeight,
        keep: float,
        rows: SmoothedRows,
        dloss: RowGradient,
        dprob: EntryResults,
    ) -> None:
        """dprob_k = dloss keep w_{y_k} (-log p_{y_k}), 0 for an entry that counts for nothing."""

    def softmax_forward(self, logits: Logits, prob: FloatResults) -> None:
        """prob = exp(x - top) / total, shaped like logits."""

    def softmax_backward(self, prob: Logits, dprob: LikeLogits, dlogits: FloatResults) -> None:
        """dlogits = p (dp - sum_c dp_c p_c)."""

    def log_softmax_forward(self, logits: Logits, log_prob: FloatResults) -> None:
        """log_prob = (x - top) - log total, shaped like logits."""

    def log_softmax_backward(self, log_prob: Logits, dlog_prob: LikeLogits, dlogits: FloatResults) -> None:
        """dlogits = d - p sum_c d_c, p = exp(log_prob)."""

    def nll_loss_forward(
        self, log_prob: Logits, target: Indices, weight: ClassWeight, ignore_index: int, loss: RowResults, row_weight: RowResults
    ) -> None:
        """row_weight = w_y; loss = -w_y log_prob_y. log_prob is shaped like logits."""

    def nll_loss_backward(
        self, target: Indices, ignore_index: int, row_weight: RowNumbers, dloss: RowGradient, dlog_prob: OnlyGradient
    ) -> None:
        """dlog_prob = -dloss w_y onehot(y)."""

    def token_statistics_forward(
        self, logits: Logits, target: EntryIndices, ignore_index: int, logit_scale: float, answers: AnswerResults, rows: TopRowResults
    ) -> None:
        """With z = logit_scale x, p = softmax(z): log_prob = log p at the K targets of each row, entropy = -sum p log p,
        lse = log sum exp(z), sum_sq_prob = sum p^2, argmax, the first largest (NaN before all); those without elements are not wanted.
        0 for a target that is `ignore_index`; a row of nothing else is no row, its total is 0. `top` is that of x,
        `total` = sum exp(z - logit_scale top)."""

    def token_statistics_backward(
        self,
        logits: Logits,
        target: EntryIndices,
        ignore_index: int,
        logit_scale: float,
        rows: TopRows,
        slope: SlopeNumbers,
        dlog_prob: SomeEntryNumbers,
        dlogits: Gradient,
    ) -> None:
        """dlogits = logit_scale (p (alpha - sum_k d_k + beta log p + gamma p) + sum_k d_k onehot(y_k)), d = dlog_prob."""

    def sum_rows(self, values: Numbers, total: Total) -> None:
        """total [1] = the sum of values [N] (compute dtype), accumulated in float64 in one fixed order."""

    def mean_of_rows(self, values: Numbers, weights: RowNumbers, divisor: Total, mean: Total) -> None:
        """divisor [1] = the sum of weights [N]; mean [1] = the sum of values [N] over it. Sums as in `sum_rows`, to the same bits."""

    def divide(self, total: FirstNumber, divisor: OneNumber, result: Total) -> None:
        """result [1] = total / divisor."""

    def sum_weights(self, target: AnyIndices, weight: WeightAlone, ignore_index: int, total: Total) -> None:
        """total [1] = the sum of row_weight, to the same bits, from the targets alone. A target that is no class counts for nothing on
        CPU, makes the sum NaN on CUDA."""
