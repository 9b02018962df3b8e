"""One measurement's input: a loss, its shape and dtype, and enough different inputs to miss the cache."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .losses import LOSSES, SHORT, Loss, Options, Target, noise

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Case:
    """A loss on logits of one shape and dtype; a linear loss on (rows, features, classes)."""

    loss: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def spec(self) -> Loss:
        return LOSSES[self.loss]

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.shape[:2] if self.spec.linear else self.shape

    @property
    def logits_shape(self) -> tuple[int, ...]:
        return (self.shape[0], self.shape[2]) if self.spec.linear else self.shape

    @property
    def logits(self) -> int:
        return torch.Size(self.logits_shape).numel()

    @property
    def bytes(self) -> int:
        """Bytes of the logits."""
        return self.logits * self.torch_dtype.itemsize

    @property
    def size(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def title(self) -> str:
        return f"{self.loss} {self.size} {self.dtype}"

    @property
    def key(self) -> str:
        return f"{SHORT[self.loss]} {self.size} {self.dtype}"

    @classmethod
    def from_key(cls, key: str) -> "Case":
        from .losses import ALIASES

        alias, size, dtype = key.split()
        return cls(ALIASES[alias], tuple(map(int, size.split("x"))), dtype)


@dataclass
class Inputs:
    """What one step gets. `input` (but that of a linear loss) and `upstream` (None for a loss that is one number) have the shape of the
    logits."""

    input: Tensor
    target: Target
    options: Options
    upstream: Tensor | None


def make_inputs(case: Case, count: int, device: str = "cpu", seed: int = 0) -> list[Inputs]:
    """`count` inputs in memory of their own, the same for the same seed; made where they will be used: to move them would take seconds."""
    torch.manual_seed(seed)
    spec, dtype = case.spec, case.torch_dtype
    inputs = []
    with torch.device(device):
        options = spec.options(case.logits_shape[1], dtype)
        if spec.linear:
            _, features, classes = case.shape
            options["linear_weight"] = noise((classes, features), dtype, features**-0.5)
        for _ in range(count):
            logits = spec.prepare(noise(case.input_shape, dtype))
            upstream = None if spec.scalar else noise(case.shape, dtype, 1.0)
            inputs.append(Inputs(logits, spec.target(case.logits_shape, dtype), options, upstream))
    return inputs


def inputs_to_miss(case: Case, cache_bytes: int, turnover: float = 1.25, most: int = 256) -> int:
    """How many inputs to rotate through so that each is out of the cache when its turn comes: `turnover` times its size later."""
    return min(most, max(2, math.ceil(cache_bytes * turnover / case.bytes)))
