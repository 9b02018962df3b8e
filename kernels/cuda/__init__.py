"""The kernels in Triton, twins of those in `fastloss.kernels.cpu`. Each launcher fills the buffers it is given and returns None;
what they compute and what their arguments mean is written once, in `fastloss.launchers.Kernels`."""

from .bce_with_logits import (
    bce_with_logits_backward,
    bce_with_logits_forward,
    bce_with_logits_sum,
    bce_with_logits_sum_backward,
)
from .binary_cross_entropy import (
    binary_cross_entropy_backward,
    binary_cross_entropy_forward,
    binary_cross_entropy_sum,
    binary_cross_entropy_sum_backward,
)
from .cross_entropy import cross_entropy_backward, cross_entropy_forward
from .cross_entropy_one_visit import (
    cross_entropy_forward_backward,
    cross_entropy_repair,
    foreseen_cross_entropy_forward_backward,
    reduced_cross_entropy_forward_backward,
)
from .nll_loss import nll_loss_backward, nll_loss_forward, sum_weights
from .reduction import divide, mean_of_rows, sum_rows
from .sigmoid_focal_loss import (
    sigmoid_focal_loss_backward,
    sigmoid_focal_loss_forward,
    sigmoid_focal_loss_sum,
    sigmoid_focal_loss_sum_backward,
)
from .smoothed_cross_entropy import (
    smoothed_cross_entropy_backward,
    smoothed_cross_entropy_forward,
    smoothed_cross_entropy_forward_backward,
)
from .soft_cross_entropy import (
    soft_cross_entropy_backward,
    soft_cross_entropy_forward,
    soft_cross_entropy_forward_backward,
    soft_cross_entropy_target_backward,
)
from .softmax import log_softmax_backward, log_softmax_forward, softmax_backward, softmax_forward
from .sparse_soft_cross_entropy import (
    sparse_soft_cross_entropy_backward,
    sparse_soft_cross_entropy_forward,
    sparse_soft_cross_entropy_forward_backward,
    sparse_soft_cross_entropy_prob_backward,
)
from .token_statistics import token_statistics_backward, token_statistics_forward

__all__ = [
    "bce_with_logits_backward",
    "bce_with_logits_forward",
    "bce_with_logits_sum",
    "bce_with_logits_sum_backward",
    "binary_cross_entropy_backward",
    "binary_cross_entropy_forward",
    "binary_cross_entropy_sum",
    "binary_cross_entropy_sum_backward",
    "cross_entropy_backward",
    "cross_entropy_forward",
    "cross_entropy_forward_backward",
    "cross_entropy_repair",
    "divide",
    "foreseen_cross_entropy_forward_backward",
    "log_softmax_backward",
    "log_softmax_forward",
    "mean_of_rows",
    "nll_loss_backward",
    "nll_loss_forward",
    "reduced_cross_entropy_forward_backward",
    "sigmoid_focal_loss_backward",
    "sigmoid_focal_loss_forward",
    "sigmoid_focal_loss_sum",
    "sigmoid_focal_loss_sum_backward",
    "smoothed_cross_entropy_backward",
    "smoothed_cross_entropy_forward",
    "smoothed_cross_entropy_forward_backward",
    "soft_cross_entropy_backward",
    "soft_cross_entropy_forward",
    "soft_cross_entropy_forward_backward",
    "soft_cross_entropy_target_backward",
    "softmax_backward",
    "softmax_forward",
    "sparse_soft_cross_entropy_backward",
    "sparse_soft_cross_entropy_forward",
    "sparse_soft_cross_entropy_forward_backward",
    "sparse_soft_cross_entropy_prob_backward",
    "sum_rows",
    "sum_weights",
    "token_statistics_backward",
    "token_statistics_forward",
]
