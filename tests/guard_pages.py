#!/usr/bin/env python
"""A fuzzer: random calls of fastloss whose tensors all end, or begin, at memory that nobody may touch.

    python tests/guard_pages.py --seed 7 --cases 1

Arguments and upstream gradients lie in pages of their own, in any strides and at any offset, between pages that may not be read; their own
pages may not be written. What fastloss allocates for itself lies between such pages, too. So one element too far is a SIGSEGV, a gap that
is read is NaN or no class, and a call whose numbers are not torch's fails. Every case is printed before it starts, and depends on nothing
but its seed. `test_guard_pages` runs this in a child process and says which seeds died or failed.
"""

import argparse
import contextlib
import faulthandler
import math
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from answers import ALL, composed
from entries import PAD, dense
from guarded import WRITE, Layout, guarded_results, overlaps, read_only
from helpers import DTYPES, REDUCTIONS, assert_no_worse
from torch import Tensor

import fastloss
from fastloss.kernels.cpu import rows

# around vectors of 8, 16 and 32 numbers, rows in lanes or not, blocks of 128 vectors, rows kept whole or not
SIZES = [*range(1, 10), 15, 16, 17, *range(31, 50), 63, 64, 65, 127, 128, 129, 255, 256, 257]
LONG = [1000, 1023, 1024, 1025, 2047, 2048, 2049, 4095, 4097, 8191, 8192, 8193, 20011]
FUNCTIONS = ["cross_entropy", "cross_entropy", "cross_entropy of probabilities", "cross_entropy of probabilities", "nll_loss", "softmax",
             "log_softmax", "binary_cross_entropy_with_logits", "binary_cross_entropy_with_logits", "binary_cross_entropy",
             "sparse_soft_cross_entropy", "sparse_soft_cross_entropy", "token_statistics", "token_statistics"]  # fmt: skip


@dataclass
class Case:
    """A call, and what of it is compared."""

    function: str
    tensors: dict[str, Tensor]
    options: dict[str, Any]
    wanted: tuple[str, ...] = ("input",)
    inplace: bool = False
    refused: bool = False
    scale: float = 0.5
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        tensors = (f"{k} {str(t.dtype)[6:]} {list(t.shape)} strides {list(t.stride())}" for k, t in self.tensors.items())
        kind = ", inplace" * self.inplace + ", no class" * self.refused
        return f"{self.function}({', '.join(tensors)}, {self.options}{kind}) {self.settings}"


def make(seed: int) -> tuple[Case, Layout]:
    torch.manual_seed(seed)
    layout = Layout(seed)
    choice, chance = layout.random.choice, lambda p: layout.random.random() < p
    kind, dtype = choice(FUNCTIONS), choice(list(DTYPES.values()))
    shape = _shape(layout.random)
    spread = choice([0.1, 3.0, 3.0, 30.0])
    settings = {"threads": 3 if chance(0.1) else 1, "foresight": chance(0.7), "stream": chance(0.2)}

    def real(shape: tuple[int, ...], values: Callable[[int], Tensor]) -> Tensor:
        return layout.place(shape, dtype, values)

    if "softmax" in kind:
        wider = choice([None, None, torch.float64, torch.float64 if dtype == torch.float64 else torch.float32])
        options = {"dim": layout.random.randrange(-len(shape), len(shape)), "dtype": wider}
        return Case(kind, {"input": real(shape, lambda n: torch.randn(n) * spread)}, options, scale=4.0, settings=settings), layout
    reduction = {"reduction": choice(REDUCTIONS)}
    if "binary" in kind:
        logits = kind.endswith("with_logits")
        tensors = {
            "input": real(shape, lambda n: torch.randn(n) * spread if logits else (torch.randn(n) * 2).sigmoid()),
            "target": real(shape, torch.rand),
        }
        for name in ("weight", "pos_weight")[: 1 + logits]:
            if chance(0.5):
                kept = shape[layout.random.randint(0, len(shape)) :]
                tensors[name] = real(tuple(size if chance(0.6) else 1 for size in kept), lambda n: torch.rand(n) + 0.1)
        return Case(kind, tensors, reduction, settings=settings), layout
    if kind == "sparse_soft_cross_entropy":
        return _sparse(shape, layout, real, reduction | {"label_smoothing": choice([0.0, 0.0, 0.1, 1.0])}, settings), layout
    if kind == "token_statistics":
        return _statistics(shape, layout, real, settings), layout
    function, _, soft = kind.partition(" of ")
    classes, rows = shape[min(1, len(shape) - 1)], shape[:1] + shape[2:] if len(shape) > 1 else ()

    def inputs(count: int) -> Tensor:
        numbers = torch.randn(count) * spread
        return -numbers.abs() if function == "nll_loss" else numbers  # log-probabilities, whose sums do not cancel

    case = Case(function, {"input": real(shape, inputs)}, reduction, settings=settings)
    if soft:
        case.tensors["target"] = real(shape, lambda n: torch.rand(n) * 2 / classes)
        case.wanted = ("input", "target") if chance(0.6) else ("input",)
    else:
        ignored = choice([None, None, -100, 0, classes - 1, -1, 300])
        case.refused = chance(0.04) and math.prod(rows) > 0
        wrong = choice([classes, -2, -(2**63), 2**31, 2**63 - 1]) if case.refused else 0

        def indices(count: int) -> Tensor:
            found = torch.randint(classes, (count,))
            if ignored is not None:
                found[torch.rand(count) < 0.3] = ignored
            return torch.full((count,), wrong) if case.refused else found

        # torch takes bytes of logits without positions only
        byte = len(rows) < 2 and classes <= 255 and ignored in (None, 0, classes - 1) and not case.refused and chance(0.4)
        case.tensors["target"] = layout.place(rows, torch.uint8 if byte else torch.int64, indices)
        case.options |= {} if ignored is None else {"ignore_index": ignored}
    if chance(0.5):
        case.tensors["weight"] = real((classes,), lambda n: torch.rand(n) + 0.1)
    if function == "cross_entropy":
        case.options["label_smoothing"] = choice([0.0, 0.0, 0.1, 1.0])
        logits = case.tensors["input"]
        a_view = logits.dim() < 4 or logits.flatten(2).data_ptr() == logits.data_ptr()  # else in place is refused
        case.inplace = not case.refused and chance(0.15) and not overlaps(logits) and a_view
    return case, layout


def _sparse(shape: tuple[int, ...], layout: Layout, real: Any, options: dict[str, Any], settings: dict[str, Any]) -> Case:
    """A few classes a row, padding among them."""
    classes, per_row = shape[min(1, len(shape) - 1)], layout.random.choice([1, 2, 2, 3, 7, 64])
    entries, refused = (*shape[:1], per_row, *shape[2:]) if len(shape) > 1 else (per_row,), layout.random.random() < 0.04
    wrong = layout.random.choice([classes, -2, -(2**63), 2**31, 2**63 - 1])

    def indices(count: int) -> Tensor:
        found = torch.randint(classes, (count,))
        found[torch.rand(count) < 0.3] = PAD
        return torch.full((count,), wrong) if refused else found

    missing = layout.random.choice([0, 0, 0, *range(len(entries))])
    broadcast = tuple(n if layout.random.random() < 0.7 else 1 for n in entries[missing:]) if missing else entries
    tensors = {
        "input": real(shape, torch.randn),
        "indices": layout.place(entries, torch.int64, indices),
        "probabilities": real(broadcast, lambda n: torch.rand(n) / per_row),
    }
    if layout.random.random() < 0.5:
        tensors["weight"] = real((classes,), lambda n: torch.rand(n) + 0.1)
    wanted = layout.random.choice([("input",), ("input", "probabilities")])
    return Case("sparse_soft_cross_entropy", tensors, options, wanted, refused=refused and math.prod(entries) > 0, settings=settings)


def _statistics(shape: tuple[int, ...], layout: Layout, real: Any, settings: dict[str, Any]) -> Case:
    """Some of the answers, for one target a row or a few, some of them ignored."""
    chosen, dim = layout.random, layout.random.choice([dim for dim in range(-len(shape), len(shape)) if shape[dim]])
    classes, positions = shape[dim], [n for i, n in enumerate(shape) if i != dim % len(shape)]
    ignored, per_row = chosen.choice([-100, 0, classes - 1]), chosen.choice([0, 0, 1, 2, 3, 7, 64])
    wrong, refused = chosen.choice([classes, -2, -(2**63), 2**31, 2**63 - 1]), chosen.random() < 0.04 and math.prod(positions) > 0

    def indices(count: int) -> Tensor:
        found = torch.randint(classes, (count,))
        found[torch.rand(count) < 0.4] = ignored
        return torch.full((count,), wrong) if refused else found

    rows = tuple(positions) + ((per_row,) if per_row else ())
    tensors = {"input": real(shape, torch.randn), "target": layout.place(rows, torch.int64, indices)}
    outputs = [name for name in ALL if chosen.random() < 0.6 or name == "log_prob"]
    options = {"dim": dim, "ignore_index": ignored, "logit_scale": chosen.choice([1.0, 0.3]), "outputs": outputs}
    return Case("token_statistics", tensors, options, refused=refused, scale=4.0 * max(1, per_row), settings=settings)


def _joined(function: Callable[..., Any]) -> Callable[..., Tensor]:
    """A function of several answers as one of a tensor that has them all."""

    def call(**arguments: Any) -> Tensor:
        found = function(**arguments)._asdict()
        return torch.cat([found[name].to(found["log_prob"].dtype).reshape(-1) for name in arguments["outputs"]])

    return call


def calls_of(function: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Ours and what it is held against."""
    if function == "token_statistics":
        return _joined(fastloss.token_statistics), _joined(composed)
    return getattr(fastloss, function), getattr(F, function, dense)


def _shape(chosen: random.Random) -> tuple[int, ...]:
    """(C,), (N, C) or (N, C, ...), some thousand numbers; some without any."""
    if chosen.random() < 0.1:
        return (chosen.randint(1, 3), chosen.choice(LONG))
    rows, classes = chosen.choice([1, 1, 2, 3, *SIZES]), chosen.choice(SIZES)
    shape = (
        rows if classes < 100 else rows % 20 + 1,
        classes,
        *(chosen.randint(1, 5) for _ in range(chosen.choice([0, 0, 0, 1, 1, 2, 3]))),
    )
    if chosen.random() < 0.06:
        return shape[1:2]
    while math.prod(shape) > 30_000:
        shape = (shape[0] // 2 + 1, *shape[1:]) if shape[0] > 2 else shape[:-1]
    if chosen.random() < 0.03:
        empty = chosen.choice([dim for dim in range(len(shape)) if dim != 1])
        return (*shape[:empty], 0, *shape[empty + 1 :])
    return shape


@contextlib.contextmanager
def settings_of(case: Case) -> Iterator[None]:
    """Those of the case, and nothing that an earlier case left."""
    fastloss.foresight._last.clear()
    with (
        mock.patch.object(fastloss.config, "foresight_max_bytes", 1 << 30 if case.settings["foresight"] else 0),
        mock.patch.object(rows, "STREAM_BYTES", 0 if case.settings["stream"] else 1 << 25),
    ):
        torch.set_num_threads(case.settings["threads"])
        try:
            yield
        finally:
            torch.set_num_threads(1)


class _Given(torch.autograd.Function):
    """Logits that are no leaf and lie where we want: what another layer would have computed."""

    @staticmethod
    def forward(ctx: Any, start: Tensor, logits: Tensor) -> Tensor:
        return torch.empty(0, dtype=logits.dtype).set_(logits.untyped_storage(), logits.storage_offset(), logits.shape, logits.stride())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None


def _differentiate(call: Callable[..., Tensor], case: Case, dloss: Tensor | None, tensors: dict[str, Tensor]) -> list[Tensor]:
    leaves = {k: t.requires_grad_(k in case.wanted) for k, t in tensors.items()}
    value = call(**leaves, **case.options)
    return [value.detach(), *torch.autograd.grad(value, [leaves[k] for k in case.wanted], dloss)]


def ours(case: Case, dloss: Tensor | None) -> list[Tensor]:
    call, _ = calls_of(case.function)
    if not case.inplace:
        return _differentiate(call, case, dloss, {k: t.detach() for k, t in case.tensors.items()})
    start = case.tensors["input"].detach().clone().requires_grad_()
    logits = read_only(case.tensors["input"], WRITE)

    def in_place(input: Tensor, **arguments: Any) -> Tensor:
        return call(_Given.apply(input, logits), **arguments, inplace_backward=True)

    return _differentiate(in_place, case, dloss, {k: t.detach() for k, t in case.tensors.items()} | {"input": start})


def run(case: Case, layout: Layout) -> bool:
    """Whether the kernels served it; AssertionError or any exception if it is wrong."""
    for tensor in case.tensors.values():
        read_only(tensor)
    call, reference = calls_of(case.function)
    served = fastloss.explain(call, **case.tensors, **case.options).path == "kernel"
    # torch takes bytes in some of its branches only
    plain = {
        k: (t if t.is_floating_point() else t.long()).detach().clone(memory_format=torch.contiguous_format) for k, t in case.tensors.items()
    }
    before = _bytes(case.tensors)
    if case.refused:
        with settings_of(case), guarded_results(layout):
            try:
                call(**case.tensors, **case.options)
            except IndexError:
                return served
        raise AssertionError("what is no class was accepted")
    value = reference(**plain, **case.options)
    number = layout.random.choice([torch.ones, torch.randn]) if value.dim() == 0 else torch.randn
    dloss = read_only(layout.place(tuple(value.shape), value.dtype, lambda n: number(n) * (1 if number is torch.ones else 1.7)))
    with settings_of(case), guarded_results(layout):
        without_graph = call(**case.tensors, **case.options)
        found = ours(case, dloss)
    theirs = _differentiate(reference, case, dloss.contiguous(), {k: t.clone() for k, t in plain.items()})
    wide = {k: t.double() if t.is_floating_point() else t for k, t in plain.items()}
    if case.options.get("dtype"):
        case.options["dtype"] = torch.float64
    true = _differentiate(reference, case, dloss.double(), wide)
    for name, mine, other, exact in zip(("value", *case.wanted), found, theirs, true, strict=True):
        scale = 0.0 if name == "value" else case.scale * max(1.0, float(dloss.abs().max()) if dloss.numel() else 1.0)
        assert_no_worse(mine, other, exact, name if name == "value" else f"gradient of {name}", ulps=16, scale=scale)
    assert torch.equal(without_graph.nan_to_num(12345.0), found[0].nan_to_num(12345.0)), "the value depends on requires_grad"
    if case.inplace:  # the logits are their gradient now; what lies between them is as it was
        logits = case.tensors["input"].detach()
        assert torch.equal(logits, found[1]), "the gradient is not where the logits were"
        logits.copy_(plain["input"])
    assert _bytes(case.tensors) == before, "an argument was written to"
    return served


def _bytes(tensors: dict[str, Tensor]) -> list[bytes]:
    """Everything in their storages, gaps too."""
    return [torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()).numpy().tobytes() for t in tensors.values()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the next one has the next")
    parser.add_argument("--cases", type=int, default=1000)
    options = parser.parse_args()
    faulthandler.enable()
    torch.set_num_threads(1)
    fastloss.config.min_numel = 0
    served = failed = 0
    for seed in range(options.seed, options.seed + options.cases):
        case, layout = make(seed)
        print(f"seed {seed}: {case}", flush=True)
        try:
            served += run(case, layout)
        except Exception:
            failed += 1
            print(f"FAILED {seed}: {traceback.format_exc()}", flush=True)
    print(f"{options.cases} cases, {served} by the kernels, {failed} failed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
