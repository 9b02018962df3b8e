"""The doctor finds what is wrong, and says so in words and in its exit status."""

import json
import subprocess
import sys

import pytest
import torch

import fastloss
from fastloss import __main__, doctor


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
    monkeypatch.setattr(doctor, "_self_checks", lambda: [])
    assert any(finding.status == "FAIL" and "boom" in finding.text for finding in doctor.examine())


def test_a_process_wide_choice_of_torch_is_no_failure(monkeypatch):
    monkeypatch.setattr(doctor, "_speed", lambda: [])
    with fastloss.use_backend("torch"):
        found = doctor.examine()
        assert fastloss.get_backend() == "torch"
    assert not any(finding.status == "FAIL" for finding in found)


@pytest.mark.parametrize(("arguments", "code"), [(["doctor", "--what"], 2), (["what"], 2), ([], 0), (["--help"], 0), (["--version"], 0)])
def test_command_line(arguments, code):
    assert __main__.main(arguments) == code


def test_python_m_fastloss():
    found = subprocess.run([sys.executable, "-m", "fastloss", "--version"], capture_output=True, text=True, timeout=120)
    assert (found.returncode, found.stdout.strip()) == (0, fastloss.__version__)


def test_errors_cover_every_function_of_the_package():
    functions = {name.split(" ")[0] for name, *_ in doctor._errors("cpu")}
    assert functions == {name for name in fastloss.__all__ if hasattr(torch.nn.functional, name)}
