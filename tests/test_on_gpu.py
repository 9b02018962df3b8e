"""The parity suite once more, on CUDA tensors. Never run by us: we have no GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the parity suite on CUDA runs on one only")
def test_parity_suite_on_cuda() -> None:
    done = subprocess.run([sys.executable, "-m", "pytest", "-x", "--device", "cuda"], cwd=Path(__file__).parent, check=False)
    assert done.returncode == 0
