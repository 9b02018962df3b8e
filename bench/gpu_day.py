#!/usr/bin/env python3
"""Everything there is to learn from a GPU, in nine minutes: `make gpu`, or `python3 bench/gpu_day.py --help`.

It takes the interpreter it is started with as it is, and no network. One stage after the other runs in a process of its own, which is
killed at its deadline; when a stage ends, however it ends, what it has found is in OUT/h100.json, and the next begins. This file
imports nothing but Python's library: whatever is broken here breaks a stage, not the day.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, NamedTuple

CHECKOUT = Path(__file__).resolve().parent.parent
STOP = 3  # the exit status of a stage after which no other makes sense
GRACE = 5.0  # seconds between asking a stage to end and killing it
REPORT = 15.0  # seconds kept back for the table at the end


class Stage(NamedTuple):
    name: str
    function: str  # of one argument, a fastloss.bench.gpu.stage.Day
    seconds: float  # its deadline


def _stage(name: str, module: str, seconds: float) -> Stage:
    return Stage(name, f"fastloss.bench.gpu.{module}:{name}", seconds)


STAGES = (
    _stage("probe", "probe", 25),  # of which most is importing torch from a cold disk
    _stage("smoke", "suites", 30),
    _stage("warm", "warm", 40),
    _stage("device_tests", "suites", 75),
    _stage("parity", "suites", 105),
    _stage("speed", "speed", 80),
    _stage("steps", "steps", 110),
    _stage("questions", "questions", 40),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the day. 0 if every stage came to its end and found nothing wrong, else 1; 2 for a wrong command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/out/gpu"), help="folder for h100.json, the tests' XML and the stages' logs")
    parser.add_argument("--budget", type=float, default=530, metavar="S", help="seconds for all (default: 530)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: the same steps on inputs of no size")
    names = ", ".join(stage.name for stage in STAGES)
    parser.add_argument("--stages", nargs="+", type=_chosen, default=STAGES, metavar="STAGE", help=f"{names}, or module:function:seconds")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the stage of the moment is killed, too
    out = options.out.resolve()
    (out / "parts").mkdir(parents=True, exist_ok=True)
    (out / "log").mkdir(exist_ok=True)
    result = run(options.stages, out, options.budget, options.device, options.tiny)
    command = [sys.executable, "-m", "fastloss.bench.gpu.tables", str(out / "h100.json")]
    with suppress(subprocess.TimeoutExpired):
        subprocess.run(command, cwd=CHECKOUT, env=environment(), timeout=REPORT, check=False)
    return 0 if all(stage["status"] == "ok" for stage in result["stages"]) and not wrong(result) else 1


def run(stages: Sequence[Stage], out: Path, budget: float, device: str, tiny: bool) -> dict[str, Any]:
    """Every stage in turn; h100.json is written anew after each."""
    end = time.monotonic() + budget - REPORT
    result: dict[str, Any] = {"kind": "gpu_day", "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "device": device}
    result |= {"tiny": tiny, "budget": budget, "stages": []}
    stopped = ""
    for stage in stages:
        seconds = min(stage.seconds, end - time.monotonic() - GRACE)
        if stopped or seconds <= 0:
            ended = {"name": stage.name, "seconds": 0.0, "status": "left out", "note": stopped or "no time was left"}
        else:
            ended = _run(stage, seconds, out, {"device": device, "tiny": tiny, "before": result})
        if ended["status"] == "stopped":
            stopped = f"{stage.name}: {ended['note']}"
        with suppress(OSError, ValueError):  # a stage that found nothing
            result |= json.loads((out / "parts" / f"{stage.name}.json").read_text())
        result["stages"].append(ended)
        print(f"{stage.name:13}{ended['status']:9}{ended['seconds']:6.1f} s  {ended['note']}", flush=True)
        fresh = out / "h100.new"
        fresh.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(fresh, out / "h100.json")
    return result


def wrong(result: dict[str, Any]) -> bool:
    """Whether a stage that came to its end found something wrong."""
    broken = any(result.get(name, {}).get("failed") for name in ("warm", "device_tests", "parity"))
    return broken or any("failed" in one for one in result.get("kernels", ())) or not all(one["right"] for one in result.get("smoke", ()))


def environment() -> dict[str, str]:
    """What the stages run with. The link to the kernels is made where it is missed: git does not keep it, so no copy has it."""
    link = CHECKOUT / "fastloss" / "kernels"
    if not link.exists() and not _installed():
        link.unlink(missing_ok=True)
        link.symlink_to("../kernels")
    told = dict(os.environ)
    told["PYTHONPATH"] = os.pathsep.join([str(CHECKOUT), *filter(None, [told.get("PYTHONPATH")])])
    told["PYTHONUNBUFFERED"] = "1"
    told.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS has no deterministic form
    told.setdefault("TRITON_CACHE_DIR", str(CHECKOUT / ".triton-cache"))
    if not (CHECKOUT / ".git").exists():
        told.setdefault("FASTLOSS_COMMIT", f"files {_fingerprint()}")
    return told


def _installed() -> bool:
    """Whether this interpreter has the checkout installed to be edited (PEP 610), and finds the kernels without a link. A link that comes
    while others import from the checkout would give their modules other paths."""
    with suppress(PackageNotFoundError, ValueError):
        found = json.loads(distribution("fastloss").read_text("direct_url.json") or "{}")
        return found.get("url") == CHECKOUT.as_uri() and bool(found.get("dir_info", {}).get("editable"))
    return False


def _fingerprint() -> str:
    """Of the sources: places a result where no history tells the commit."""
    found = hashlib.sha1()
    for path in sorted(path for folder in ("fastloss", "kernels") for path in (CHECKOUT / folder).rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


def _chosen(text: str) -> Stage:
    known = {stage.name: stage for stage in STAGES}
    if text in known:
        return known[text]
    try:
        module, function, seconds = text.split(":")
        return Stage(function, f"{module}:{function}", float(seconds))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a stage nor module:function:seconds") from None


def _run(stage: Stage, seconds: float, out: Path, told: dict[str, Any]) -> dict[str, Any]:
    """One stage in a process group of its own, of which nothing is left at the end."""
    part, log = out / "parts" / f"{stage.name}.json", out / "log" / f"{stage.name}.txt"
    part.unlink(missing_ok=True)
    day = json.dumps(told | {"out": str(out), "part": str(part), "seconds": seconds})
    start = time.monotonic()
    with log.open("w") as text:
        process = subprocess.Popen(
            [sys.executable, str(CHECKOUT / "fastloss" / "bench" / "gpu" / "stage.py"), stage.function],
            cwd=CHECKOUT, env=environment(), stdin=subprocess.PIPE, stdout=text, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        with suppress(BrokenPipeError):
            process.stdin.write(day.encode())
            process.stdin.close()
        try:
            status = {0: "ok", STOP: "stopped"}.get(process.wait(seconds), "failed")
        except subprocess.TimeoutExpired:
            status = "deadline"
            process.send_signal(signal.SIGINT)  # pytest then still writes its report
            with suppress(subprocess.TimeoutExpired):
                process.wait(min(GRACE, seconds))
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    note = {"ok": "", "deadline": f"cut off after {seconds:.0f} s"}.get(status, lines[-1][:200] if lines else f"exit {process.returncode}")
    ended = {"name": stage.name, "seconds": round(time.monotonic() - start, 1), "status": status, "note": note}
    return ended if status == "ok" else ended | {"said": lines[-20:]}


if __name__ == "__main__":
    sys.exit(main())
