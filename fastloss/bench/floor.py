"""The floor of a case: how long this machine takes to read and write what its loss has to, timed in the same rounds as the losses.

A loss whose gradient is made where the loss is reads its logits once and writes their gradient once; one with a target as large as the
logits reads that, too. Two kernels of ours that compute nothing (kernels/cpu/floor.py) say what that costs: one only reads N x C, one reads
N x C and writes N x C past the caches. A floor is made of their times in the same round.
"""

from time import perf_counter

from .. import backends, memory
from .cases import Inputs
from .runner import Times
from .timing import Series, Step

READ, READ_AND_WRITE = "floor: read", "floor: read and write"

TRAFFIC = {
    "cross_entropy": (1, 1),
    "cross_entropy, smoothed and weighted": (1, 1),
    "cross_entropy, weighted under autocast": (1, 1),
    "cross_entropy, probabilities": (2, 1),
    "sparse_soft_cross_entropy, 2 classes a row": (1, 1),
    "sparse_soft_cross_entropy, 64 classes a row": (1, 1),
    "binary_cross_entropy_with_logits": (2, 1),
    "binary_cross_entropy_with_logits, pos_weight": (2, 1),
    "binary_cross_entropy_with_logits, float32 labels under autocast": (3, 1),  # a label is as large as two logits
    "binary_cross_entropy": (2, 1),
    "sigmoid_focal_loss": (2, 1),
    "token_statistics": (2, 1),
    "token_statistics, all five": (2, 1),
    "softmax": (3, 2),
    "log_softmax": (3, 2),
}
"""Reads and writes of N x C arrays that forward and backward together cannot do without. A function that gives a number a row reads its
input a second time, since its backward is given a number a row; softmax writes its result, and reads that and its gradient. The linear
losses are bound by matrix products, and `nll_loss` only writes: for these the two kernels say nothing."""


def steps(loss: str, inputs: list[Inputs], device: str) -> dict[str, Step]:
    """The two kernels, to be timed in turn with everybody; none where they do not run or say nothing."""
    if loss not in TRAFFIC or device != "cpu" or backends.unavailable("numba") is not None:
        return {}
    from ..kernels.cpu import floor

    first = inputs[0].input
    sums, sink = floor.sums_for(first), memory.empty_like(first)

    def read(turn: int) -> Times:
        start = perf_counter()
        floor.read(inputs[turn % len(inputs)].input, sums)
        return Times(perf_counter() - start, 0.0)

    def read_and_write(turn: int) -> Times:
        start = perf_counter()
        floor.read_and_write(inputs[turn % len(inputs)].input, sink)
        return Times(perf_counter() - start, 0.0)

    return {READ: read, READ_AND_WRITE: read_and_write}


def of(loss: str, series: dict[str, Series]) -> Series | None:
    """The floor in every round: each write comes with a read, and the reads that are left are just reads."""
    if READ not in series:
        return None
    reads, writes = TRAFFIC[loss]
    rounds = zip(series[READ].times, series[READ_AND_WRITE].times, strict=True)
    return Series([Times((reads - writes) * read.step + writes * both.step, 0.0) for read, both in rounds])
