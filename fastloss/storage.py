"""Whether a tensor still has its memory."""

from torch import Tensor


def is_in_its_storage(t: Tensor) -> bool:
    """Whether every element lies in memory that the tensor still has: a storage may have been freed or cut (`resize_`, FSDP)."""
    length = extent(t)
    return not length or (t.storage_offset() + length) * t.element_size() <= t.untyped_storage().nbytes()


def extent(t: Tensor) -> int:
    """How many elements lie between the first one of a tensor and the end of the last."""
    count = t.numel()
    return count if not count or t.is_contiguous() else 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))


def present(t: Tensor, name: str) -> Tensor:
    """The tensor, if it still has its memory: torch's own operations would not all ask."""
    if not is_in_its_storage(t):
        raise RuntimeError(
            f"{name}: the storage of {t.dtype} {tuple(t.shape)} holds {t.untyped_storage().nbytes()} bytes: it was freed or cut"
        )
    return t
