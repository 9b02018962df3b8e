"""Measurements that need a process of their own: other environment variables, peak memory, start-up. Lines of JSON in and out."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any


class Child:
    """A process that serves requests until it is closed. `failed` says why it cannot."""

    def __init__(self, environment: dict[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fastloss.bench.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), **(environment or {})},
        )

    def ask(self, **request: Any) -> Any:
        """The answer to one request. Raises RuntimeError with what went wrong over there."""
        stdin, stdout = self._pipes()
        try:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"the measuring process ended with exit status {self._process.wait()}")
        answer = json.loads(line)
        if "failed" in answer:
            raise RuntimeError(answer["failed"])
        return answer["answer"]

    def close(self) -> None:
        for pipe in self._pipes():
            with suppress(BrokenPipeError):  # what could not be asked of a dead process need not be asked
                pipe.close()
        self._process.wait()

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        return self._process.stdin, self._process.stdout


@contextmanager
def child(environment: dict[str, str] | None = None) -> Iterator[Child]:
    """A Child that is closed at the end of the with block."""
    process = Child(environment)
    try:
        yield process
    finally:
        process.close()


def _serve() -> None:
    """Answer requests: {"do": "prepare"|"step"|"check"|"memory"|"startup", ...}."""
    # whatever a library prints must not end up among the answers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from . import service

    desk = service.Desk()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"answer": desk.serve(request)}
        except Exception as problem:
            answer = {"failed": f"{type(problem).__name__}: {problem}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
