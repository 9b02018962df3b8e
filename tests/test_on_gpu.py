"""The parity suite once more, on CUDA tensors. Never run by us: we have no GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the parity suite on CUDA runs on one only")
def test_parity_suite_on_cuda() -> None:
    """Thousands of specialisations are compiled: side by side where pytest-xdist is installed."""
    side_by_side = ["-n", str(min(14, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-m", "not long", "--maxfail", "200", "--device", "cuda", *side_by_side]
    # without it cuBLAS has no deterministic form
    done = subprocess.run(command, cwd=Path(__file__).parent, env={**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}, check=False)
    assert done.returncode == 0


def test_the_parity_suite_is_collected_on_another_device() -> None:
    """The meta device stands in for one that is not here. Test modules that make tensors of their own on the CPU are not even imported."""
    program = """
import sys, pytest
assert pytest.main(["--device", "meta", "--collect-only", "-p", "no:cacheprovider"]) == 0
print(*sorted(name for name in sys.modules if name.startswith("test_")))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    parity = {"test_cross_entropy", "test_bce", "test_softmax", "test_nll_loss", "test_numerics", "test_property", "test_inplace"}
    assert set(done.stdout.splitlines()[-1].split()) == parity
