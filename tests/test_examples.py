"""The examples run, quickly and offline, and show what they claim."""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fastloss

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(monkeypatch):
    """Imports an example by name, with the kernels forced."""
    monkeypatch.setattr(fastloss.config, "min_numel", 0)

    def load(name):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


def test_softmax_classifier_prints_both_cost_columns(example, capsys):
    example("softmax_classifier").main()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:12]]
    assert [int(line[0]) for line in lines] == list(range(0, 1001, 100))
    expected = [1.098612, 0.761050, 0.689991, 0.643229, 0.604117, 0.568255, 0.533922, 0.500291, 0.466908, 0.433507, 0.399962]
    assert [float(line[1]) for line in lines] == pytest.approx(expected, abs=2e-5)
    module = [float(line[2]) for line in lines]
    assert module == sorted(module, reverse=True)


def test_digits_curves_coincide(example, tmp_path, capsys):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    picture = tmp_path / "curves.png"
    runs = example("train_digits").main(["--epochs", "12", "--repeat", "1", "--plot", str(picture)])
    assert runs["fastloss"].losses == pytest.approx(runs["torch"].losses, rel=1e-4)
    assert runs["fastloss"].losses[-1] < runs["fastloss"].losses[0] / 3
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = capsys.readouterr().out
    assert "computed by numba" in text
    assert text.count("ms per step") == 2


def test_cutmix_and_the_regulariser_beside_the_plain_run(example, tmp_path):
    """S4e and S4f: the loss that is trained is the composition, and makes a network that knows the digits and is less sure of them."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    module, picture = example("cutmix_digits"), tmp_path / "curves.png"
    logits, classes, shares = torch.randn(20, 10, requires_grad=True), torch.randint(10, (20, 2)), torch.tensor([0.3, 0.7])
    ours = module.regularised_loss(logits, classes, shares, 0.1)
    pair = sum(share * F.cross_entropy(logits, y) for share, y in zip(shares, classes.unbind(1), strict=True))
    theirs = pair + 0.1 * logits.softmax(1).square().sum(1).mean()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)))
    runs = module.main(["--epochs", "6", "--plot", str(picture)])
    plain, mixed = runs["plain"], runs["CutMix, regularised"]
    assert min(plain.accuracies[-1], mixed.accuracies[-1]) > 0.8
    assert mixed.confidences[-1] < plain.confidences[-1]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_mixup_as_timm_does_it(example):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    module = example("mixup_digits")
    _, mixed = module.Mixup()(torch.rand(4, 64), torch.tensor([1, 2, 3, 4]))
    torch.testing.assert_close(mixed.sum(1), torch.ones(4))
    assert fastloss.explain(fastloss.CrossEntropyLoss(), torch.randn(4, 10), mixed).path == "kernel"
    runs = module.main(["--epochs", "3"])
    for way in ("mixup", "smoothed"):
        assert runs[f"{way}, fastloss"] == pytest.approx(runs[f"{way}, torch"], rel=1e-3)
        assert runs[f"{way}, fastloss"][-1] < runs[f"{way}, fastloss"][0] - 0.3


def test_segmentation_as_torchvision_does_it(example):
    runs = example("segmentation").main(["--epochs", "8"])
    (losses, iou), (theirs, their_iou) = runs["fastloss"], runs["torch"]
    assert losses == pytest.approx(theirs, rel=0.02)
    assert iou == pytest.approx(their_iou, abs=0.02)
    assert losses[-1] < losses[0] / 2
    assert iou > 0.5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_training_loop_learns_as_with_torch(example, dtype):
    found = example("training_loop").main(["--steps", "12", "--dtype", dtype])
    assert found["fastloss"] == pytest.approx(found["torch"], rel=0.02)
    assert found["fastloss without logits"] == pytest.approx(found["torch"], rel=0.02)
    assert all(math.isfinite(loss) for loss in found["fastloss"])
    assert found["fastloss"][-1] < found["fastloss"][0] - 1


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning_language_model_learns(example, precision, monkeypatch, tmp_path):
    pytest.importorskip("lightning", reason="lightning is not installed (pip install lightning)")
    monkeypatch.chdir(tmp_path)
    losses = example("lightning_language_model").main(["--epochs", "4", "--precision", precision])
    assert losses[0] == pytest.approx(math.log(2000), rel=0.05)
    assert losses[-1] < losses[0] - 1


@pytest.mark.long  # in processes that are there already: test_vocab_parallel
def test_vocab_parallel_has_the_loss_curve_of_the_unsharded_head():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLES / "vocab_parallel.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    first, last = lines[1].split(), lines[-2].split()
    assert float(last[1]) < float(first[1]) / 3
    assert float(lines[-1].split()[-1]) < 1e-3
