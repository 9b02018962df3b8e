"""The parity suite once more, on CUDA tensors. Never run by us: we have no GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastloss import rows


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the parity suite on CUDA runs on one only")
def test_parity_suite_on_cuda() -> None:
    """Thousands of specialisations are compiled: side by side where pytest-xdist is installed."""
    side_by_side = ["-n", str(min(14, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    limited = ["--timeout", "120"] if importlib.util.find_spec("pytest_timeout") else []
    command = [sys.executable, "-m", "pytest", "-m", "not long", "--maxfail", "200", "--device", "cuda", *side_by_side, *limited]
    # without it cuBLAS has no deterministic form
    done = subprocess.run(command, cwd=Path(__file__).parent, env={**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}, check=False)
    assert done.returncode == 0


def test_what_is_kept_for_later_calls_is_not_made_in_a_graph_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """There it would hold nothing until a replay, and calls outside of the graph would read that. No GPU: its tensors are the CPU's."""
    made, waited = [], []

    def ones(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        made.append(torch.full((size,), 1, dtype=dtype))
        return made[-1]

    monkeypatch.setattr(torch, "ones", ones)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(synchronize=lambda: waited.append(device)))
    where = torch.device("cuda", 77)
    for capturing in (True, False, True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda now=capturing: now)
        assert rows.ones(5, torch.float32, where).shape == (5,)
    assert len(made) == 3  # one in each capture, and one that is kept
    assert waited == [where]  # until it is filled, for streams that will not wait


def test_the_parity_suite_is_collected_on_another_device() -> None:
    """The meta device stands in for one that is not here. Test modules that make tensors of their own on the CPU are not even imported."""
    program = """
import sys, pytest
assert pytest.main(["--device", "meta", "--collect-only", "-p", "no:cacheprovider"]) == 0
print(*sorted(name for name in sys.modules if name.startswith("test_")))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    names = ("cross_entropy", "bce", "softmax", "nll_loss", "numerics", "property", "inplace", "sigmoid_focal_loss")
    parity = {f"test_{name}" for name in names}
    assert set(done.stdout.splitlines()[-1].split()) == parity
