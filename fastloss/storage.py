"""Whether a tensor still has its memory."""

from torch import Tensor


def is_in_its_storage(t: Tensor) -> bool:
    """Whether every element lies in memory that the tensor still has: a storage may have been freed or cut (`resize_`, FSDP)."""
    count = t.numel()
    if not count:
        return True
    last = count if t.is_contiguous() else 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return (t.storage_offset() + last) * t.element_size() <= t.untyped_storage().nbytes()


def present(t: Tensor, name: str) -> Tensor:
    """The tensor, if it still has its memory: torch's own operations would not all ask."""
    if not is_in_its_storage(t):
        raise RuntimeError(
            f"{name}: the storage of {t.dtype} {tuple(t.shape)} holds {t.untyped_storage().nbytes()} bytes: it was freed or cut"
        )
    return t
