"""The kinds of tensors that launchers take, each a rule in words and as a test. `contract` says which argument is of which kind."""

from typing import Annotated, Any

import torch
from torch import Tensor

from .kernels.groups import Answers, Foreseen, Reduction, Rows, Slope
from .loss import COMPUTE, fields
from .storage import is_in_its_storage


class Facts:
    """What the first tensor of a launch says of the others."""

    __slots__ = ("classes", "compute", "device", "dtype", "entries", "rows", "shape")

    def __init__(self, t: Tensor, rows: int, classes: int) -> None:
        self.shape, self.dtype, self.device, self.compute = t.shape, t.dtype, t.device, COMPUTE.get(t.dtype)
        self.rows, self.classes = rows, classes
        self.entries = 0  # of a row: known once their classes have been looked at


class Kind:
    """A rule for one argument, in words and as a test. Some kinds give the facts that the others are held against.

    `written` is written whole, unless it is `kept` too: then it may stay what it was. `ours` is what nobody but the calling loss can have
    made, a moment ago: it is held against its rule only where launches are watched.
    """

    rule = ""
    written = False
    kept = False
    ours = False

    def facts(self, t: Tensor) -> Facts | None:
        return None

    def fits(self, t: Tensor, f: Facts) -> bool:
        raise NotImplementedError


class _Logits(Kind):
    rule = "[N, C] or [B, C, P] of float32, float64, bfloat16 or float16"

    def facts(self, t: Tensor) -> Facts | None:
        dims = t.dim()
        return Facts(t, t.shape[0] * (t.shape[2] if dims == 3 else 1), t.shape[1]) if dims in (2, 3) else None

    def fits(self, t: Tensor, f: Facts) -> bool:
        return f.compute is not None and is_in_its_storage(t)


class _LikeLogits(Kind):
    rule = "shape and dtype of the logits"

    def fits(self, t: Tensor, f: Facts) -> bool:
        return t.shape == f.shape and t.dtype is f.dtype and is_in_its_storage(t)


class _Floats(Kind):
    rule = "shape of the logits, a dtype that is computed with in the same dtype"

    def fits(self, t: Tensor, f: Facts) -> bool:
        return t.shape == f.shape and COMPUTE.get(t.dtype) is f.compute and is_in_its_storage(t)


class _FloatResults(_Floats):
    rule = f"{_Floats.rule}, no two elements in one place"
    written = ours = True

    def fits(self, t: Tensor, f: Facts) -> bool:
        return super().fits(t, f) and _apart(t)


class _Gradient(_LikeLogits):
    rule = "shape and dtype of the logits, no two elements in one place"
    written = ours = True

    def fits(self, t: Tensor, f: Facts) -> bool:
        return super().fits(t, f) and _apart(t)


def _apart(t: Tensor) -> bool:
    """Whether no two elements lie in one place for sure: no dimension is an expanded one."""
    return t.is_contiguous() or all(s or n < 2 for s, n in zip(t.stride(), t.shape, strict=True))


class _KeptGradient(_Gradient):
    kept = True


class _OnlyGradient(_Gradient, _Logits):
    """The gradient where there are no logits."""

    facts = _Logits.facts


class _Indices(Kind):
    rule = "[N] of int64, contiguous"

    def fits(self, t: Tensor, f: Facts) -> bool:
        return t.dtype is torch.int64 and t.dim() == 1 and t.numel() == f.rows and t.is_contiguous() and is_in_its_storage(t)


class _ClassWeight(Kind):
    rule = "[C] of the compute dtype"

    def fits(self, t: Tensor, f: Facts) -> bool:
        return t.dtype is f.compute and t.dim() == 1 and t.numel() == f.classes and is_in_its_storage(t)


class _RowNumbers(Kind):
    rule = "[N] of the compute dtype, contiguous"

    def fits(self, t: Tensor, f: Facts) -> bool:
        return t.dtype is f.compute and t.dim() == 1 and t.numel() == f.rows and t.is_contiguous() and is_in_its_storage(t)


class _RowResults(_RowNumbers):
    written = ours = True


class _EntryIndices(Kind):
    rule = "[N, K] of int64, contiguous"

    def fits(self, t: Tensor, f: Facts) -> bool:
        f.entries = t.shape[-1] if t.dim() else 0
        return t.dtype is torch.int64 and t.dim() == 2 and t.shape[0] == f.rows and t.is_contiguous() and is_in_its_storage(t)


class _EntryNumbers(Kind):
    rule = "[N, K] of the compute dtype, one number for each entry"

    def fits(self, t: Tensor, f: Facts) -> bool:
        return t.dtype is f.compute and t.shape == (f.rows, f.entries) and is_in_its_storage(t)


class _EntryResults(_EntryNumbers):
    rule = "[N, K] of the compute dtype, contiguous"
    written = ours = True

    def fits(self, t: Tensor, f: Facts) -> bool:
        return super().fits(t, f) and t.is_contiguous()


class Group:
    """A rule for some fields of a group, all of one kind; the launcher does not look at the others."""

    def __init__(self, kind: Kind, group: type[tuple[Any, ...]], *parts: str) -> None:
        self.kind, self.fields = kind, [(fields(group).index(part), part) for part in parts]


class _RowGradient(Kind):
    rule = "[N] of the compute dtype, stride 0 or 1"

    def fits(self, t: Tensor, f: Facts) -> bool:
        return (
            t.dtype is f.compute and t.dim() == 1 and t.numel() == f.rows and (f.rows < 2 or t.stride(0) in (0, 1)) and is_in_its_storage(t)
        )


class _SomeRowNumbers(_RowNumbers):
    rule = "[N] of the compute dtype, contiguous, or without elements"

    def fits(self, t: Tensor, f: Facts) -> bool:
        return super().fits(t, f) or (t.dtype is f.compute and t.numel() == 0)


class _SomeRowResults(_SomeRowNumbers):
    written = ours = True


class _SomeRowClasses(Kind):
    rule = "[N] of int64, contiguous, or without elements"
    written = ours = True

    def fits(self, t: Tensor, f: Facts) -> bool:
        shape_fits = t.numel() == 0 or (t.dim() == 1 and t.numel() == f.rows and t.is_contiguous())
        return t.dtype is torch.int64 and shape_fits and is_in_its_storage(t)


class _SomeEntryNumbers(_EntryNumbers):
    rule = "[N, K] of the compute dtype, one number for each entry, contiguous; or without elements"

    def fits(self, t: Tensor, f: Facts) -> bool:
        return (super().fits(t, f) and t.is_contiguous()) or (t.dtype is f.compute and t.numel() == 0)


class _SomeEntryResults(_SomeEntryNumbers):
    written = ours = True


class _Total(Kind):
    rule = "one number, float32 or float64"
    written = ours = True

    def fits(self, t: Tensor, f: Facts) -> bool:
        return t.dtype in (torch.float32, torch.float64) and t.numel() == 1 and is_in_its_storage(t)


class _Divisor(_Total):
    rule = "at most one number, float32 or float64"

    def fits(self, t: Tensor, f: Facts) -> bool:
        return super().fits(t, f) if t.numel() else t.dtype in (torch.float32, torch.float64)


class _OneNumber(Kind):
    rule = "one number of the compute dtype"

    def fits(self, t: Tensor, f: Facts) -> bool:
        return t.dtype is f.compute and t.numel() == 1 and is_in_its_storage(t)


class _FirstNumber(_OneNumber):
    ours = True

    def facts(self, t: Tensor) -> Facts | None:
        return Facts(t, 1, 1)


class _LastNumbers(Kind):
    rule = "[2] of the compute dtype, contiguous"

    def fits(self, t: Tensor, f: Facts) -> bool:
        return t.dtype is f.compute and t.shape == (2,) and t.is_contiguous() and is_in_its_storage(t)


class _Numbers(Kind):
    rule = "[N] of float32 or float64, contiguous"
    ours = True

    def facts(self, t: Tensor) -> Facts | None:
        return Facts(t, t.numel(), 0)

    def fits(self, t: Tensor, f: Facts) -> bool:
        return t.dtype in (torch.float32, torch.float64) and t.dim() == 1 and t.is_contiguous() and is_in_its_storage(t)


class _WeightAlone(Kind):
    """The class weight where there are no logits."""

    rule = "[C] of float32 or float64"

    def facts(self, t: Tensor) -> Facts | None:
        return Facts(t, 0, t.numel())

    def fits(self, t: Tensor, f: Facts) -> bool:
        return t.dtype in (torch.float32, torch.float64) and t.dim() == 1 and is_in_its_storage(t)


class _AnyIndices(Kind):
    rule = "one dimension of int64, contiguous"

    def fits(self, t: Tensor, f: Facts) -> bool:
        return t.dtype is torch.int64 and t.dim() == 1 and t.is_contiguous() and is_in_its_storage(t)


Logits = Annotated[Tensor, _Logits()]
LikeLogits = Annotated[Tensor, _LikeLogits()]
Floats = Annotated[Tensor, _Floats()]
FloatResults = Annotated[Tensor, _FloatResults()]
Gradient = Annotated[Tensor, _Gradient()]
KeptGradient = Annotated[Tensor, _KeptGradient()]
OnlyGradient = Annotated[Tensor, _OnlyGradient()]
Indices = Annotated[Tensor, _Indices()]
AnyIndices = Annotated[Tensor, _AnyIndices()]
ClassWeight = Annotated[Tensor, _ClassWeight()]
WeightAlone = Annotated[Tensor, _WeightAlone()]
EntryIndices = Annotated[Tensor, _EntryIndices()]
EntryNumbers = Annotated[Tensor, _EntryNumbers()]
EntryResults = Annotated[Tensor, _EntryResults()]
RowNumbers = Annotated[Tensor, _RowNumbers()]
RowResults = Annotated[Tensor, _RowResults()]
IndexRows = Annotated[Rows, Group(_RowNumbers(), Rows, "row_weight", "top", "total")]
IndexRowResults = Annotated[Rows, Group(_RowResults(), Rows, "row_weight", "top", "total")]
SmoothedRows = Annotated[Rows, Group(_RowNumbers(), Rows, "row_weight", "mass", "top", "total")]
SmoothedRowResults = Annotated[Rows, Group(_RowResults(), Rows, "row_weight", "mass", "top", "total")]
SoftRows = Annotated[Rows, Group(_RowNumbers(), Rows, "mass", "top", "total")]
SoftRowResults = Annotated[Rows, Group(_RowResults(), Rows, "mass", "top", "total")]
TopRows = Annotated[Rows, Group(_RowNumbers(), Rows, "top", "total")]
TopRowResults = Annotated[Rows, Group(_RowResults(), Rows, "top", "total")]
SomeEntryNumbers = Annotated[Tensor, _SomeEntryNumbers()]
AnswerResults = Annotated[
    Answers,
    Group(_SomeEntryResults(), Answers, "log_prob"),
    Group(_SomeRowResults(), Answers, "entropy", "lse", "sum_sq_prob"),
    Group(_SomeRowClasses(), Answers, "argmax"),
]
SlopeNumbers = Annotated[Slope, Group(_RowNumbers(), Slope, "alpha"), Group(_SomeRowNumbers(), Slope, "beta", "gamma")]
RowGradient = Annotated[Tensor, _RowGradient()]
Reduced = Annotated[Reduction, Group(_Divisor(), Reduction, "divisor"), Group(_Total(), Reduction, "total")]
ReducedForeseen = Annotated[
    Foreseen, Group(_LastNumbers(), Foreseen, "dloss"), Group(_Divisor(), Foreseen, "divisor"), Group(_Total(), Foreseen, "total")
]
OneNumber = Annotated[Tensor, _OneNumber()]
LastNumbers = Annotated[Tensor, _LastNumbers()]
Numbers = Annotated[Tensor, _Numbers()]
Total = Annotated[Tensor, _Total()]
FirstNumber = Annotated[Tensor, _FirstNumber()]
