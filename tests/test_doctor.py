"""The doctor finds what is wrong, and says so in words and in its exit status."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastloss
from fastloss import __main__, doctor, self_checks


def test_a_sound_machine_is_sound(capsys):
    assert __main__.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in ("torch 2", "numba self-check", "agree with float64", "huge pages", "threads", "compiled kernels", "speed sample", "sound"):
        assert word in text
    assert "FAIL" not in text


def test_json_says_the_same(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_speed", lambda: [])
    assert __main__.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["healthy"] is True
    assert report["machine"]["versions"]["fastloss"] == fastloss.__version__
    assert {finding["status"] for finding in report["findings"]} <= {"ok", "note"}


def test_a_wrong_kernel_is_found(capsys, monkeypatch):
    kernels = fastloss.backends.kernels("numba")
    right = kernels.softmax_backward

    def wrong(prob, dprob, dlogits):
        right(prob, dprob, dlogits)
        dlogits.mul_(1.01)

    monkeypatch.setattr(kernels, "softmax_backward", wrong)
    monkeypatch.setattr(doctor, "_speed", lambda: [])
    assert __main__.main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "wrong: softmax float32" in text
    assert "something is wrong" in text


def test_a_check_that_cannot_be_made_is_a_failure_not_an_exception(monkeypatch):
    def explodes():
        raise RuntimeError("boom")

    monkeypatch.setattr(doctor.machine, "huge_pages", explodes)
    monkeypatch.setattr(doctor, "_speed", lambda: [])
    monkeypatch.setattr(doctor, "_self_checks", lambda devices: [])
    assert any(finding.status == "FAIL" and "boom" in finding.text for finding in doctor.examine())


def test_a_process_wide_choice_of_torch_is_no_failure(monkeypatch):
    monkeypatch.setattr(doctor, "_speed", lambda: [])
    with fastloss.use_backend("torch"):
        found = list(doctor.examine())
        assert fastloss.get_backend() == "torch"
    assert not any(finding.status == "FAIL" for finding in found)


@pytest.mark.parametrize(("arguments", "code"), [(["doctor", "--what"], 2), (["what"], 2), ([], 0), (["--help"], 0), (["--version"], 0)])
def test_command_line(arguments, code):
    assert __main__.main(arguments) == code


def test_python_m_fastloss():
    found = subprocess.run([sys.executable, "-m", "fastloss", "--version"], capture_output=True, text=True, timeout=120)
    assert (found.returncode, found.stdout.strip()) == (0, fastloss.__version__)


@pytest.mark.parametrize("arguments", [["--device"], ["--device", "meta"], ["cuda"], ["--device", "cpu", "cuda"]], ids=str)
def test_a_device_that_is_none(arguments):
    assert doctor.main(arguments) == 2


def test_only_the_kernels_of_one_device_are_tried_out(monkeypatch, capsys):
    """Those of the other compile for half a minute."""
    asked = []
    monkeypatch.setattr(doctor, "errors", lambda device: asked.append(device) or [])
    monkeypatch.setattr(doctor, "_problem", lambda name: None)
    monkeypatch.setattr(doctor.fastloss.backends, "_problem", lambda name: None)
    for device in ("cuda", "cpu"):
        topics = [finding.topic for finding in doctor.examine((device,))]
        assert ("speed sample" in topics) == (device == "cpu")
    assert asked == ["cuda", "cpu"]


def test_errors_cover_every_function_of_the_package():
    functions = {name.split(" ")[0] for name, *_ in self_checks.errors("cpu")}
    assert functions == {name for name in fastloss.__all__ if hasattr(torch.nn.functional, name)}


def test_a_kernel_policy_without_huge_pages_is_a_note(monkeypatch):
    monkeypatch.setattr(fastloss.memory, "_refused", None)
    for policy, status in (("always", "ok"), ("madvise", "ok"), ("never", "note"), ("unknown", "note")):
        monkeypatch.setattr(doctor.machine, "huge_pages", lambda policy=policy: policy)
        huge = doctor._pool()[0]
        assert (huge.topic, huge.status, huge.text.split()[0]) == ("huge pages", status, policy)


@pytest.mark.parametrize(
    ("version", "status"), [("2.5.1", "FAIL"), ("2.6.0+cu124", "note"), ("2.7.1", "note"), ("2.8.0", None), ("3.0.0a0", None)]
)
def test_the_age_of_torch(version, status, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    assert [finding.status for finding in doctor._versions()[2:]] == ([status] if status else [])


# What follows knows no fixture: a process of its own for each state of a machine, on default settings. A state is simulated by a few lines
# that run before fastloss is imported, or by environment variables. The kernels come from the cache that all tests share.

WITHOUT_NUMBA = "import sys; sys.modules['numba'] = None"
BROKEN_NUMBA = """
import pathlib, sys
pathlib.Path("numba").mkdir()
pathlib.Path("numba/__init__.py").write_text("raise ImportError('Numba needs NumPy 2.4 or less')")
sys.path.insert(0, ".")
"""
READ_ONLY = """
import errno, os, tempfile
def refuse(*arguments, **options):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))
tempfile.TemporaryFile = refuse
"""
FULL_DISK = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
"""
NO_CHECKS = """
from fastloss import doctor
doctor._self_checks, doctor._speed = lambda devices: [], list  # they would compile everything anew, which the long tests do
"""
WITHOUT_HUGE_PAGES = """
import errno, mmap, os
class Refusing(mmap.mmap):
    def madvise(self, *arguments):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
mmap.mmap = Refusing
"""
DENIED_HUGE_PAGES = """
import ctypes
assert ctypes.CDLL(None).prctl(41, 1, 0, 0, 0) == 0  # PR_SET_THP_DISABLE
"""
WITHOUT_OPENMP = """
import ctypes
class Library(ctypes.CDLL):
    def __getattr__(self, name):
        if name == "GOMP_parallel":
            raise AttributeError(name)
        return super().__getattr__(name)
ctypes.CDLL = Library
"""
OLD_TORCH = """
import pathlib, sys, torch
torch.__version__ = "2.6.0+cu124"
vars(torch._C._autograd).pop("_top_saved_tensors_default_hooks", None)
pathlib.Path("triton").mkdir()
pathlib.Path("triton/__init__.py").write_text("__version__ = '3.2.0'")
sys.path.insert(0, ".")
"""
LARGE_THRESHOLD = "import fastloss; fastloss.config.min_numel = 1 << 26"
NO_TRITON_HERE = r"(torch sees no CUDA device|triton is not installed)"

# state -> lines before fastloss, environment, exit status, and findings: status, topic, the words a person needs
STATES = {
    "sound": (
        "",
        {},
        0,
        [
            ("ok", "on cpu", r"numba .*torch below config.min_numel = \d+"),
            ("ok", "OpenMP", "run on its threads, called by (GOMP_parallel|__kmpc_fork_call)"),
            ("ok", "numba self-check", "agree with float64"),
            ("ok", "speed sample", r"times as long"),
            ("ok", "compiled kernels", "kept in /.*(kernels/cpu/__pycache__|cpu_[0-9a-f]+)$"),
            ("note", "triton", f"not usable: {NO_TRITON_HERE}"),
        ],
    ),
    "no numba": (
        WITHOUT_NUMBA,
        {},
        1,
        [("FAIL", "on cpu", r"torch \(numba is not installed\)"), ("note", "numba", "numba is not installed")],
    ),
    "no writable cache": (READ_ONLY + NO_CHECKS, {}, 0, [("note", "compiled kernels", "no folder can be written.*NUMBA_CACHE_DIR")]),
    "no huge pages": (
        DENIED_HUGE_PAGES,
        {},
        0,
        [("note", "huge pages", "off for this process.*slower"), ("ok", "speed sample", "ms")],
    ),
    "no OpenMP": (WITHOUT_OPENMP, {}, 0, [("note", "OpenMP", "GOMP_parallel.*pool of Python"), ("ok", "numba self-check", "agree")]),
    "old torch": (
        OLD_TORCH,
        {},
        0,
        [
            ("note", "torch", r"2\.6\.0\S* is older than 2\.8: no gradient .*ahead.*Triton .*too old"),
            ("note", "triton", "triton 3.2.0 is too old, 3.4 is needed"),
            ("ok", "numba self-check", "agree"),
        ],
    ),
    "torch forced": (
        "",
        {"FASTLOSS_BACKEND": "torch"},
        0,
        [
            ("note", "chosen backend", "'torch'.*FASTLOSS_BACKEND"),
            ("ok", "on cpu", "torch .*was chosen"),
            ("ok", "numba self-check", "agree"),
        ],
    ),
    "triton forced without a device": (
        "",
        {"FASTLOSS_BACKEND": "triton"},
        1,
        [
            ("FAIL", "chosen backend", f"'triton'.*cannot run here: {NO_TRITON_HERE}"),
            ("note", "on cpu", "BackendError .*'triton' was chosen"),
            ("ok", "numba self-check", "agree"),
        ],
    ),
    "no compiling": ("", {"NUMBA_DISABLE_JIT": "1"}, 1, [("FAIL", "NUMBA_DISABLE_JIT", "Unset it")]),
}
RARE_STATES = {
    "huge pages refused": (
        WITHOUT_HUGE_PAGES,
        {},
        0,
        [("note", "huge pages", "refused by the kernel .*Invalid argument"), ("ok", "speed sample", "ms")],
    ),
    "no writable cache, all checks": (
        READ_ONLY,
        {},
        0,
        [("note", "compiled kernels", "no folder can be written.*NUMBA_CACHE_DIR"), ("ok", "numba self-check", "agree with float64")],
    ),
    "full disk": (
        FULL_DISK + NO_CHECKS,
        {},
        0,
        [("note", "compiled kernels", "nothing can be kept in /.*File too large.*NUMBA_CACHE_DIR")],
    ),
    "broken numba": (BROKEN_NUMBA, {}, 1, [("FAIL", "on cpu", "Numba needs NumPy"), ("note", "numba", "Numba needs NumPy")]),
    "numba forced": ("", {"FASTLOSS_BACKEND": "numba"}, 0, [("note", "chosen backend", "'numba'"), ("ok", "on cpu", "numba")]),
    "numba forced and missing": (WITHOUT_NUMBA, {"FASTLOSS_BACKEND": "numba"}, 1, [("FAIL", "chosen backend", "numba is not installed")]),
    "large threshold": (LARGE_THRESHOLD, {}, 0, [("ok", "on cpu", "numba .*config.min_numel = 67108864")]),
    "torch forced without numba": (
        WITHOUT_NUMBA,
        {"FASTLOSS_BACKEND": "torch"},
        0,
        [("ok", "on cpu", "torch"), ("note", "numba", "not installed")],
    ),
}


@pytest.mark.parametrize("state", [*STATES, *(pytest.param(name, marks=pytest.mark.long) for name in RARE_STATES)])
def test_every_state_of_a_machine(state, tmp_path):
    before, environment, code, wanted = (STATES | RARE_STATES)[state]
    returned, findings = diagnose(before, environment, tmp_path)
    for status, topic, words in wanted:
        assert any((s, t) == (status, topic) and re.search(words, text) for s, t, text in findings), (status, topic, words, findings)
    assert (returned, any(status == "FAIL" for status, *_ in findings)) == (code, code == 1), findings


def test_a_damaged_cache(tmp_path):
    """Files cut short: compiled anew, and whole again afterwards."""
    from numba.core.caching import FunctionCache, _CacheLocator

    from fastloss.kernels.cpu import launch

    self_checks.errors("cpu")  # whoever comes first fills the cache
    subfolder = _CacheLocator.get_suitable_cache_subpath(launch.__file__)
    cache = shutil.copytree(FunctionCache(launch.region).cache_path, tmp_path / "cache" / subfolder, copy_function=shutil.copy2)
    damaged = [path for path in Path(cache).glob("softmax_in_turn.*") if path.suffix in (".nbc", ".nbi")]
    assert damaged, f"no kernel of softmax of long rows in {cache}"
    for path in damaged:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    left = {path: path.read_bytes() for path in damaged}
    returned, findings = diagnose("", {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}, tmp_path)
    assert returned == 0, findings
    assert any((s, t) == ("ok", "numba self-check") for s, t, _ in findings), findings
    assert any((s, t) == ("ok", "compiled kernels") and str(cache) in text for s, t, text in findings), findings
    index = [path for path in damaged if path.suffix == ".nbi"]
    assert index
    assert all(path.read_bytes() != left[path] for path in index), "nothing was compiled anew"


def diagnose(before, environment, folder):
    """The exit status of the doctor in a new process, and its findings as a person reads them."""
    script = f"{before}\nimport sys\nfrom fastloss.__main__ import main\nsys.exit(main(['doctor']))"
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("FASTLOSS_", "NUMBA_DISABLE", "OMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**clean, "CUDA_VISIBLE_DEVICES": "", **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = done.stdout.splitlines()
    assert "Traceback" not in done.stderr, done.stderr
    assert lines[-1:] == ["something is wrong: see FAIL above" if done.returncode else "fastloss is sound on this machine"], done
    return done.returncode, [re.fullmatch(r"(\S+)\s+(.+?)  +(.*)", line).groups() for line in lines[:-2]]
