"""From a result to pictures, one HTML page, and the tables between markers in Markdown files. Nothing in them is typed."""

import argparse
import base64
import html
import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from . import tables
from .gpu import tables as gpu_tables
from .limits import limits
from .tables import Table

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1180px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
td,th{padding:3px 9px;border-bottom:1px solid #e4e4e4;text-align:left;white-space:nowrap}
img{max-width:100%}.wide{overflow-x:auto}details{margin:.4em 0}p.note{color:#555}
"""
_NOTE = (
    "Medians of ratios within interleaved rounds. Error: the largest of loss and gradient against float64, relative to the largest true "
    "value. Copies: the time of a step in copies of the logits into mapped memory. Of the floor: how much of a step's time two kernels of "
    "ours take that only read and write what the loss has to, in the same round. N×C: the size of the logits."
)
_SHORT_NOTE = (
    "Forward and backward, medians of ratios within interleaved rounds. Of the floor: how much of our time this machine needs for the "
    "reading and writing alone. Extra memory: the peak beyond the inputs; N×C is the size of the logits, and a gradient is 1. Error: the "
    "largest of loss and gradient against float64."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status."""
    found = argparse.ArgumentParser("report.py", description="Pictures and an HTML page from the JSON of a benchmark.")
    found.add_argument("result", type=Path, help="what bench/run.py --json or bench/gpu_day.py wrote")
    found.add_argument("--out", type=Path, default=Path("bench/out"), metavar="FOLDER", help="for the PNG files and report.html")
    found.add_argument(
        "--tables", type=Path, nargs="*", default=[], metavar="FILE", help="Markdown files or folders with markers to fill in"
    )
    found.add_argument("--check", action="store_true", help="write nothing; fail if a table in a Markdown file is not this result's")
    options = found.parse_args(arguments)
    result = json.loads(options.result.read_text())
    of_a_gpu = result.get("kind") == "gpu_day"
    stale = fill_in(options.tables, gpu_blocks(result) if of_a_gpu else blocks(result), write=not options.check)
    if options.check:
        print("\n".join(f"{path}: tables are not those of {options.result}" for path in stale) or "tables are up to date")
        return 1 if stale else 0
    options.out.mkdir(parents=True, exist_ok=True)
    page = options.out / "report.html"
    if of_a_gpu:
        page.write_text(gpu_html(result))
        print(f"wrote {page}")
        return 0
    from .charts import draw  # matplotlib only where pictures are wanted

    pictures = draw(result, options.out)
    page.write_text(as_html(result, pictures))
    print(f"wrote {page} and {', '.join(picture.name for picture in pictures)}")
    return 0


def where(result: dict[str, Any]) -> str:
    """One line: machine, versions, commit, date."""
    here = result["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in here["versions"].items() if number and name in ("torch", "numba", "triton"))
    commit = f", commit {here['commit']}" if here.get("commit") else ""
    place = here["gpu"]["name"] if result.get("device") == "cuda" else f"{here['processor']}, {here['threads']} threads"
    return (
        f"{place}, copies at {result['copy_bytes_per_second'] / 1e9:.0f} GB/s; "
        f"Python {here['python']}, {versions}{commit}; {result['date'][:10]}"
    )


def blocks(result: dict[str, Any]) -> dict[str, str]:
    """What goes between `<!-- NAME -->` and `<!-- /NAME -->` in Markdown. A result that is a sweep over sizes fills in that alone."""
    if tables.sizes(result)[1]:
        return {"sizes": f"{where(result)}.\n\n{tables.as_markdown(tables.sizes(result))}"}
    extras = {name: f"{title}:\n\n{tables.as_markdown(table)}" for name, (title, table) in tables.extras(result).items()}
    return {
        **extras,
        "bench": f"{tables.as_markdown(tables.front(result))}\n\n{where(result)}. {_SHORT_NOTE}",
        "where": f"{where(result)}.",
        "limits": tables.as_markdown(limits(result)),
        "bench-all": f"{where(result)}.\n\n{tables.as_markdown(tables.overview(result))}\n\n{_NOTE}",
        "targets": f"{where(result)}.\n\n{tables.as_markdown(tables.targets(result))}",
        "extras": "\n\n".join(extras.values()),
        "least": f"{where(result)}.\n\n{tables.as_markdown(tables.least(result))}",
        "errors": tables.as_markdown(_errors(result)),
    }


def gpu_blocks(result: dict[str, Any]) -> dict[str, str]:
    """The same for what bench/gpu_day.py found."""
    found = (gpu_tables.kernels(result), gpu_tables.steps(result))
    lines = [gpu_tables.where(result), *map(tables.as_markdown, found), gpu_tables.last_line(result)]
    return {"gpu": "\n\n".join(lines)}


def gpu_html(result: dict[str, Any]) -> str:
    parts = [f"<h1>fastloss on a GPU</h1><p>{html.escape(gpu_tables.where(result))}</p>"]
    parts += [_html(gpu_tables.kernels(result)), _html(gpu_tables.steps(result)), f"<p>{html.escape(gpu_tables.last_line(result))}</p>"]
    return _page(parts)


def fill_in(paths: Sequence[Path], contents: dict[str, str], write: bool = True) -> list[Path]:
    """Put `contents` between their markers in these files (and the .md files in these folders); the files that were not up to date."""
    stale = []
    for path in [file for given in paths for file in (sorted(given.glob("*.md")) if given.is_dir() else [given])]:
        text = path.read_text()
        filled = text
        for name, content in contents.items():
            block = f"<!-- {name} -->\n{content}\n<!-- /{name} -->"
            filled = re.sub(rf"<!-- {name} -->.*?<!-- /{name} -->", partial(_constant, block), filled, flags=re.DOTALL)
        if filled != text:
            stale.append(path)
            if write:
                path.write_text(filled)
    return stale


def _constant(text: str, match: re.Match[str]) -> str:
    """A replacement in which backslashes mean nothing."""
    return text


def as_html(result: dict[str, Any], pictures: Sequence[Path]) -> str:
    """One page that needs no other file."""
    parts = [f"<h1>fastloss on this machine</h1><p>{html.escape(where(result))}</p>"]
    for picture in pictures:
        data = base64.b64encode(picture.read_bytes()).decode()
        parts.append(f'<p><img alt="{picture.stem}" src="data:image/png;base64,{data}"></p>')
    parts += ["<h2>Overview</h2>", _html(tables.overview(result)), f'<p class="note">{_NOTE}</p>']
    if tables.targets(result)[1]:
        parts += ["<h2>CPU targets</h2>", _html(tables.targets(result))]
    for title, table in tables.extras(result).values():
        parts += [f"<h2>{html.escape(title)}</h2>", _html(table)]
    parts.append("<h2>Every provider</h2>")
    for case in result["cases"]:
        title = f"{case['title']}, {case['rounds']} rounds"
        parts.append(f"<details><summary>{html.escape(title)}</summary>{_html(tables.providers(case))}</details>")
    return _page(parts)


def _page(parts: Sequence[str]) -> str:
    body = "\n".join(parts)
    return f'<!doctype html><html lang="en"><meta charset="utf-8"><title>fastloss benchmark</title><style>{_STYLE}</style>{body}</html>\n'


def _errors(result: dict[str, Any]) -> Table:
    """Loss and gradient apart, ours beside torch's."""
    from .providers import EAGER, FASTLOSS

    lines = []
    for case in result["cases"]:
        ours, theirs = (case["providers"].get(name, {}).get("error") for name in (FASTLOSS, EAGER))
        if ours and theirs:
            numbers = [f"{error[part]:.1e}" for part in ("output", "gradient") for error in (ours, theirs)]
            lines.append([case["loss"], tables.size(case["shape"]), case["dtype"], *numbers])
    return ["loss", "logits", "dtype", "output: fastloss", "torch", "gradient: fastloss", "torch"], lines


def _html(table: Table) -> str:
    header, lines = table
    head = "".join(f"<th>{html.escape(word)}</th>" for word in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(word)}</td>" for word in line) + "</tr>" for line in lines)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'
