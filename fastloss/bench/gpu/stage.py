"""The process of one stage: this file is run as a script, MODULE:FUNCTION being its argument and the fields of `Day` as JSON its input.

It imports nothing but Python's library, so a stage costs what it imports itself."""

import importlib
import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

STOP = 3
"""The exit status of a stage after which no other makes sense."""


@dataclass
class Day:
    """What a stage is told, and where it leaves what it finds."""

    device: str
    tiny: bool  # a rehearsal: the same steps on inputs of no size
    out: Path
    part: Path
    seconds: float  # until the deadline, when the stage starts
    before: dict[str, Any]  # what earlier stages have found
    found: dict[str, Any] = field(default_factory=dict)
    _start: float = field(default_factory=time.monotonic)

    def save(self, **found: Any) -> None:
        """Keep this, even if the stage is killed a moment later."""
        self.found |= found
        fresh = self.part.with_suffix(".new")
        fresh.write_text(json.dumps(self.found))
        os.replace(fresh, self.part)

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.seconds - (time.monotonic() - self._start)

    def stop(self, why: str) -> NoReturn:
        """No other stage makes sense."""
        print(why, file=sys.stderr)
        sys.exit(STOP)


def main() -> None:
    del sys.path[0]  # this folder, whose modules are not to be found by their last names
    module, function = sys.argv[1].split(":")
    told = json.loads(sys.stdin.read())
    day = Day(**told | {"out": Path(told["out"]), "part": Path(told["part"])})
    getattr(importlib.import_module(module), function)(day)


if __name__ == "__main__":
    main()
