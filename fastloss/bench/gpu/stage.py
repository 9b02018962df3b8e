"""The process of one stage: `python -m fastloss.bench.gpu.stage MODULE:FUNCTION`, with the fields of `Day` as JSON on its input."""

import importlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STOP = 3
"""The exit status of a stage after which no other makes sense."""


class Stop(Exception):
    """No other stage makes sense; why."""


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


def main(arguments: Sequence[str]) -> int:
    """The exit status."""
    (name,) = arguments
    fields = json.loads(sys.stdin.read())
    day = Day(**fields | {"out": Path(fields["out"]), "part": Path(fields["part"])})
    module, function = name.split(":")
    try:
        getattr(importlib.import_module(module), function)(day)
    except Stop as why:
        print(why, file=sys.stderr)
        return STOP
    return 0


if __name__ == "__main__":
    from fastloss.bench.gpu import stage  # under its own name, whose `Stop` the stages raise

    sys.exit(stage.main(sys.argv[1:]))
