"""Which arguments the kernels serve: what losses have in common. Each function returns None, or in words what does not fit; torch then
serves, or raises."""

import math
from typing import Any

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from .loss import COMPUTE

REDUCTIONS = ("none", "mean", "sum")


def tensors_misfit(logits: Any, *required: Any, optional: tuple[Any, ...] = ()) -> str | None:
    """What every loss asks first, of all its tensors. Nothing is asked of a tensor before it is known to be plain:
    subclasses and modes must see torch's function, and only that."""
    present = (logits, *required, *(t for t in optional if t is not None))
    compiling = torch.compiler.is_compiling()
    if not compiling and _C._is_torch_function_mode_enabled() and not _only_a_default_device():
        return "a torch function mode is active"
    for tensor in present:
        if not isinstance(tensor, Tensor):
            return f"{type(tensor).__name__} is not a Tensor"
        if not compiling and type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
            return f"{type(tensor).__name__} is a tensor subclass"
        if tensor.is_nested or tensor.layout != torch.strided or tensor.device != logits.device:
            return "the tensors are not all strided and on one device"
    if not compiling and not plain(*present):
        return "a functorch transform, forward-mode level, trace or mode is active"
    return None if logits.dtype in COMPUTE else f"there are no kernels for {logits.dtype}"


def plain(*tensors: Tensor | None) -> bool:
    """True if nothing but the numbers in memory matters: no subclass, vmap, forward-mode level, trace, mode or lazy tensor."""
    for t in tensors:
        if t is None:
            continue
        if type(t) is not Tensor and type(t) is not torch.nn.Parameter:
            return False
        # a lazy minus sign; no memory at all; a batch of `is_grads_batched`
        if t.is_neg() or t._is_zerotensor() or _is_legacy_batchedtensor(t):
            return False
    return (
        not _C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and _C._get_tracing_state() is None
        and _C._len_torch_dispatch_stack() == 0
        and (not _C._is_torch_function_mode_enabled() or _only_a_default_device())
    )


_is_legacy_batchedtensor = _C._functorch.is_legacy_batchedtensor


def autocast_is_active(input: Tensor) -> bool:
    # torch cannot say so of every device; before 2.12, whether it can cannot be traced
    return input.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(input.device.type)


def _only_a_default_device() -> bool:
    """Whether the active modes are those of torch.set_default_device and `with torch.device(...)`: they move new tensors only, and ours
    name their device."""
    return all(type(mode) is DeviceContext for mode in torch.overrides._get_current_function_mode_stack())


def reduction_misfit(size_average: Any, reduce: Any, reduction: Any) -> str | None:
    if size_average is not None or reduce is not None:
        return "size_average and reduce are deprecated"
    return None if reduction in REDUCTIONS else f"{reduction!r} is not a reduction"


def is_int64(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and -(2**63) <= number < 2**63


def class_weight_misfit(logits: Tensor, weight: Tensor | None) -> str | None:
    if weight is None:
        return None
    if weight.dim() != 1 or weight.shape[0] != (logits.shape[0] if logits.dim() == 1 else logits.shape[1]):
        return f"weight of shape {tuple(weight.shape)} is not one number for each class"
    if COMPUTE.get(weight.dtype) != COMPUTE[logits.dtype]:
        return f"weight is {weight.dtype}, logits are computed with in {COMPUTE[logits.dtype]}"
    return "weight requires a gradient" if weight.requires_grad else None


def dtype_misfit(logits: Tensor, name: str, other: Tensor | None) -> str | None:
    """Where torch takes nothing but the logits' own dtype."""
    return None if other is None or other.dtype == logits.dtype else f"{name} is {other.dtype}, logits are {logits.dtype}"


def class_indices_misfit(logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: Any) -> str | None:
    if target.dtype != torch.int64 and not (target.dtype == torch.uint8 and logits.dim() <= 2):
        return f"target is {target.dtype}, not int64 (or uint8, for logits without positions)"
    shape = logits.shape[:1] + logits.shape[2:] if logits.dim() > 1 else torch.Size(())
    if logits.dim() == 0 or (target.shape != shape and not (logits.dim() == 1 and target.shape == (1,))):
        return f"target of shape {tuple(target.shape)} does not belong to logits of shape {tuple(logits.shape)}"
    if not is_int64(ignore_index):
        return f"ignore_index is {ignore_index!r}"
    return class_weight_misfit(logits, weight)


def smoothing_misfit(logits: Tensor, label_smoothing: Any) -> str | None:
    if not isinstance(label_smoothing, (float, int)) or not 0 <= label_smoothing <= 1:
        return f"label_smoothing is {label_smoothing!r}"
    if logits.dim() > 0 and logits.shape[min(1, logits.dim() - 1)] == 0:
        return "there are no classes"
    return None


def linear_misfit(input: Tensor, weight: Tensor, bias: Tensor | None, o: Any) -> str | None:
    """Of a linear layer that is computed with the loss of its logits."""
    if input.dim() not in (1, 2) or weight.dim() < 2 or (weight.dim() > 2 and input.dim() == 1) or input.shape[-1] != weight.shape[-1]:
        return f"input of shape {tuple(input.shape)}, linear_weight of shape {tuple(weight.shape)}"
    if bias is not None and bias.shape != weight.shape[:-1]:
        return f"linear_bias of shape {tuple(bias.shape)}, linear_weight of shape {tuple(weight.shape)}"
    if 0 in (*input.shape, *weight.shape):
        return "there is nothing to multiply"
    for name, t in (("input", input), ("linear_weight", weight), ("linear_bias", bias)):
        if t is None or t.dtype is o.products:
            continue
        if o.dtype is o.products or t.dtype not in COMPUTE or t.dtype is torch.float64:
            return f"{name} is {t.dtype}, the products are {o.products}"
    if not isinstance(o.logit_scale, (int, float)) or not 0 <= o.logit_softcap < math.inf or o.chunk_rows < 0:
        return f"logit_scale is {o.logit_scale!r}, logit_softcap {o.logit_softcap!r}, chunk_rows {o.chunk_rows!r}"
    return None if o.sums in (o.products, COMPUTE[o.products]) else f"sums of {o.products} in {o.sums}"


def elementwise_misfit(logits: Tensor, target: Tensor, *weights: Tensor | None) -> str | None:
    if target.shape != logits.shape or COMPUTE.get(target.dtype) != COMPUTE[logits.dtype]:
        return f"target is {target.dtype} of shape {tuple(target.shape)}, input {logits.dtype} of shape {tuple(logits.shape)}"
    if target.requires_grad:
        return "target requires a gradient"
    for weight in weights:
        if weight is None:
            continue
        # torch computes with the weight's own integers, and unsigned ones wrap: 0 - 1 is 255
        if weight.requires_grad or weight.dtype.is_complex or not weight.dtype.is_signed:
            return f"a weight is {weight.dtype} or requires a gradient"
        missing = logits.dim() - weight.dim()
        if missing < 0 or any(w not in (1, s) for w, s in zip(weight.shape, logits.shape[missing:], strict=True)):
            return f"a weight of shape {tuple(weight.shape)} cannot be broadcast to {tuple(logits.shape)}"
    return None


def refuse_inplace(logits: Tensor, *others: Tensor | None) -> None:
    """Raise RuntimeError where overwriting the logits with their gradient would be wrong."""
    problem = None
    owner = logits if logits._base is None else logits._base
    memory = logits.untyped_storage().data_ptr()
    if owner.requires_grad and owner.is_leaf:
        problem = "the logits are (a view of) a leaf that requires a gradient, and would be lost"
    elif _may_overlap(logits):
        problem = f"logits with strides {tuple(logits.stride())} share memory among themselves"
    elif logits.numel() and any(t is not None and t.untyped_storage().data_ptr() == memory for t in others):
        problem = "target or weight shares the memory of the logits"
    elif logits.dim() > 3 and logits.numel() and logits.flatten(2).data_ptr() != logits.data_ptr():
        problem = f"logits with strides {tuple(logits.stride())} are no [N, C, positions] without a copy"
    if problem is not None:
        raise RuntimeError(f"inplace_backward: {problem}")


def _may_overlap(tensor: Tensor) -> bool:
    """Whether two elements might share memory: a dimension does not reach beyond all smaller ones."""
    reach = 0
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False
