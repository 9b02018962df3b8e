"""cross_entropy of a DTensor: sharded on its classes it is `vocab_parallel_cross_entropy`; sharded on its rows, the loss of the local rows
and a sum over ranks; both at once on a mesh of two dimensions. Everything else goes to torch."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .routing import noted
from .serving import result_dtype
from .vocab_parallel import vocab_parallel_cross_entropy


class Plan(NamedTuple):
    """Which dimensions of the mesh the classes (at most one) and the rows are sharded on."""

    classes: int | None
    rows: tuple[int, ...]
    note: str  # for `explain`


def is_dtensor(tensor: Any) -> bool:
    """Asked of the type's name: torch.distributed.tensor is slow to import."""
    return type(tensor).__name__ == "DTensor" and type(tensor).__module__.startswith("torch.distributed")


def plan_of(input: Any, target: Any, weight: Any) -> Plan | str:
    """How these tensors are served, or why not."""
    if not is_dtensor(input):
        return f"{type(input).__name__} is a tensor subclass"
    if torch.compiler.is_compiling():
        return "a DTensor under a compiler"
    class_dim, mesh, placements = min(1, input.dim() - 1), input.device_mesh, input.placements
    shards = {i: p for i, p in enumerate(placements) if type(p).__name__ == "Shard"}
    if not shards or any(not p.is_replicate() for i, p in enumerate(placements) if i not in shards):
        return f"a DTensor placed as {placements}"
    classes = [i for i, p in shards.items() if p.dim % input.dim() == class_dim]
    rows = tuple(i for i in shards if i not in classes)
    if len(classes) > 1 or len({shards[i].dim % input.dim() for i in rows}) != len(rows):
        return f"a DTensor with one dimension sharded twice: {placements}"
    soft = isinstance(target, Tensor) and target.is_floating_point()
    expected = [_of_target(placements[i], soft, i in classes) for i in range(mesh.ndim)]
    if is_dtensor(target):
        if target.device_mesh != mesh or [_key(p) for p in target.placements] != expected:
            return f"input is placed as {placements}, target as {target.placements}"
    elif rows or soft or not isinstance(target, Tensor):
        return f"input is placed as {placements}, target is no DTensor"
    if is_dtensor(weight) and (weight.device_mesh != mesh or any(not p.is_replicate() for p in weight.placements)):
        own = [("shard", 0) if i in classes else ("replicate", 0) for i in range(mesh.ndim)]
        if weight.device_mesh != mesh or [_key(p) for p in weight.placements] != own:
            return f"input is placed as {placements}, weight as {weight.placements}"
    found = [f"; classes sharded over {mesh.size(classes[0])} ranks: vocab_parallel_cross_entropy"] if classes else []
    found += [f"; rows sharded over {' x '.join(str(mesh.size(i)) for i in rows)} ranks: the local rows, then a sum"] if rows else []
    return Plan(classes[0] if classes else None, rows, "".join(found))


def _key(placement: Any) -> tuple[str, int]:
    return ("shard", placement.dim) if type(placement).__name__ == "Shard" else ("replicate" if placement.is_replicate() else "other", 0)


def _of_target(placement: Any, soft: bool, of_classes: bool) -> tuple[str, int]:
    """How the target must lie where the logits lie as `placement` says."""
    kind, dim = _key(placement)
    if kind != "shard" or soft:
        return kind, dim
    return ("replicate", 0) if of_classes else ("shard", _without_classes(dim))


def _without_classes(dim: int) -> int:
    """A dimension of rows, counted among those alone: classes are dimension 1."""
    return dim - 1 if dim > 1 else dim


def cross_entropy(plan: Plan, local: Callable[..., Tensor], input: Any, target: Any, weight: Any, options: dict[str, Any]) -> Tensor:
    """The loss as a DTensor: replicated; for 'none', sharded as the rows are. `local` is `cross_entropy` of plain tensors, `options` what
    it takes besides."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    mesh, class_dim, reduction = input.device_mesh, min(1, input.dim() - 1), options["reduction"]
    x, y, w = _local(input), _local(target), _local(weight)
    if plan.classes is not None:
        classes, place = input.shape[class_dim], mesh.get_local_rank(plan.classes)
        start = min(classes, place * -(-classes // mesh.size(plan.classes)))  # as torch.chunk cuts
        local, options = vocab_parallel_cross_entropy, {**options, "group": mesh.get_group(plan.classes), "vocab_start": start}
        if w is not None and not (is_dtensor(weight) and weight.placements[plan.classes].is_shard()):
            w = w[start : start + x.shape[class_dim]]
    if plan.rows and reduction == "mean":
        options = {**options, "reduction": "sum"}
    half = plan.rows and reduction != "none" and x.dtype in (torch.float16, torch.bfloat16)
    dtype = result_dtype(x, y, w) if y.is_floating_point() else result_dtype(x)
    # a sum over rows is float32: in float16 it would overflow before it is divided
    with noted(plan.note), torch.autocast(x.device.type, x.dtype) if half else nullcontext():
        loss = local(x, y, weight=w, **options)
    whole: list[Any] = [Replicate()] * mesh.ndim
    if reduction == "none":
        placements = [Shard(_without_classes(input.placements[i].dim)) if i in plan.rows else Replicate() for i in range(mesh.ndim)]
        shape = (*input.shape[:class_dim], *input.shape[class_dim + 1 :])
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(loss, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)  # type: ignore[no-any-return]
    parts = [Partial() if i in plan.rows else Replicate() for i in range(mesh.ndim)]
    loss = DTensor.from_local(loss, mesh, parts, run_check=False).redistribute(placements=whole)
    if options["reduction"] == reduction:
        return loss.to(dtype)
    divisor = DTensor.from_local(_divisor(x, y, weight, options["ignore_index"]), mesh, parts, run_check=False)
    return (loss / divisor.redistribute(placements=whole).to(loss.dtype)).to(dtype)


def _divisor(x: Tensor, y: Tensor, weight: Any, ignore_index: int) -> Tensor:
    """What 'mean' divides by, of the local rows: the sum of their weights in float64."""
    if y.is_floating_point():
        return torch.tensor(float(x.numel() // max(1, x.shape[min(1, x.dim() - 1)])), dtype=torch.float64, device=x.device)
    counts = y != ignore_index
    if weight is None:
        return counts.sum(dtype=torch.float64)
    w: Tensor = weight.full_tensor() if is_dtensor(weight) else weight
    return w.double()[y.masked_fill(~counts, 0).long()].masked_fill(~counts, 0.0).sum()


def _local(tensor: Any) -> Any:
    if not is_dtensor(tensor):
        return tensor
    found = tensor.to_local(grad_placements=tensor.placements)
    return found.wait() if hasattr(found, "wait") else found
