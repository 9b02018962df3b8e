"""What a measuring process can be asked for (see `child`)."""

from typing import Any

import torch

from . import accuracy
from .cases import Case, make_inputs
from .footprint import peak_memory
from .providers import PROVIDERS
from .runner import Runner, configured


class Desk:
    """Keeps one prepared case."""

    runner: Runner

    def serve(self, request: dict[str, Any]) -> Any:
        return getattr(self, "do_" + request.pop("do"))(**request)

    def do_prepare(self, provider: str, case: str, inputs: int, threads: int) -> None:
        torch.set_num_threads(threads)
        wanted = Case.from_key(case)
        self.runner = Runner(PROVIDERS[provider], wanted, make_inputs(wanted, inputs))

    def do_check(self, truth: str) -> list[float]:
        """The error of one step; this process has the same inputs as its parent, since it has the same seed."""
        output, gradient, _ = self.runner.results(0, keep=True)
        error = accuracy.error_of(torch.load(truth, weights_only=False), output, gradient)
        return [error.output, error.gradient]

    def do_step(self, turn: int) -> list[float]:
        return list(self.runner.step(turn))

    def do_memory(self, provider: str, case: str, threads: int) -> dict[str, int]:
        torch.set_num_threads(threads)
        return peak_memory(PROVIDERS[provider], Case.from_key(case))

    def do_startup(self, provider: str, case: str) -> dict[str, float]:
        """Seconds of the first and the second step of this process."""
        wanted = Case.from_key(case)
        runner = Runner(PROVIDERS[provider], wanted, make_inputs(wanted, 1))
        with configured({"min_numel": 0}):
            first = runner.step(0).step
            second = runner.step(0).step
        return {"first step": first, "second step": second}
