"""`fastloss warmup`: what it promises to compile, a program does not compile again; and it leaves nothing else behind."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastloss
from fastloss import startup
from fastloss.__main__ import main
from fastloss.kernels.cpu import rows
from fastloss.losses import LOSSES
from fastloss.usual_calls import LARGE, USES

# a program, with the benchmark's inputs: sizes that people train with, on defaults; it says which kernels it had to compile
PROGRAM = """
import json, sys
import torch, fastloss
from fastloss.bench.cases import Case, make_inputs
from fastloss.kernels.cpu.launch import built
for name, shape, dtype in json.loads(sys.argv[1]):
    case = Case(name, tuple(shape), dtype)
    (given,) = make_inputs(case, 1)
    function, x = getattr(fastloss, case.spec.function), given.input
    for upstream in (1.0, 1.0, 0.25, 0.25):  # foreseen, replayed, not foreseen, foreseen again
        y = case.spec.call(function, x.detach().requires_grad_(), given.target, given.options)
        (upstream * (y if y.dim() == 0 else y.sum())).backward()
    with torch.no_grad():
        case.spec.call(function, x, given.target, given.options)
print(json.dumps([len(built), [f"{b.region.body.__module__}.{b.region.body.__name__} {b.version}" for b in built if not b.found]]))
"""
MANY, FEW, APART = [(4096, 4000), (1024, 1000)], [(1 << 20, 10), (65536, 10)], [(4, 21, 512, 512), (2, 21, 200, 200)]
SHAPES = {
    "nll_loss": ("nll_loss", [*MANY, *FEW, *APART]),
    "binary_cross_entropy_with_logits": ("binary_cross_entropy_with_logits", [*MANY, (16, 1, 1024, 1024)]),
    "cross_entropy": ("cross_entropy", [*MANY, *FEW, *APART, (1, 1 << 19), (8192, 60)]),
    "smoothed_cross_entropy": ("cross_entropy, smoothed and weighted", [*MANY, *FEW, *APART]),
    "soft_cross_entropy": ("cross_entropy, probabilities", [*MANY, *FEW, *APART]),
    "sparse_soft_cross_entropy": ("sparse_soft_cross_entropy, 2 classes a row", [*MANY, *FEW]),
    "binary_cross_entropy": ("binary_cross_entropy", MANY),
    "sigmoid_focal_loss": ("sigmoid_focal_loss", [*MANY, (2, 12008, 80)]),
    "softmax": ("softmax", [*MANY, *FEW]),
    "log_softmax": ("log_softmax", [*MANY, *FEW]),
    "token_statistics": ("token_statistics", [*MANY, (1, 1 << 19)]),
    "linear_cross_entropy": ("linear_cross_entropy", [(2048, 64, 5000)]),
}


def run(place: Path, *arguments: str) -> str:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(place)}
    done = subprocess.run([sys.executable, "-P" if sys.version_info >= (3, 11) else "-B", *arguments], capture_output=True, text=True,
                          env=environment, cwd=place)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def compiled_after_warmup(place: Path, names: list[str], dtypes: list[str]) -> tuple[int, list[str]]:
    """How many kernels the program used that was started after `fastloss warmup`, and those that it had to compile."""
    printed = run(place, "-m", "fastloss", "warmup", *names, "--dtype", *dtypes, "--device", "cpu")
    assert "0 found" in printed.splitlines()[-1]
    cases = [(SHAPES[name][0], shape, dtype) for name in names for shape in SHAPES[name][1] for dtype in dtypes]
    used, compiled = json.loads(run(place, "-c", PROGRAM, json.dumps(cases)))
    return used, compiled


@pytest.mark.long
def test_a_program_compiles_nothing_after_warmup(tmp_path: Path) -> None:
    used, compiled = compiled_after_warmup(tmp_path, ["nll_loss"], ["float32"])
    assert used > 4
    assert compiled == []


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SHAPES)
def test_programs_of_all_losses_compile_nothing_after_warmup(name: str, dtype: str, tmp_path: Path) -> None:
    used, compiled = compiled_after_warmup(tmp_path, [name], [dtype])
    assert used > 1
    assert compiled == []


def test_the_size_from_which_results_bypass_the_caches_is_the_kernels() -> None:
    assert LARGE == rows.STREAM_BYTES


def test_every_loss_can_be_warmed_but_those_that_need_other_ranks() -> None:
    named = {"bce_with_logits": "binary_cross_entropy_with_logits", "linear_soft_cross_entropy": "linear_cross_entropy"}
    names = {named.get(loss.name, loss.name) for loss in LOSSES if not loss.name.startswith("vocab_parallel")}
    assert set(USES) == {*names, "smoothed_cross_entropy"}
    assert set(SHAPES) == set(USES) - {"linear_token_statistics"}


def test_nothing_else_is_left_behind() -> None:
    fastloss.memory.empty_pool()
    before = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu"):
        (done,) = fastloss.warmup("nll_loss", torch.float32, "cpu", shapes=[(64, 257)])
        again = fastloss.warmup(["nll_loss"], [torch.float32], "cpu", shapes=[(64, 257)])
        assert torch.is_inference_mode_enabled()
    assert done[:3] == ("nll_loss", torch.float32, "cpu")
    assert again[0].compiled == again[0].found == 0  # this process has them
    assert torch.equal(torch.get_rng_state(), before)
    assert fastloss.get_backend() == "auto"
    assert fastloss.memory.pool_bytes() == 0


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"losses": "kl_div"}, ValueError, "losses must be 'all' or among cross_entropy, .*got 'kl_div'"),
        ({"dtypes": torch.int8}, TypeError, "dtypes must be among float32, .*got torch.int8"),
        ({"shapes": [(7,)]}, ValueError, r"shapes must be \(N, C\) or .*got \(7,\)"),
        ({"device": "meta"}, fastloss.BackendError, "no kernels for device meta"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        fastloss.warmup(**arguments)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["warmup", "nll_loss", "--dtype", "float32", "--device", "cpu", "--shape", "64x257"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("nll_loss ")
    assert printed.err == ""  # no terminal, no bar
    for wrong in (["kl_div"], ["--shape", "64"], ["--shape", "axb"], ["--dtype", "int8"]):
        with pytest.raises(SystemExit, match="2"):
            main(["warmup", "--device", "cpu", *wrong])


def test_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with startup._Bar(4, True) as bar:
        for _ in range(4):
            bar.step("cross_entropy float32")
    lines = capsys.readouterr().err.split("\r")
    assert lines[1].startswith("  0% |                        | 0 s  cross_entropy float32")
    assert lines[3].startswith(" 50% |############            |")
    assert lines[5] == "\x1b[K"  # the line is free again


def test_what_triton_compiles_is_counted() -> None:
    """Without a GPU: by the events that Triton sends."""
    knobs = pytest.importorskip("triton.knobs")
    with startup._counted("triton") as counts:
        for hit in (True, False, True):
            knobs.compilation.listener(src=None, metadata={}, metadata_group={}, times=None, cache_hit=hit)
    assert counts == {False: 1, True: 2}
    assert knobs.compilation.listener is None
