"""Stages that go wrong, for the rehearsal of bench/gpu_day.py."""

import os
import time
from typing import Any


def fails(day: Any) -> None:
    day.save(fails="what was found before")
    raise ValueError("a stage that fails")


def stops(day: Any) -> None:
    day.stop("nothing works here")


def hangs(day: Any) -> None:
    """And has something hanging under it, which must not outlive it."""
    if not os.fork():
        time.sleep(600)
    day.save(hangs="what was found before")
    while True:
        try:
            time.sleep(600)
        except KeyboardInterrupt:  # a kernel that never ends does not listen either
            continue
