#!/usr/bin/env python3
"""Runs the tests on the oldest and the newest versions of what fastloss builds on; fills the table of docs/versions.md.

python tests/matrix.py [--checkout DIR] [--column NAME ...] [--files NAME ...] [--missing] [--prepare | --table]

Needs python3 >= 3.10 and pip's index. Each column of the matrix is a virtual environment in --folder (5 GB each, kept for the next time),
with fastloss installed from a wheel of a copy of the checkout. Every test file is a process of its own: what aborts one stops no other.
What was measured of the same commit is kept there too, file by file: after an interruption go on with --missing.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import Any

from matrix_recorder import summary

ROOT = Path(__file__).resolve().parent.parent
RECORDER = Path(__file__).with_name("matrix_recorder.py")
MODULES = ("torch", "triton", "numba", "numpy")
NICE = ("nice", "-n", "5")


@dataclass(frozen=True)
class Column:
    """What is asked of pip, and of which Python: the oldest or newest that is here (from 3.10), or the one nearest to a version."""

    name: str
    python: str
    requirements: tuple[str, ...]


def columns(checkout: Path) -> list[Column]:
    makefile = (checkout / "Makefile").read_text()
    pinned = tuple(re.findall(r"^(?:TORCH|TRITON) \?= (\S+)", makefile, re.MULTILINE))
    return [
        Column("floor", "oldest", ("torch==2.6.0", "numba==0.61.0", "numpy==1.26.4")),  # this torch asks for Triton 3.2, too old for us
        Column("cuda-floor", "3.12", ("torch==2.8.0", "triton==3.4.0", "numba", "numpy")),
        Column("pinned", "3.11", (*pinned, "numba", "numpy")),  # what `make test` and CI use
        Column("newest", "newest", MODULES),
    ]


# ---------------------------------------------------------------- environments


def pythons() -> dict[int, Path]:
    """The CPythons of this machine: minor version -> path."""
    named = [Path(path) for minor in range(10, 30) if (path := shutil.which(f"python3.{minor}"))]
    script = "import platform, sys; print(platform.python_implementation(), sys.version_info[1])"
    found: dict[int, Path] = {}
    for path in (*named, *sorted(Path.home().glob(".pyenv/versions/3.*/bin/python"))):
        done = subprocess.run([path, "-c", script], capture_output=True, text=True)  # pyenv's shims can refuse
        name, minor = done.stdout.split() if done.returncode == 0 else ("", "0")
        if name == "CPython" and int(minor) >= 10:
            found.setdefault(int(minor), path)
    return found


def python_for(wanted: str) -> Path:
    found = pythons()
    if wanted in ("oldest", "newest"):
        return found[min(found) if wanted == "oldest" else max(found)]
    return found[min(found, key=lambda minor: abs(minor - int(wanted.removeprefix("3."))))]


def git(checkout: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=checkout, capture_output=True, text=True, check=True).stdout


def commit_of(checkout: Path) -> str:
    """With + for local changes of what is tested."""
    changed = git(checkout, "status", "--porcelain", "--", "fastloss", "kernels", "tests", "pyproject.toml")
    return git(checkout, "rev-parse", "--short", "HEAD").strip() + ("+" if changed else "")


def copy_of(checkout: Path, target: Path) -> None:
    """What git does not ignore, as it is now: the checkout may move on meanwhile."""
    for name in filter(None, git(checkout, "ls-files", "-coz", "--exclude-standard").split("\0")):
        if (checkout / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(checkout / name, target / name)


def prepare(column: Column, source: Path, home: Path) -> Path:
    """Makes the column's environment with fastloss in it; its Python."""
    python = home / "venv/bin/python"
    if not python.exists():
        subprocess.run([python_for(column.python), "-m", "venv", home / "venv"], check=True)

    def pip(*arguments: Any) -> None:
        with (home / "pip.log").open("a") as log:
            subprocess.run([*NICE, python, "-m", "pip", *arguments], stdout=log, stderr=log, check=True)

    pip("install", "--upgrade", *column.requirements)
    shutil.rmtree(home / "wheel", ignore_errors=True)
    pip("wheel", "--no-deps", "--wheel-dir", home / "wheel", source)
    (wheel,) = (home / "wheel").glob("*.whl")
    pinned = home / "pinned.txt"
    pinned.write_text("".join(f"{name}=={version}\n" for name, version in probe(python)["versions"].items() if version))
    # setuptools: the packaging test builds a wheel without isolation
    pip("install", "--constraint", pinned, f"fastloss[test,integrations] @ {wheel.as_uri()}", "setuptools>=77")
    pip("install", "--force-reinstall", "--no-deps", wheel)
    return python


_PROBE = f"""
import json, platform
from importlib import metadata
def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
found = {{"python": platform.python_version(), "versions": {{name: version(name) for name in {MODULES}}}, "no_triton": None}}
try:
    import fastloss
    found.update({{"import": "ok", "no_triton": fastloss.backends.unavailable("triton")}})
except Exception as problem:
    found["import"] = f"{{type(problem).__name__}}: {{problem}}"
print(json.dumps(found))
"""


def probe(python: Path) -> dict[str, Any]:
    """Versions, whether fastloss can be imported, and why the CUDA kernels cannot run."""
    done = subprocess.run([python, "-c", _PROBE], cwd=python.parent, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def doctor(python: Path) -> str:
    """'ok', or what is wrong."""
    command = [*NICE, python, "-m", "fastloss", "doctor", "--json"]
    done = subprocess.run(command, cwd=python.parent, capture_output=True, text=True)
    try:
        failed = [f"{f['topic']}: {f['text']}" for f in json.loads(done.stdout)["findings"] if f["status"] == "FAIL"]
    except ValueError:
        return _ended(done.returncode)
    return "FAIL " + "; ".join(failed) if failed else "ok" if done.returncode == 0 else _ended(done.returncode)


def run_file(python: Path, home: Path, test: Path, cap: float) -> dict[str, Any]:
    """A test file in a process of its own, in an empty folder: not the checkout but the wheel is found."""
    record = home / "records" / f"{test.stem}.jsonl"
    record.parent.mkdir(exist_ok=True)
    record.unlink(missing_ok=True)
    command = [*NICE, python, RECORDER, record, "-m", "not long", "-p", "no:cacheprovider", "--tb=short", test]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MAKEFLAGS", "MAKELEVEL")}
    start, end = perf_counter(), ""
    with record.with_suffix(".log").open("w") as log, tempfile.TemporaryDirectory() as work:
        process = subprocess.Popen(command, cwd=work, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            code = process.wait(cap)
            end = "" if code in (0, 1, 2, 5) else _ended(code)  # 1: tests failed; 2: could not be collected; 5: all are long ones
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            end = f"stopped after {cap:.0f} s"
    return {**summary(record, end), "seconds": round(perf_counter() - start)}


def _ended(code: int) -> str:
    return f"aborts ({signal.Signals(-code).name})" if code < 0 else f"exit status {code}"


# ---------------------------------------------------------------- the table

_CELLS = ("", "Python", *MODULES, "import", "doctor", "passed", "failed", "skipped", "minutes")


def table(found: dict[str, Any]) -> str:
    """What stands between the marks in docs/versions.md."""
    lines = [f"| {' | '.join(_CELLS)} |", "| --- " * len(_CELLS) + "|"]
    for name, column in found.items():
        files = column["files"].values()
        counts = [sum(file[key] for file in files) for key in ("passed", "failed", "skipped")]
        versions = [column["versions"][module] or "none" for module in MODULES]
        minutes = round(sum(file["seconds"] for file in files) / 60)
        cells = (name, column["python"], *versions, column["import"], column["doctor"], *counts, minutes)
        lines.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    lines += ["", *sorted({f"Commit {c['commit']}, {c['date']}, {c['machine']}." for c in found.values()})]
    for name, column in found.items():
        lines += ["", f"**{name}**, {len(column['files'])} test files", ""]
        failures: dict[tuple[str, str], list[str]] = {}
        for part, file in sorted(column["files"].items()):
            for test, why in file["failures"].items():
                failures.setdefault((part, _cell(why)), []).append(test.split("::")[-1])
        lines += [f"- {len(tests)} failed in {part}: {why} (`{tests[0]}`)" for (part, why), tests in failures.items()]
        lines += [f"- no CUDA kernels: {_cell(column['no_triton'])}"] if "too old" in (column["no_triton"] or "") else []
        skips = sum((Counter(file["skips"]) for file in column["files"].values()), Counter[str]())
        lines += [f"- {count} skipped: {_cell(why)}" for why, count in skips.most_common()]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    text = re.sub(r"\S*fastloss-checkout-\w+/", "", str(value))  # the copy's folder has another name every time
    return re.sub(r"\s+", " ", text).replace("|", "\\|")[:160]


def write(page: Path, found: dict[str, Any]) -> None:
    before, after = page.read_text().split("<!-- matrix -->")[0], page.read_text().split("<!-- /matrix -->")[1]
    page.write_text(f"{before}<!-- matrix -->\n{table(found)}\n<!-- /matrix -->{after}")


def machine() -> str:
    name = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else None
    return f"{name[1].strip() if name else os.uname().machine}, {os.cpu_count()} cores"


def earlier(home: Path, commit: str) -> dict[str, Any] | None:
    """What was measured of the same commit, if anything."""
    path = home / "result.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found if found.get("commit") == commit and not commit.endswith("+") else None


def measure(todo: list[Column], source: Path, commit: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """Column by column."""
    tests = [path for path in sorted(source.glob("tests/**/test_*.py")) if not chosen.files or path.stem in chosen.files]
    homes = {column.name: chosen.folder.resolve() / column.name for column in todo}
    environments, found = {}, {}
    for column in todo:
        homes[column.name].mkdir(parents=True, exist_ok=True)
        environments[column.name] = python = prepare(column, source, homes[column.name])
        seen = {"commit": commit, "date": str(date.today()), "machine": machine(), **probe(python)}
        found[column.name] = {**seen, "doctor": "not asked", "files": (earlier(homes[column.name], commit) or {}).get("files", {})}
        print(f"{column.name:11} {seen}", flush=True)
    if chosen.prepare:
        return {}

    lock = Lock()

    def work(task: tuple[str, Path | None]) -> None:
        name, test = task
        if test is not None and chosen.missing and test.name in found[name]["files"]:
            return
        if test is None:
            found[name]["doctor"] = doctor(environments[name])
            print(f"{name:11} doctor: {found[name]['doctor']}", flush=True)
            return
        file = run_file(environments[name], homes[name], test, chosen.cap)
        with lock:
            found[name]["files"][test.name] = file
            (homes[name] / "result.json").write_text(json.dumps(found[name]))
        print(f"{name:11} {test.name:32}", *(f"{file[key]} {key}" for key in ("passed", "failed", "skipped", "seconds")), flush=True)

    with ThreadPoolExecutor(chosen.jobs) as pool:
        list(pool.map(work, [(name, test) for name in found for test in (None, *tests)]))
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, default=ROOT, help="what is tested, and where the table is written (default: this one)")
    parser.add_argument("--column", nargs="+", help="of floor, cuda-floor, pinned, newest (default: all)")
    parser.add_argument("--files", nargs="+", help="test files, as test_bce (default: all)")
    parser.add_argument("--missing", action="store_true", help="not the test files that have a result of this commit")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "fastloss-matrix", help="of the environments")
    parser.add_argument("--jobs", type=int, default=2, help="test files at the same time")
    parser.add_argument("--cap", type=float, default=1500, help="seconds for a test file")
    parser.add_argument("--prepare", action="store_true", help="make the environments and stop")
    parser.add_argument("--table", action="store_true", help="show what there is, also of an interrupted run of this commit, and stop")
    chosen = parser.parse_args(arguments)
    checkout = chosen.checkout.resolve()
    kept, page = checkout / "docs/measured/versions.json", checkout / "docs/versions.md"
    shown = json.loads(kept.read_text()) if kept.exists() else {}
    todo = [column for column in columns(checkout) if not chosen.column or column.name in chosen.column]
    if chosen.table:
        results = {column.name: earlier(chosen.folder / column.name, commit_of(checkout)) for column in todo}
        found = {name: result for name, result in results.items() if result}
    else:
        with tempfile.TemporaryDirectory(prefix="fastloss-checkout-") as copy:
            commit = commit_of(checkout)
            copy_of(checkout, Path(copy))
            found = measure(todo, Path(copy), commit, chosen)
    if shown or found:
        both = {**shown, **found}
        ordered = {column.name: both[column.name] for column in columns(checkout) if column.name in both}
        kept.write_text(json.dumps(ordered, indent=1) + "\n")
        write(page, ordered)
    return int(any(file["failed"] for column in found.values() for file in column["files"].values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
