"""What Triton makes of a launch: looked at without changing a kernel."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def watched(launch: bool = True) -> Iterator[list[dict[str, Any]]]:
    """Within, every kernel that Triton launches is noted with its grid, warps, registers and spills; without `launch` it is only
    compiled, and its tensors need no memory."""
    from triton.runtime.jit import JITFunction

    noted: list[dict[str, Any]] = []
    run = JITFunction.run

    def noting(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=warmup or not launch, **options)
        if kernel is not None:
            facts = {"kernel": self.__name__, "grid": list(grid), "warps": options.get("num_warps"), "ctas": options.get("num_ctas", 1)}
            noted.append(facts | {"regs": getattr(kernel, "n_regs", None), "spills": getattr(kernel, "n_spills", None)})
        return kernel

    JITFunction.run = noting
    try:
        yield noted
    finally:
        JITFunction.run = run
