"""How the tests compare fastloss with torch: the same call three times, ours, torch's, and torch's in float64 for the truth."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
REDUCTIONS = ("none", "mean", "sum")
Tensors = dict[str, Tensor | None]
foreseen = pytest.mark.skipif(
    torch.__version__ < (2, 8), reason="no foresight before torch 2.8: it cannot say whether saved tensors are hooked"
)


def on_device(cpu: float, cuda: float) -> float:
    """A limit where the tests make their tensors: exp and division of CUDA's kernels are good to 2 ulp, those of the CPU's to about one.
    docs/numerics.md says where that shows."""
    return cpu if torch.get_default_device().type == "cpu" else cuda


def gaps(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What no call may look at: NaN, or class numbers that are no classes (the last one of a byte)."""
    return torch.full(shape, float("nan") if dtype.is_floating_point else -1 if dtype.is_signed else 255, dtype=dtype)


def padded(tensor: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Rows with a gap between them."""
    leaf = gaps((*tensor.shape[:-1], tensor.shape[-1] + 3), tensor.dtype)
    leaf[..., : tensor.shape[-1]] = tensor
    return leaf, lambda leaf: leaf[..., : tensor.shape[-1]]


def every_other(tensor: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """A gap after every number."""
    leaf = gaps((*tensor.shape[:-1], tensor.shape[-1] * 2), tensor.dtype)
    leaf[..., ::2] = tensor
    return leaf, lambda leaf: leaf[..., ::2]


def misaligned(tensor: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """One element behind an aligned address."""
    leaf = gaps((tensor.numel() + 2,), tensor.dtype)
    leaf[1:-1] = tensor.reshape(-1)
    return leaf, lambda leaf: leaf[1:-1].view(tensor.shape)


def transposed(tensor: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The first two dimensions the other way round in memory."""
    if tensor.dim() < 2:
        return tensor.clone(), lambda leaf: leaf
    return tensor.transpose(0, 1).contiguous(), lambda leaf: leaf.transpose(0, 1)


def channels_last(tensor: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Dimension 1 is the innermost in memory."""
    if tensor.dim() < 2:
        return tensor.clone(), lambda leaf: leaf
    return tensor.movedim(1, -1).contiguous(), lambda leaf: leaf.movedim(-1, 1)


def expanded(tensor: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The first row again and again, stride 0."""
    return tensor[:1].clone(), lambda leaf: leaf.expand(tensor.shape)


def reversed_dims(tensor: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """All dimensions the other way round in memory."""
    dims = tuple(range(tensor.dim()))[::-1]
    return tensor.permute(dims).contiguous(), lambda leaf: leaf.permute(dims)


def column(tensor: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The middle of three tensors that lie interleaved: `labels[:, 1]`."""
    gap = gaps(tensor.shape, tensor.dtype)
    return torch.stack((gap, tensor, gap), -1), lambda leaf: leaf[..., 1]


LAYOUTS: dict[str, Callable[[Tensor], tuple[Tensor, Callable[[Tensor], Tensor]]]] = {
    "contiguous": lambda tensor: (tensor.clone(), lambda leaf: leaf),
    "padded": padded,
    "every_other": every_other,
    "misaligned": misaligned,
    "transposed": transposed,
    "channels_last": channels_last,
    "expanded": expanded,
    "reversed_dims": reversed_dims,
    "column": column,
}


class NotServed(AssertionError):
    """A call that went to torch, with the reason."""


def kernel_call(function: str, *args: Any, **options: Any) -> Tensor:
    """fastloss's function, and the proof that its kernels served the call."""
    call = getattr(fastloss, function)
    route = fastloss.explain(call, *args, **options)
    if route.path != "kernel":
        raise NotServed(route.reason)
    result: Tensor = call(*args, **options)
    return result


def copy_of(tensor: Tensor) -> Tensor:
    """The same numbers in the same strides, at the same offset, between the same gaps: what clone() keeps of these depends on them."""
    storage = tensor.detach().untyped_storage().clone()
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


def value_and_gradients(
    call: Callable[..., Tensor],
    leaves: Tensors,
    views: dict[str, Callable[[Tensor], Tensor]],
    wanted: tuple[str, ...],
    dloss: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    """What `call` makes of views of the leaves, and the gradients of the wanted leaves; dloss None is a forward without a graph."""
    leaves = {k: None if t is None else copy_of(t).requires_grad_(k in wanted and dloss is not None) for k, t in leaves.items()}
    value = call(**{k: None if t is None else views.get(k, lambda leaf: leaf)(t) for k, t in leaves.items()})
    if dloss is None or not wanted:
        return value.detach(), []
    return value.detach(), list(torch.autograd.grad(value, [leaves[k] for k in wanted], dloss))


def assert_no_worse(mine: Tensor, theirs: Tensor, truth: Tensor, what: str, ulps: float = 2, scale: float = 0) -> None:
    """Shape and dtype are torch's; NaN and infinities are torch's or the truth's; error at most twice torch's plus some ulp of the scale.

    `scale` is that of the numbers which cancel in the result; it cannot be less than the result's.
    """
    assert mine.shape == theirs.shape, f"{what}: shape {tuple(mine.shape)}, torch {tuple(theirs.shape)}"
    assert mine.dtype == theirs.dtype, f"{what}: {mine.dtype}, torch {theirs.dtype}"
    if mine.numel() == 0:
        return
    wide, other = mine.double(), theirs.double()
    represented = truth.to(mine.dtype).double()
    odd = ~wide.isfinite()
    same = (wide == other) | (wide.isnan() & other.isnan()) | (wide == represented) | (wide.isnan() & represented.isnan())
    assert bool(same[odd].all()), (
        f"{what}: {wide[odd][:5].tolist()}, torch {other[odd][:5].tolist()}, truth {represented[odd][:5].tolist()}"
    )
    lost = ~odd & ~other.isfinite() & ~represented.isfinite()
    assert not bool(lost.any()), f"{what}: {wide[lost][:5].tolist()}, torch {other[lost][:5].tolist()}"
    fine = ~odd & represented.isfinite()
    if not bool(fine.any()):
        return
    info = torch.finfo(mine.dtype)
    if mine.dtype == torch.float64:
        ulps *= 4  # the truth is rounded as well; test_numerics has more digits
    scale = max(scale, truth[fine].abs().max().item())
    both = fine & other.isfinite()
    theirs_off = (other - truth)[both].abs().max().item() if bool(both.any()) else 0.0
    off = (wide - truth)[fine].abs().max().item()
    allowed = 2 * theirs_off + ulps * (scale * info.eps + info.smallest_normal * (info.eps if info.bits == 16 else 1))
    assert off <= allowed, f"{what}: error {off:.3g}, torch's {theirs_off:.3g}, allowed {allowed:.3g}, scale {scale:.3g}"


def check(
    function: str,
    tensors: Tensors,
    *,
    wanted: tuple[str, ...] = ("input",),
    layouts: dict[str, str] | None = None,
    ulps: float = 2,
    scale: float = 0,
    value_scale: float = 0,
    seed: int = 0,
    **options: Any,
) -> None:
    """Compare value and gradients with torch's and with the truth, under a random upstream gradient; and the value without autograd.

    `layouts` says how arguments lie in memory, and under "dloss" how the upstream gradient does. `scale` is for the gradients and
    `value_scale` for the value: see `assert_no_worse`.
    """
    layouts = layouts or {}
    leaves, views = dict(tensors), {}
    for name, layout in layouts.items():
        tensor = tensors.get(name)
        if tensor is not None:
            leaves[name], views[name] = LAYOUTS[layout](tensor)

    def mine(**arguments: Any) -> Tensor:
        return kernel_call(function, **arguments, **options)

    def theirs(**arguments: Any) -> Tensor:
        if function == "nll_loss":  # torch's backward cannot do channels last ("grad_input must be contiguous")
            arguments["input"] = arguments["input"].contiguous()
        result: Tensor = getattr(F, function)(**{**options, **arguments})
        return result

    value, _ = value_and_gradients(theirs, leaves, views, wanted, None)
    dloss = (torch.randn(value.shape, generator=torch.Generator().manual_seed(seed), device="cpu") * 1.7).to(value)
    if "dloss" in layouts:
        leaf, view = LAYOUTS[layouts["dloss"]](dloss)
        dloss = view(leaf)
    expected, expected_gradients = value_and_gradients(theirs, leaves, views, wanted, dloss)
    wide = {k: t.double() if t is not None and t.is_floating_point() else t for k, t in leaves.items()}
    wide_options = {"dtype": torch.float64} if options.get("dtype") else {}
    truth, true_gradients = value_and_gradients(partial(theirs, **wide_options), wide, views, wanted, dloss.double())
    result, gradients = value_and_gradients(mine, leaves, views, wanted, dloss)
    assert_no_worse(result, expected, truth, f"{function} value", ulps, value_scale)
    for name, g, e, t in zip(wanted, gradients, expected_gradients, true_gradients, strict=True):
        assert_no_worse(g, e, t, f"{function} gradient of {name}", ulps, scale)
    without_graph, _ = value_and_gradients(mine, leaves, views, wanted, None)
    assert torch.equal(without_graph.nan_to_num(12345.0), result.nan_to_num(12345.0)), "the value depends on requires_grad"


def class_inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    ignored: int | None = None,
    weighted: bool = False,
    soft: bool = False,
    spread: float = 3.0,
) -> Tensors:
    """Logits (N, C, ...), targets of either kind and a class weight. Every fourth target is `ignored`; the last class always occurs."""
    classes = shape[1] if len(shape) > 1 else shape[0]
    logits = (torch.randn(shape) * spread).to(dtype)
    if soft:
        target = torch.softmax(torch.randn(shape), 1 if len(shape) > 1 else 0).to(dtype)
    else:
        target = torch.randint(classes, shape[:1] + shape[2:] if len(shape) > 1 else ())
        flat = target.view(-1)
        flat[-1:] = classes - 1
        if ignored is not None and flat.numel() > 1:
            flat[::4] = ignored
    return {"input": logits, "target": target, "weight": (torch.rand(classes) + 0.1).to(dtype) if weighted else None}


ARGUMENTS = {
    "cross_entropy": ("input", "target", "weight", "dloss"),
    "cross_entropy, smoothed": ("input", "target", "weight", "dloss"),
    "cross_entropy, probabilities": ("input", "target", "weight", "dloss"),
    "nll_loss": ("input", "target", "weight", "dloss"),
    "softmax": ("input", "dloss"),
    "log_softmax": ("input", "dloss"),
    "binary_cross_entropy_with_logits": ("input", "target", "weight", "pos_weight", "dloss"),
    "binary_cross_entropy": ("input", "target", "weight", "dloss"),
}
"""The tensors of every call; "dloss" is the upstream gradient."""


def check_layouts(call: str, layouts: dict[str, str], shape: tuple[int, ...], dtype: torch.dtype, **options: Any) -> None:
    """`check` for a call of `ARGUMENTS` with random tensors, some of which are laid out as `layouts` says."""
    function, soft = call.split(",")[0], "probabilities" in call
    if "softmax" in call:
        tensors: Tensors = {"input": (torch.randn(shape) * 3).to(dtype)}
        options["dim"] = min(1, len(shape) - 1)
    elif "binary" in call:
        tensors = {name: (torch.rand(shape) * 0.9 + 0.05).to(dtype) for name in ARGUMENTS[call][:-1]}
    else:
        tensors = class_inputs(shape, dtype, ignored=None if soft else -100, weighted=True, soft=soft)
    if "smoothed" in call:
        options["label_smoothing"] = 0.1
    check(function, tensors, wanted=("input", "target") if soft else ("input",), layouts=layouts, ulps=8, scale=4.0, **options)
