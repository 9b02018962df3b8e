"""What a user installs."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fastloss

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names in the wheel built from a copy of this checkout."""
    pytest.importorskip("setuptools")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("fastloss", "kernels"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--quiet", "-w", str(out)],
        cwd=source, check=True, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )  # fmt: skip
    (path,) = out.glob("*.whl")
    return set(zipfile.ZipFile(path).namelist())


def test_every_module_is_in_the_wheel(wheel: set[str]) -> None:
    for folder in ("", "bench", "bench/gpu", "integrations", "losses", "kernels", "kernels/cpu", "kernels/cuda"):
        source = ROOT / (folder if folder.startswith("kernels") else f"fastloss/{folder}")
        for path in source.glob("*.py"):
            assert f"fastloss/{folder}/{path.name}".replace("//", "/") in wheel
    assert "fastloss/py.typed" in wheel


def test_nothing_else_is_in_the_wheel(wheel: set[str]) -> None:
    """No top-level `kernels`: that name is Hugging Face's. No tests, no caches."""
    assert {name.split("/")[0] for name in wheel if ".dist-info" not in name} == {"fastloss"}
    assert not [name for name in wheel if "__pycache__" in name]


def test_plain_import_of_kernels_is_refused() -> None:
    done = subprocess.run([sys.executable, "-c", "import kernels"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode
    assert "import fastloss.kernels" in done.stderr


def test_public_names_are_there() -> None:
    assert len(set(fastloss.__all__)) == len(fastloss.__all__)
    for name in fastloss.__all__:
        assert hasattr(fastloss, name), name


def test_functions_have_torchs_signatures() -> None:
    """Parameter names, order and defaults; what we add comes after, by keyword only."""
    import inspect

    import torch.nn.functional as F

    for name in ("cross_entropy", "nll_loss", "softmax", "log_softmax", "binary_cross_entropy", "binary_cross_entropy_with_logits"):
        mine, theirs = (inspect.signature(getattr(module, name)).parameters for module in (fastloss, F))
        ours = [(p.name, p.default, p.kind) for p in mine.values()]
        assert ours[: len(theirs)] == [(p.name, p.default, p.kind) for p in theirs.values()]
        assert all(kind == inspect.Parameter.KEYWORD_ONLY for _, _, kind in ours[len(theirs) :])
