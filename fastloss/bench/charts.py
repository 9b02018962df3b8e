"""Pictures of a result: how long a step takes, in copies of the logits; memory; error; and time against size where sizes were swept."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from .losses import SHORT
from .providers import COMPILED, COMPILED_HUGE, EAGER, EAGER_HUGE, FASTLOSS, INPLACE, NO_FORESIGHT, NO_POOL
from .tables import number, size

# Okabe and Ito's palette, and a shape for each: told apart in grey and with any colour vision.
STYLE = {
    FASTLOSS: ("#0072B2", "o"),
    INPLACE: ("#56B4E9", "D"),
    NO_FORESIGHT: ("#009E73", "<"),
    NO_POOL: ("#009E73", "v"),
    COMPILED: ("#E69F00", "s"),
    COMPILED_HUGE: ("#F0E442", "p"),
    EAGER_HUGE: ("#CC79A7", "^"),
    EAGER: ("#D55E00", "X"),
}
_OTHER = ("#666666", "P")


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write the PNG files that this result has data for, and return them."""
    folder.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True})
    cases = [case for case in result["cases"] if any(found["status"] == "timed" for found in case["providers"].values())]
    figures = {"speed": _speed(cases), "memory": _memory(cases), "error": _error(cases), "sizes": _sizes(cases), "front": _front(cases)}
    written = []
    for name, figure in figures.items():
        if figure is not None:
            written.append(folder / f"{name}.png")
            figure.savefig(written[-1], dpi=130)
            plt.close(figure)
    return written


def _without(case: dict[str, Any], *names: str) -> dict[str, Any]:
    return {**case, "providers": {name: found for name, found in case["providers"].items() if name not in names}}


def _label(case: dict[str, Any]) -> str:
    return f"{SHORT[case['loss']]}  {size(case['shape'])}  {case['dtype']}"


def _dots(cases: list[dict[str, Any]], value: str, title: str, axis: str) -> tuple[Figure, Axes] | None:
    """A line for each case, a mark for each provider: numbers of one case are compared, so they share a line."""
    points: dict[str, list[tuple[float, int, float, float]]] = defaultdict(list)
    for row, case in enumerate(cases):
        for name, found in case["providers"].items():
            if found["status"] != "timed":
                continue
            if value == "copies":
                spread = found["copies"]
                points[name].append((spread["middle"], row, spread["low"], spread["high"]))
            elif value == "memory" and "memory" in found:
                share = found["memory"]["peak"] / case["bytes"]
                points[name].append((share, row, share, share))
            elif value == "error":
                worst = max(max(found["error"].values()), 1e-18)
                points[name].append((worst, row, worst, worst))
    if not points:
        return None
    figure, axes = plt.subplots(figsize=(10, 1.9 + 0.5 * len(cases)), layout="constrained")
    for row in range(0, len(cases), 2):
        axes.axhspan(row - 0.5, row + 0.5, color="#f6f6f6", zorder=0, linewidth=0)
    names = sorted(points, key=lambda name: list(STYLE).index(name) if name in STYLE else len(STYLE))
    for place, name in enumerate(names):
        colour, mark = STYLE.get(name, _OTHER)
        x, rows, low, high = zip(*points[name], strict=True)
        # side by side within the band of the case: marks on the same number must not hide each other
        y = [row + 0.6 * ((place + 0.5) / len(names) - 0.5) for row in rows]
        axes.hlines(y, low, high, color=colour, alpha=0.45, linewidth=2)
        axes.scatter(x, y, s=42, color=colour, marker=mark, label=name, zorder=3, linewidths=0)
    axes.set_yticks(range(len(cases)), [_label(case) for case in cases])
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#e4e4e4")
    axes.set_xlabel(axis)
    axes.set_title(title, loc="left", fontweight="bold", pad=34 if len(names) < 6 else 52)
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=5 if len(names) < 6 else 3,
        frameon=False,
        handletextpad=0.2,
        columnspacing=1.2,
        fontsize=9,
    )
    return figure, axes


def _speed(cases: list[dict[str, Any]]) -> Figure | None:
    drawn = _dots(
        cases,
        "copies",
        "Time of a training step: forward and backward",
        "time in copies of the logits (log scale; left is faster; bars: quartiles of the rounds)",
    )
    if drawn is None:
        return None
    figure, axes = drawn
    _plain_log(axes)
    axes.axvline(1, color="#333333", linewidth=1, linestyle="--")
    axes.annotate("one copy", (1, 0), xycoords=("data", "axes fraction"), xytext=(3, 4), textcoords="offset points", fontsize=8)
    return figure


def _memory(cases: list[dict[str, Any]]) -> Figure | None:
    measured = [case for case in cases if any("memory" in found for found in case["providers"].values())]
    drawn = _dots(measured, "memory", "Peak memory of a training step beyond its inputs", "in units of the logits (a gradient is 1)")
    if drawn is None:
        return None
    figure, axes = drawn
    axes.set_xlim(left=-0.1)
    axes.axvline(1, color="#333333", linewidth=1, linestyle="--")
    return figure


def _error(cases: list[dict[str, Any]]) -> Figure | None:
    drawn = _dots(
        # the same arithmetic as the mode they vary
        [_without(case, INPLACE, NO_FORESIGHT, NO_POOL, EAGER_HUGE, COMPILED_HUGE) for case in cases],
        "error",
        "Error against float64",
        "largest error of loss or gradient, relative to the largest true value (log scale)",
    )
    if drawn is None:
        return None
    figure, axes = drawn
    axes.set_xscale("log")
    return figure


def _sweep(cases: list[dict[str, Any]]) -> tuple[str, str, int, list[dict[str, Any]]] | None:
    """The loss, dtype and rows that were measured with most numbers of classes, at least four, and these cases in their order."""
    sweeps: dict[tuple[str, str, int], list[dict[str, Any]]] = defaultdict(list)
    for case in cases:
        if len(case["shape"]) == 2:
            sweeps[case["loss"], case["dtype"], case["shape"][0]].append(case)
    (loss, dtype, rows), sweep = max(sweeps.items(), key=lambda item: len(item[1]), default=(("", "", 0), []))
    if len(sweep) < 4:
        return None
    return loss, dtype, rows, sorted(sweep, key=lambda case: case["shape"][1])


def _front(cases: list[dict[str, Any]]) -> Figure | None:
    """The picture of the README: a step's time against the number of classes, over the floor, each line with its name at its end."""
    swept = _sweep(cases)
    if swept is None:
        return None
    loss, dtype, rows, sweep = swept
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for name in (EAGER, COMPILED, FASTLOSS):
        timed = [case for case in sweep if case["providers"].get(name, {}).get("status") == "timed"]
        if timed:
            x, y = [case["shape"][1] for case in timed], [case["providers"][name]["step"]["middle"] * 1e3 for case in timed]
            colour, mark = STYLE[name]
            axes.plot(x, y, color=colour, marker=mark, markersize=5, linewidth=2.4 if name == FASTLOSS else 1.5)
            axes.annotate(f" {name}", (x[-1], y[-1]), color=colour, va="center", fontsize=11, fontweight="bold", annotation_clip=False)
    _plain_log(axes)
    axes.set_yscale("log")
    floors = [(case["shape"][1], case["floor"]["step"]["middle"] * 1e3) for case in sweep if case.get("floor")]
    if floors:
        x, y = [classes for classes, _ in floors], [milliseconds for _, milliseconds in floors]
        axes.set_ylim(bottom=min(y) / 1.5)
        axes.fill_between(x, y, axes.get_ylim()[0], color="#ececec", linewidth=0)
        axes.plot(x, y, color="#888888", linewidth=1)
        axes.annotate(" the floor: only\n read and write", (x[-1], y[-1]), color="#666666", va="top", fontsize=10, annotation_clip=False)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel(f"classes, of {rows} rows")
    axes.set_ylabel("milliseconds")
    axes.set_title(f"{loss}, {dtype}: forward and backward", loc="left", fontsize=12, fontweight="bold")
    axes.grid(color="#ececec")
    return figure


def _sizes(cases: list[dict[str, Any]]) -> Figure | None:
    """Time for each logit against the number of classes, everybody."""
    swept = _sweep(cases)
    if swept is None:
        return None
    loss, dtype, rows, sweep = swept
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, (colour, mark) in STYLE.items():
        timed = [case for case in sweep if case["providers"].get(name, {}).get("status") == "timed"]
        if timed:
            x = [case["shape"][1] for case in timed]
            y = [case["providers"][name]["step"]["middle"] / (rows * case["shape"][1]) * 1e9 for case, _ in zip(timed, x, strict=True)]
            axes.plot(x, y, color=colour, marker=mark, markersize=6, linewidth=1.6, label=name)
    x = [case["shape"][1] for case in sweep]
    axes.plot(
        x, [case["copy"]["middle"] / (rows * case["shape"][1]) * 1e9 for case in sweep], "--", color="#333333", label="a copy of the logits"
    )
    floors = [(case["shape"][1], case["floor"]["step"]["middle"] / (rows * case["shape"][1]) * 1e9) for case in sweep if case.get("floor")]
    if floors:
        axes.plot(*zip(*floors, strict=True), ":", color="#333333", label="the floor: read once, write once")
    _plain_log(axes)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel(f"classes ({rows} rows)")
    axes.set_ylabel("nanoseconds per logit, forward and backward")
    axes.set_title(f"{loss}, {dtype}: time against size", loc="left", fontweight="bold")
    axes.grid(color="#e4e4e4")
    axes.legend(frameon=False, fontsize=9)
    return figure


def _plain_log(axes: Axes) -> None:
    """A log axis whose ticks are numbers people say."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    steps = [m * 10.0**e for e in range(-1, 7) for m in ((1, 2, 5) if high / low < 1000 else (1,))]
    axes.set_xticks([step for step in steps if low <= step <= high])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value) if value < 1 else f"{value:g}"))
