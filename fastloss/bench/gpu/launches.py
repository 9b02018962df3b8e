"""Every launcher with arguments that fit, and the bytes that it cannot do without: made from the launchers' own declaration."""

import importlib
from collections.abc import Callable, Sequence
from functools import cache
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...contract import Place, launcher_names, places
from ...kernels.groups import Answers, Focus, Foreseen, Reduction, Rows, Slope, Smoothing
from ...launchers import Kernels
from ...loss import COMPUTE
from ..cases import DTYPES

LAUNCHERS = tuple(launcher_names())
ELEMENTWISE = ("bce", "binary", "sigmoid")
PICKED = {("nll_loss_forward", "log_prob"), ("sparse_soft_cross_entropy_prob_backward", "logits")}  # read at the targets only
SHAPES = ((8192, 128256), (8192, 32000), (8192, 50257), (65536, 1000), (32, 21, 512 * 512))
TINY = (24, 70)
_AS_LOGITS = ("Logits", "OnlyGradient", "Elements")
_SECTOR = 32  # bytes: the least that a GPU reads
_MOST = 16 << 30  # bytes of one launch


def kernel_package(device: str) -> Any:
    """The launchers themselves, without the look at their arguments that `backends` puts before them."""
    return importlib.import_module(f"fastloss.kernels.{device}")


class Launch(NamedTuple):
    """A launcher on logits of one shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    def arguments(self, device: str) -> list[Any]:
        """Arguments of their own, with ordinary numbers in them."""
        return list(_arguments(self, device).values())

    def bytes(self) -> int:
        """What must be read and written: every element of every tensor once, those that are one number for all not at all."""
        arguments, found = list(_arguments(self, "meta").values()), 0
        for place in _places(self.name):
            t = place.of(arguments)
            if (self.name, place.name) in PICKED:
                found += t.numel() // self.shape[1] * _SECTOR
            else:
                found += t.numel() * t.element_size() if all(t.stride()) else 0
        return found


def planned(tiny: bool) -> list[Launch]:
    """All launches, the most telling first: bfloat16, then float32, then float16."""
    if tiny:
        return [Launch(name, TINY, "float32") for name in LAUNCHERS]
    every = [Launch(name, shape, dtype) for dtype in ("bfloat16", "float32", "float16") for shape in SHAPES for name in LAUNCHERS]
    return [launch for launch in every if _is_worth_it(launch)]


def _has_logits(name: str) -> bool:
    return any(type(place.kind).__name__.removeprefix("_") in _AS_LOGITS for place in _places(name))


@cache
def _places(name: str) -> list[Place]:
    return places(name)


@cache
def _names(name: str) -> list[str]:
    """Of a launcher's arguments."""
    return [argument for argument in signature(getattr(Kernels, name)).parameters if argument != "self"]


def _is_worth_it(launch: Launch) -> bool:
    if not _has_logits(launch.name):  # only where there are many rows; row numbers are float32
        return launch.dtype == "float32" and len(launch.shape) == 3
    return launch.bytes() <= _MOST


def _arguments(launch: Launch, device: str) -> dict[str, Any]:
    name, numbers = launch.name, _plain_arguments(launch.shape[1])
    make, names = _Maker(launch, device), _names(name)
    arguments = {argument: numbers.get(argument) for argument in names}
    for place in _places(name):
        argument, t = names[place.argument], make(place)
        if place.field is None:
            arguments[argument] = t
        else:
            group: Any = arguments[argument]
            arguments[argument] = group._replace(**{group._fields[place.field]: t})
    return arguments


def _plain_arguments(classes: int) -> dict[str, Any]:
    groups: tuple[Any, ...] = (Rows, Answers, Slope, Reduction, Foreseen)
    rows, answers, slope, reduction, foreseen = (group(*(None,) * len(group._fields)) for group in groups)
    return {
        "ignore_index": -100, "keep": 0.9, "logit_scale": 1.0, "count": classes,
        "smoothing": Smoothing(0.9, 0.1 / classes), "focus": Focus(0.25, 0.75, 2.0),
        "rows": rows, "answers": answers, "slope": slope, "reduction": reduction._replace(dloss=1.0),
        "foreseen": foreseen,
    }  # fmt: skip


class _Maker:
    """A tensor for each place of a launch, by the kind that the contract says."""

    def __init__(self, launch: Launch, device: str) -> None:
        self.name, self.device = launch.name, device
        self.elementwise = launch.name.startswith(ELEMENTWISE)
        two = len(launch.shape) == 2
        self.shape = (1, *launch.shape) if self.elementwise and two else launch.shape
        self.classes, self.rows = launch.shape[1], launch.shape[0] * (1 if two else launch.shape[2])
        self.stored = DTYPES[launch.dtype]
        self.computed = COMPUTE[self.stored]

    def __call__(self, place: Place) -> Tensor:
        kind = type(place.kind).__name__.removeprefix("_")
        made: dict[str, Callable[[], Tensor]] = {
            "Logits": self._logits, "LikeLogits": self._shares, "Elements": self._logits,
            "Floats": lambda: self._shares() if place.name == "target" else self._one_for_all(*self.shape),
            "FloatResults": lambda: self._of(self.shape, self.computed if place.name == "loss" else self.stored),
            "Gradient": lambda: self._of(self.shape, self.stored), "OnlyGradient": lambda: self._of(self.shape, self.stored),
            "Indices": lambda: self._classes(self.rows), "AnyIndices": lambda: self._classes(self.rows),
            "EntryIndices": lambda: self._classes(self.rows, self.entries),
            "EntryNumbers": lambda: self._ones(self.rows, self.entries), "SomeEntryNumbers": lambda: self._ones(self.rows, self.entries),
            "ClassWeight": lambda: self._one_for_all(self.classes), "WeightAlone": lambda: self._one_for_all(self.classes),
            "RowGradient": lambda: self._one_for_all(self.rows), "SomeRowClasses": lambda: self._of((self.rows,), torch.int64),
            "EntryResults": lambda: self._of((self.rows, self.entries), self.computed),
            "SomeEntryResults": lambda: self._of((self.rows, self.entries), self.computed),
            "KeptGradient": lambda: self._of(self.shape, self.stored),
            "OneNumber": lambda: self._ones(), "FirstNumber": lambda: self._ones(),
            "LastNumbers": lambda: self._ones(2) / 2,  # another number than came: everything is to be repaired
            "Total": lambda: self._of((), self.computed), "Divisor": lambda: self._of((), self.computed),
        }  # fmt: skip
        return made[kind]() if kind in made else self._ones(self.rows)  # numbers of the rows

    @property
    def entries(self) -> int:
        return 2 if self.name.startswith("sparse") else 1

    def _of(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device=self.device)

    def _logits(self) -> Tensor:
        x = self._of(self.shape, self.stored)
        return x.uniform_(0.01, 0.99) if self.name.startswith("binary") else x.normal_()

    def _shares(self) -> Tensor:
        return self._of(self.shape, self.stored).uniform_()

    def _ones(self, *shape: int) -> Tensor:
        return self._of(shape, self.computed).fill_(1)

    def _one_for_all(self, *shape: int) -> Tensor:
        return self._ones(1).expand(shape)

    def _classes(self, *shape: int) -> Tensor:
        return torch.randint(self.classes, shape, device=self.device)
