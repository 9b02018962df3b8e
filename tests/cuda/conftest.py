"""Shared by the tests of the CUDA kernels. None of them needs a GPU but those marked `gpu`."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
