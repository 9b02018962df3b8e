"""How far along, and how much longer: tqdm if there is a tqdm, lines of text if not."""

import sys
from types import TracebackType
from typing import Any, Protocol


class Progress(Protocol):
    def __enter__(self) -> "Progress": ...
    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None: ...
    def begin(self, what: str) -> None: ...
    def now(self, detail: str) -> None: ...
    def end(self, weight: float) -> None: ...
    def say(self, text: str) -> None: ...


class _Lines:
    def __init__(self, total: float) -> None:
        self.total, self.done, self.what = total, 0.0, ""

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def begin(self, what: str) -> None:
        self.what = what
        self.say(f"[{self.done / self.total:4.0%}] {what}")

    def now(self, detail: str) -> None:
        self.say(f"       {self.what}: {detail}")

    def end(self, weight: float) -> None:
        self.done += weight

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class _Bar:
    def __init__(self, total: float) -> None:
        from tqdm import tqdm

        layout = "{percentage:3.0f}% |{bar:24}| {elapsed} elapsed, {remaining} left  {desc}"
        self._what = ""
        self._bar: Any = tqdm(total=total, bar_format=layout, file=sys.stderr, mininterval=0.5)

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.set_description_str("")
        self._bar.close()

    def begin(self, what: str) -> None:
        self._what = what
        self._bar.set_description_str(what)

    def now(self, detail: str) -> None:
        self._bar.set_description_str(f"{self._what}: {detail}")

    def end(self, weight: float) -> None:
        self._bar.update(weight)

    def say(self, text: str) -> None:
        self._bar.write(text, file=sys.stderr)


def progress(total: float) -> Progress:
    """A bar for `total` units of work, whose time is about proportional to them."""
    try:
        return _Bar(total)
    except ImportError:
        return _Lines(total)
