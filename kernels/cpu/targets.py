"""What the kernels found and would not compute with, as torch's exceptions."""

from torch import Tensor


def refuse_out_of_bounds(target: Tensor, classes: int, ignore_index: int) -> None:
    """Raise for the first class index that is not a class; it was not used as an index."""
    bad = target[(target != ignore_index) & ((target < 0) | (target >= classes))]
    raise IndexError(f"Target {int(bad[0])} is out of bounds.")


def refuse_improbable(prob: Tensor) -> None:
    """Raise for a number outside [0, 1] or NaN, in `prob` or else in the target."""
    name = "target" if bool(((prob >= 0) & (prob <= 1)).all()) else "input"
    raise RuntimeError(f"all elements of {name} should be between 0 and 1")
