"""What is measured: each loss once, as data, for the checks, the timings and the reports."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import composed
from ..sparse_targets import sparse_soft_cross_entropy
from ..statistics import TokenStatistics

Options = dict[str, Any]


@dataclass(frozen=True)
class Entries:
    """A target of a few classes a row, and the dense one that it stands for, which others are given: made outside the clock."""

    indices: Tensor
    probabilities: Tensor
    dense: Tensor

    def is_floating_point(self) -> bool:
        return True

    def double(self) -> "Entries":
        return Entries(self.indices, self.probabilities.double(), self.dense.double())

    def __getitem__(self, rows: Any) -> "Entries":
        return Entries(self.indices[rows], self.probabilities[rows], self.dense[rows])


Target = Tensor | Entries | None


@dataclass(frozen=True)
class Loss:
    """One loss with one set of options. `function` is its name in fastloss and, if it is there, in torch.nn.functional."""

    name: str
    function: str
    passes: int
    """Reads and writes of N x C arrays that forward and backward cannot do without: what `share of copy speed` is measured by."""
    target: Callable[[tuple[int, ...], torch.dtype], Target]
    options: Callable[[int, torch.dtype], Options] = lambda classes, dtype: {}
    inplace: bool = False
    """Whether fastloss offers inplace_backward for it."""
    scalar: bool = True
    """Whether it is reduced to one number; softmax and log_softmax are not."""
    linear: bool = False
    """Whether it makes its logits itself, from an input and the linear layer among its options, whose gradient is wanted too."""
    autocast: bool = False
    """Whether it is called under autocast to bfloat16, as mixed precision has it: half logits beside float32 for all else."""
    prepare: Callable[[Tensor], Tensor] = field(default=lambda logits: logits)
    """From normal noise to a valid input."""

    @property
    def in_torch(self) -> Callable[..., Any]:
        """torch's function, or what people write where torch has none."""
        if self.function == "sparse_soft_cross_entropy":
            return F.cross_entropy  # with the dense target
        if self.function == "token_statistics":
            return _token_statistics
        function: Callable[..., Any] = getattr(F, self.function, None) or getattr(composed, self.function)
        return function

    def call(self, function: Callable[..., Tensor], input: Tensor, target: Target, options: Options) -> Tensor:
        with torch.autocast(input.device.type, torch.bfloat16) if self.autocast else nullcontext():
            return self._call(function, input, target, options)

    def _call(self, function: Callable[..., Tensor], input: Tensor, target: Target, options: Options) -> Tensor:
        if isinstance(target, Entries):
            entries = (target.indices, target.probabilities) if function is sparse_soft_cross_entropy else (target.dense,)
            return function(input, *entries, **options)
        if self.function == "token_statistics":
            return _all_in_one(function, input, target, **options)
        if self.linear:
            rest = {name: value for name, value in options.items() if name != "linear_weight"}
            return function(input, options["linear_weight"], target, **rest)
        return function(input, **options) if target is None else function(input, target, **options)

    def divisor(self, target: Target, options: Options, shape: tuple[int, ...]) -> float:
        """What 'mean' divides by, in float64."""
        rows = torch.Size(shape).numel() // shape[1]
        if self.function.startswith(("binary", "sigmoid")):
            return float(rows * shape[1])
        if "weight" in options and isinstance(target, Tensor) and not target.is_floating_point():
            return float(options["weight"].double()[target].sum())
        return float(rows)


def _token_statistics(input: Tensor, target: Tensor, outputs: tuple[str, ...]) -> Any:
    """The shortest way in torch."""
    log_p = torch.log_softmax(input, 1)
    p = log_p.exp()
    found = log_p.gather(1, target.unsqueeze(1)).squeeze(1), -(p * log_p).sum(1), torch.logsumexp(input, 1)
    return found if len(outputs) == 3 else (*found, (p * p).sum(1), input.argmax(1))


def _all_in_one(function: Callable[..., Any], input: Tensor, target: Target, outputs: tuple[str, ...], reduction: str = "mean") -> Tensor:
    """One number of all answers, that all are differentiated for."""
    found = function(input, target, outputs=outputs)
    numbers = [t for t in found if t is not None and t.is_floating_point()]
    return torch.stack([t.mean() if reduction == "mean" else t.sum() for t in numbers]).sum()


def _indices(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randint(shape[1], (shape[0], *shape[2:]))


def _probabilities(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return _in_place(lambda part: F.softmax(part, 1), noise(shape, torch.float32)).to(dtype)


def _entries(count: int) -> Callable[[tuple[int, ...], torch.dtype], Entries]:
    """`count` different classes of each row, or all, in no order."""

    def made(shape: tuple[int, ...], dtype: torch.dtype) -> Entries:
        here = min(count, shape[1])
        apart = torch.randperm(here) * (shape[1] // here)
        indices = (torch.randint(shape[1], (shape[0], 1)) + apart) % shape[1]
        probabilities = torch.softmax(torch.randn(indices.shape), 1).to(dtype)
        return Entries(indices, probabilities, torch.zeros(shape, dtype=dtype).scatter_(1, indices, probabilities))

    return made


def _labels(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return noise(shape, dtype).sigmoid_()


def _float32_labels(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return _labels(shape, torch.float32)


def _nothing(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    return None


def _in_place(function: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """`function` of every slice along dim 0, written over it: large inputs must not cost four times their size to make."""
    for part in tensor.split(max(1, tensor.shape[0] // 16)):
        part.copy_(function(part))
    return tensor


def noise(shape: tuple[int, ...], dtype: torch.dtype, scale: float = 2.0) -> Tensor:
    """Normal numbers. Beyond 4 M they repeat, with a period no row length in use divides: randn is slow, and content is not the point."""
    size = torch.Size(shape).numel()
    period = torch.randn(min(size, (1 << 22) + 1)).mul_(scale).to(dtype)
    flat = torch.empty(size, dtype=dtype)
    for start in range(0, size, period.numel()):
        part = flat[start : start + period.numel()]
        part.copy_(period[: part.numel()])
    return flat.view(shape)


LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        Loss("cross_entropy", "cross_entropy", 3, _indices, inplace=True),
        Loss(
            "cross_entropy, smoothed and weighted",
            "cross_entropy",
            3,
            _indices,
            lambda classes, dtype: {"label_smoothing": 0.1, "weight": torch.rand(classes).add_(0.5).to(dtype)},
            inplace=True,
        ),
        Loss(
            "cross_entropy, weighted under autocast",
            "cross_entropy",
            3,
            _indices,
            lambda classes, dtype: {"weight": torch.rand(classes).add_(0.5)},
            autocast=True,
        ),
        Loss("cross_entropy, probabilities", "cross_entropy", 5, _probabilities, inplace=True),
        Loss("sparse_soft_cross_entropy, 2 classes a row", "sparse_soft_cross_entropy", 3, _entries(2)),
        Loss("sparse_soft_cross_entropy, 64 classes a row", "sparse_soft_cross_entropy", 3, _entries(64)),
        Loss("binary_cross_entropy_with_logits", "binary_cross_entropy_with_logits", 5, _labels),
        Loss(
            "binary_cross_entropy_with_logits, pos_weight",
            "binary_cross_entropy_with_logits",
            5,
            _labels,
            lambda classes, dtype: {"pos_weight": torch.rand(classes).add_(0.5).to(dtype)},
        ),
        Loss(
            "binary_cross_entropy_with_logits, float32 labels under autocast",
            "binary_cross_entropy_with_logits",
            7,
            _float32_labels,
            autocast=True,
        ),
        Loss("binary_cross_entropy", "binary_cross_entropy", 5, _labels, prepare=lambda x: x.sigmoid_()),
        Loss("sigmoid_focal_loss", "sigmoid_focal_loss", 5, _labels, lambda classes, dtype: {"reduction": "mean"}),
        Loss("token_statistics", "token_statistics", 3, _indices, lambda classes, dtype: {"outputs": ("log_prob", "entropy", "lse")}),
        Loss("token_statistics, all five", "token_statistics", 3, _indices, lambda classes, dtype: {"outputs": TokenStatistics._fields}),
        Loss("linear_cross_entropy", "linear_cross_entropy", 0, _indices, linear=True),
        Loss("nll_loss", "nll_loss", 1, _indices, prepare=lambda x: _in_place(lambda part: F.log_softmax(part, 1), x)),
        Loss("softmax", "softmax", 5, _nothing, lambda classes, dtype: {"dim": 1}, scalar=False),
        Loss("log_softmax", "log_softmax", 5, _nothing, lambda classes, dtype: {"dim": 1}, scalar=False),
    )
}

ALIASES = {
    "ce": "cross_entropy",
    "ce-smoothed": "cross_entropy, smoothed and weighted",
    "ce-autocast": "cross_entropy, weighted under autocast",
    "ce-soft": "cross_entropy, probabilities",
    "sparse-2": "sparse_soft_cross_entropy, 2 classes a row",
    "sparse-64": "sparse_soft_cross_entropy, 64 classes a row",
    "bce": "binary_cross_entropy_with_logits",
    "bce-pos": "binary_cross_entropy_with_logits, pos_weight",
    "bce-autocast": "binary_cross_entropy_with_logits, float32 labels under autocast",
    "bce-prob": "binary_cross_entropy",
    "focal": "sigmoid_focal_loss",
    "tokens": "token_statistics",
    "tokens-all": "token_statistics, all five",
    "linear-ce": "linear_cross_entropy",
    "nll": "nll_loss",
    "softmax": "softmax",
    "log-softmax": "log_softmax",
}
SHORT = {name: alias for alias, name in ALIASES.items()}
