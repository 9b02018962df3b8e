"""fastloss: cross-entropy losses for PyTorch that are exact, fast and small in memory, on CPU (Numba) and CUDA (Triton)."""

from . import config, memory
from ._version import __version__
from .backends import BackendError, get_backend, set_backend, use_backend
from .functional import (
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
    cross_entropy,
    nll_loss,
    sigmoid_focal_loss,
)
from .linear import linear_cross_entropy, linear_token_statistics
from .modules import (
    BCELoss,
    BCEWithLogitsLoss,
    CrossEntropyLoss,
    LinearCrossEntropyLoss,
    LogSoftmax,
    NLLLoss,
    Softmax,
    SparseSoftCrossEntropyLoss,
)
from .probabilities import log_softmax, softmax
from .routing import Route, explain
from .sparse_targets import sparse_soft_cross_entropy
from .startup import Warmed, warmup
from .statistics import TokenStatistics, token_statistics
from .vocab_parallel import vocab_parallel_cross_entropy
from .vocab_parallel_linear import vocab_parallel_linear_cross_entropy

__all__ = [
    "BCELoss",
    "BCEWithLogitsLoss",
    "BackendError",
    "CrossEntropyLoss",
    "LinearCrossEntropyLoss",
    "LogSoftmax",
    "NLLLoss",
    "Route",
    "Softmax",
    "SparseSoftCrossEntropyLoss",
    "TokenStatistics",
    "Warmed",
    "__version__",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "config",
    "cross_entropy",
    "explain",
    "get_backend",
    "linear_cross_entropy",
    "linear_token_statistics",
    "log_softmax",
    "memory",
    "nll_loss",
    "set_backend",
    "sigmoid_focal_loss",
    "softmax",
    "sparse_soft_cross_entropy",
    "token_statistics",
    "use_backend",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_linear_cross_entropy",
    "warmup",
]
