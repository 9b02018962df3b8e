"""The losses, one file each."""

from .bce_with_logits import bce_with_logits
from .binary_cross_entropy import binary_cross_entropy
from .cross_entropy import cross_entropy
from .linear_cross_entropy import linear_cross_entropy
from .linear_soft_cross_entropy import linear_soft_cross_entropy
from .linear_token_statistics import linear_token_statistics
from .nll_loss import nll_loss
from .sigmoid_focal_loss import sigmoid_focal_loss
from .soft_cross_entropy import soft_cross_entropy
from .softmax import log_softmax, softmax
from .sparse_soft_cross_entropy import sparse_soft_cross_entropy
from .token_statistics import token_statistics
from .vocab_parallel_cross_entropy import vocab_parallel_cross_entropy
from .vocab_parallel_linear_cross_entropy import vocab_parallel_linear_cross_entropy
from .vocab_parallel_soft_cross_entropy import vocab_parallel_soft_cross_entropy
from .vocab_parallel_token_statistics import vocab_parallel_token_statistics

LOSSES = (
    cross_entropy,
    soft_cross_entropy,
    linear_cross_entropy,
    linear_soft_cross_entropy,
    sparse_soft_cross_entropy,
    softmax,
    log_softmax,
    nll_loss,
    bce_with_logits,
    binary_cross_entropy,
    sigmoid_focal_loss,
    token_statistics,
    linear_token_statistics,
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
    vocab_parallel_soft_cross_entropy,
    vocab_parallel_token_statistics,
)

__all__ = [
    "LOSSES",
    "bce_with_logits",
    "binary_cross_entropy",
    "cross_entropy",
    "linear_cross_entropy",
    "linear_soft_cross_entropy",
    "linear_token_statistics",
    "log_softmax",
    "nll_loss",
    "sigmoid_focal_loss",
    "soft_cross_entropy",
    "softmax",
    "sparse_soft_cross_entropy",
    "token_statistics",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_linear_cross_entropy",
    "vocab_parallel_soft_cross_entropy",
    "vocab_parallel_token_statistics",
]
