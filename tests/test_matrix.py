"""The matrix of versions: what is declared is what is tried, what is shown is what was measured, and an abort is no pass."""

import json
import re

import matrix
import matrix_recorder
import pytest


@pytest.mark.parametrize(("key", "column"), [("dependencies", "floor"), ("cuda", "cuda-floor")])
def test_the_floors_that_are_declared_are_those_that_are_tried(key: str, column: str) -> None:
    line = re.search(rf"^{key} = \[(.*?)\]", (matrix.ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    (tried,) = (c.requirements for c in matrix.columns(matrix.ROOT) if c.name == column)
    for name, floor in re.findall(r'"(\w+)>=([\d.]+)"', line):
        assert [requirement for requirement in tried if requirement.startswith(f"{name}=={floor}.")], (name, floor)


def test_the_page_shows_what_was_measured() -> None:
    path = matrix.ROOT / "docs/measured/versions.json"
    measured = json.loads(path.read_text()) if path.exists() else {}
    page = (matrix.ROOT / "docs/versions.md").read_text()
    assert (matrix.table(measured) if measured else "<!-- matrix -->\n<!-- /matrix -->") in page


def test_an_abort_is_a_failure_of_the_test_that_was_running(tmp_path) -> None:
    recorder = matrix_recorder.Recorder(tmp_path / "test_some.jsonl")
    recorder.say(start="a")
    recorder.say(end="a", outcome="passed", why="")
    recorder.say(start="b")
    recorder.say(end="b", outcome="skipped", why="no device")
    recorder.say(start="c")
    found = matrix_recorder.summary(tmp_path / "test_some.jsonl", "aborts (SIGABRT)")
    assert (found["passed"], found["failures"], found["skips"]) == (1, {"c": "aborts (SIGABRT)"}, {"no device": 1})
    assert matrix_recorder.summary(tmp_path / "none.jsonl", "stopped after 5 s")["failures"] == {"none": "stopped after 5 s"}


def test_a_file_of_tests_in_a_process_of_its_own(tmp_path) -> None:
    test = tmp_path / "test_some.py"
    test.write_text("import os\ndef test_good(): pass\ndef test_bad(): assert 0\ndef test_abort(): os.abort()\ndef test_never(): pass\n")
    found = matrix.run_file(matrix.Path(matrix.sys.executable), tmp_path, test, 60)
    assert (found["passed"], found["failed"]) == (1, 2)
    assert {test.split("::")[1]: why for test, why in found["failures"].items()} == {
        "test_bad": "assert 0",
        "test_abort": "aborts (SIGABRT)",
    }
