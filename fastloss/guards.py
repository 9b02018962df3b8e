"""torch's guard of compiled programs, in C++: one question of all tensors of a call, instead of Python's many of each."""

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

from torch import _C, Tensor

_MOST_GUARDED = 8

What = TypeVar("What")


class _Known(NamedTuple, Generic[What]):
    asked: list[Any]
    fits: Callable[..., bool]  # of the tensors that there are
    what: What


class Recent(Generic[What]):
    """What is known of the calls of one function that came last, each of a kind that came often. `asked` is all that a kind is, but for
    what a guard looks at: which tensors there are is known by their types."""

    __slots__ = ("_known", "_seen")

    def __init__(self) -> None:
        self._known: tuple[_Known[What], ...] = ()
        self._seen: tuple[Any, ...] = ()  # kinds that no guard knew

    def __len__(self) -> int:
        return len(self._known)

    def find(self, asked: list[Any], tensors: tuple[Any, ...]) -> What | None:
        """What is known of calls that are asked like this one."""
        for was_asked, fits, what in self._known:
            if was_asked != asked:
                continue
            present = []
            for t in tensors:
                if t is not None:
                    if t.is_nested:  # it has no shape, and a guard that asked for one would end the process
                        return None
                    present.append(t)
            if fits(*present):
                return what
        return None

    def came_again(self, kind: Any, asked: list[Any], tensors: tuple[Tensor | None, ...], what: What) -> None:
        """A kind that no guard knew: guard it if it comes often. Where every call is of another kind, guards would be made for nothing."""
        seen, self._seen = self._seen, (kind, *self._seen[: _MOST_GUARDED - 1])
        fits = guard([t for t in tensors if t is not None]) if kind in seen else None
        if fits is not None:
            self._known = _Known(asked, fits, what), *self._known[: _MOST_GUARDED - 1]


def guard(tensors: list[Tensor]) -> Callable[..., bool] | None:
    """Whether tensors have the types, shapes, strides, dtypes and dispatch keys of these under the modes of this thread, and want gradients
    as they do, by torch's own function for compiled programs; None if this torch has no such function."""
    try:
        made: Any = _C._dynamo.guards.TensorGuards
    except AttributeError:
        return None
    sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
    fits: Callable[..., bool] = made(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    return fits
