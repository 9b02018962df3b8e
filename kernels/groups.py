"""Arguments that belong together and are passed whole: to launchers, and on into kernels."""

from typing import Annotated, NamedTuple

from torch import Tensor

Computed = Annotated[Tensor, "computed"]  # numbers as computed with: float64 where the logits are, else float32
Int64 = Annotated[Tensor, "int64"]


class Rows(NamedTuple):
    """The numbers of the rows, [N] each, that a forward leaves and a backward reads; None where a loss has no such number."""

    row_weight: Computed | None  # w_y
    mass: Computed | None  # the sum of all factors of the row's -log p_c
    top: Computed  # the largest logit
    total: Computed  # the sum of exp(x - top)


class Reduction(NamedTuple):
    """What becomes of the losses of all rows: their sum, or their mean if there is a divisor; and the upstream gradient of that number."""

    dloss: float
    divisor: Computed  # where the sum of the rows' weights goes; without elements for the sum of the losses
    total: Computed  # where the one or the other goes


class Foreseen(NamedTuple):
    """`Reduction` where the upstream gradient is on the device and the host does not look at it."""

    dloss: Computed  # [2], the numbers that came last: the gradient is made for them if they are the same, else none is
    divisor: Computed
    total: Computed


class Smoothing(NamedTuple):
    """Label smoothing: how much of a target stays where it is, and how much goes to every class."""

    keep: float
    spread: float


class Focus(NamedTuple):
    """Sigmoid focal loss: the weights of positives and negatives, and the power of how wrong a prediction is."""

    positive: float
    negative: float
    gamma: float


class Answers(NamedTuple):
    """What `token_statistics` says of the rows, [N] each; a tensor without elements is not wanted."""

    log_prob: Computed  # [N, K], of K classes of each row
    entropy: Computed
    lse: Computed
    sum_sq_prob: Computed
    argmax: Int64


class Slope(NamedTuple):
    """The gradient p (alpha + beta log p + gamma p) of the logits of a row, [N] each; without elements where it is 0 for all."""

    alpha: Computed
    beta: Computed
    gamma: Computed


PAD = -100
"""The class of an entry that counts for nothing, where a row's target is a few classes."""
