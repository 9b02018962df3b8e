"""What a region is given: one block of named arguments, a NamedTuple whose annotations are their kinds.

    class Sum(NamedTuple):
        values: Stored  # the first Stored tensor of a block says what its region is compiled for
        subtotals: Float64 | None
        size: int

Launchers build it of tensors and numbers. `packer` makes words of it, the one place where tensors become addresses. In the region
`arguments` gives the same names, with pointers in place of tensors. A block may have blocks in it; helpers take it whole, or such a part.
"""

import struct
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, models, register_model
from torch import Tensor

from ..groups import Computed as Computed
from ..groups import Int64 as Int64
from . import llvm

Stored = Annotated[Tensor, "stored"]  # numbers as the logits lie in memory
Floats = Annotated[Tensor, "floats"]  # of a float dtype of their own, widened to what the logits are: the region is compiled for each
Float64 = Annotated[Tensor, "float64"]
Float32 = Annotated[Tensor, "float32"]
Known = Annotated[int, "known"]  # a number that takes few values: the region is compiled for each
# and `Computed`; `int`; `float`, computed with as the logits are; Annotated[tuple[int, ...], how many]; other blocks

HEADER = 5  # words before the arguments: see `launch`
STORAGE = {torch.float32: llvm.float32, torch.float64: llvm.float64, torch.float16: llvm.float16, torch.bfloat16: llvm.bfloat16}
COMPUTED = {torch.float32: torch.float32, torch.float64: torch.float64, torch.float16: torch.float32, torch.bfloat16: torch.float32}
_I64 = ir.IntType(64)


class _Kind(NamedTuple):
    """What an annotation says: `of` is another block, int, float, a number of ints, "known", or what a tensor's elements are called."""

    of: Any
    optional: bool

    @property
    def is_tensor(self) -> bool:
        return isinstance(self.of, str) and self.of != "known"


def _kinds(block: Any) -> list[tuple[str, _Kind]]:
    found = []
    for name, hint in get_type_hints(block, include_extras=True).items():
        optional = type(None) in get_args(hint)
        kind = get_args(hint)[0] if optional else hint
        found.append((name, _Kind(kind.__metadata__[0] if hasattr(kind, "__metadata__") else kind, optional)))
    return found


# ---------------------------------------------------------------- on the way in


def packer(block: Any) -> Callable[[int, Any], tuple[tuple[Any, ...], bytes]]:
    """A function of how many tasks there are and of a block, which gives what the region is to be compiled for (the dtype of what is
    stored, those of `Floats`, and the known numbers), and the words for it. It raises TypeError for a tensor whose elements are not what
    they should be.

    It is made of source text, as NamedTuples are: a loop over the words would take longer than small kernels do.
    """
    names, words = _words(block, "a")
    tensors = [(word, kind) for word, kind in words if kind.is_tensor]
    version = "".join([*(f"a{word}.dtype, " for word in floats_in(block)), *(f"a{word}, " for word in known_in(block))])
    layout = struct.Struct("=" + "q" * HEADER + "".join("d" if kind.of is float else "q" for _, kind in words))
    first = next(word for word, kind in tensors if kind.of == "stored")
    fits = [f"({f'{word} is None or ' if kind.optional else ''}{_fits(word, kind)})" for word, kind in tensors]
    fixed = {"int64": torch.int64, "float64": torch.float64, "float32": torch.float32}
    given = {"pack": layout.pack, "computed_of": COMPUTED, "fixed": fixed, "refuse": _refuse, **fixed}
    source = f"""
def packed(tasks, a):
    {names} = a
    stored = {first}.dtype
    computed = computed_of[stored]
    if not ({" and ".join(fits)}):
        refuse(a, dict(fixed, stored=stored, computed=computed))
    return (stored, {version}), pack(tasks, {"0, " * (HEADER - 1)}{", ".join(_value(word, kind) for word, kind in words)})
"""
    exec(source, given)
    return given["packed"]  # type: ignore[return-value]


def floats_in(block: Any) -> tuple[str, ...]:
    """The tensors of such a block that have dtypes of their own: the names of these words, in their order."""
    return tuple(word for word, kind in _words(block, "")[1] if kind.of == "floats")


def known_in(block: Any) -> tuple[str, ...]:
    """What the region of such a block is compiled for beside dtypes: the names of these words, in their order."""
    return tuple(word for word, kind in _words(block, "")[1] if kind.of == "known")


def tensors_in(arguments: Any) -> list[tuple[int, Tensor]]:
    """The tensors of a block, each with the number of the word that holds its address."""
    found: list[tuple[int, Tensor]] = []
    word = HEADER
    values = [arguments]
    while values:
        value = values.pop()
        if isinstance(value, tuple):
            values += reversed(value)
            continue
        if isinstance(value, Tensor):
            found.append((word, value))
        word += 1
    return found


def _words(block: Any, prefix: str) -> tuple[str, list[tuple[str, _Kind]]]:
    """Names for every word of a block, as the left-hand side of an assignment, and as a list with their kinds."""
    names, words = [], []
    for name, kind in _kinds(block):
        if hasattr(kind.of, "_fields"):
            here, inside = _words(kind.of, f"{prefix}_{name}")
        elif isinstance(kind.of, int):
            inside = [(f"{prefix}_{name}_{k}", _Kind(int, False)) for k in range(kind.of)]
            here = f"({', '.join(word for word, _ in inside)})"
        else:
            here, inside = f"{prefix}_{name}", [(f"{prefix}_{name}", kind)]
        names.append(here)
        words += inside
    return f"({', '.join(names)},)", words


def _value(word: str, kind: _Kind) -> str:
    if not kind.is_tensor:
        return word
    return f"0 if {word} is None else {word}.data_ptr()" if kind.optional else f"{word}.data_ptr()"


def _fits(word: str, kind: _Kind) -> str:
    return f"computed_of.get({word}.dtype) is computed" if kind.of == "floats" else f"{word}.dtype is {kind.of}"


def _refuse(block: Any, dtypes: dict[str, torch.dtype]) -> None:
    for (name, kind), value in zip(_kinds(type(block)), block, strict=True):
        if hasattr(kind.of, "_fields"):
            _refuse(value, dtypes)
        elif kind.of == "floats":
            if COMPUTED.get(value.dtype) is not dtypes["computed"]:
                raise TypeError(f"{type(block).__qualname__}.{name} must be computed with in {dtypes['computed']}, got {value.dtype}")
        elif kind.is_tensor and value is not None and value.dtype is not dtypes[kind.of]:
            raise TypeError(f"{type(block).__qualname__}.{name} must be {dtypes[kind.of]}, got {value.dtype}")


# ---------------------------------------------------------------- in the region


class Arguments(types.Type):
    """The address of a block, of a region that is compiled for `version`, as a packer gives it. `sources` tells it from those of others."""

    def __init__(self, block: Any, version: tuple[Any, ...], sources: str) -> None:
        dtypes = 1 + len(floats_in(block))
        storage, *floats = (STORAGE[dtype] for dtype in version[:dtypes])
        self.block, self.storage, self.floats, self.known = block, storage, tuple(floats), version[dtypes:]
        name = ", ".join(map(str, (storage, *floats, self.known)))
        super().__init__(name=f"Arguments({block.__module__}.{block.__qualname__}, {name}, {sources})")


@register_model(Arguments)
class _ArgumentsModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Arguments) -> None:
        super().__init__(dmm, fe_type, _I64.as_pointer())


def word(builder: ir.IRBuilder, block: ir.Value, index: int) -> ir.Value:
    return builder.gep(block, [ir.Constant(_I64, index)])


def _type(kind: Any, storage: types.Type, floats: Iterator[types.Type]) -> Any:
    """What a kind is in compiled code."""
    if hasattr(kind, "_fields"):
        return types.BaseTuple.from_types([_type(k.of, storage, floats) for _, k in _kinds(kind)], kind)
    if isinstance(kind, int):
        return types.UniTuple(types.int64, kind)
    if kind in (int, "known"):
        return types.int64
    if kind == "floats":
        return types.CPointer(next(floats))
    fixed = {"int64": types.int64, "float64": types.float64, "float32": types.float32}
    numbers = {"stored": storage, "computed": llvm.COMPUTE[storage], **fixed}
    return types.CPointer(numbers[kind]) if isinstance(kind, str) else llvm.COMPUTE[storage]


@intrinsic
def arguments(typingctx: Any, block: Any) -> Any:
    """The block as it was given, with pointers in place of tensors."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        index, known = iter(range(HEADER, 1 << 10)), iter(block.known)

        def value(ty: types.Type, kind: Any) -> ir.Value:
            if isinstance(ty, types.BaseTuple):
                inside = [k.of for _, k in _kinds(kind)] if hasattr(kind, "_fields") else [int] * kind
                return context.make_tuple(builder, ty, [value(t, k) for t, k in zip(ty.types, inside, strict=True)])
            found = builder.load(word(builder, args[0], next(index)))
            if kind == "known":
                return ir.Constant(_I64, next(known))
            if isinstance(ty, types.CPointer):
                return builder.inttoptr(found, context.get_value_type(ty))
            if not isinstance(ty, types.Float):
                return found
            real = builder.bitcast(found, ir.DoubleType())
            return builder.fptrunc(real, ir.FloatType()) if ty == types.float32 else real

        return value(sig.return_type, block.block)

    return _type(block.block, block.storage, iter(block.floats))(block), codegen
