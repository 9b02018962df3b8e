"""What stands between a step and its floor, case by case: the numbers from the result, the reason from what was measured of the kernels."""

from typing import Any

from .floor import TRAFFIC
from .providers import FASTLOSS
from .tables import NOTHING, Table, number, share, size

_EXP = "arithmetic beside reading and writing at once: a C program of the same instructions takes as long (kernels alone)"
_HALF = "arithmetic: as many exps for half the bytes"
_TWO_READS = "waits for three streams that arithmetic does not fill (kernels/README.md)"
_LOGISTIC = "arithmetic: an exp, a logarithm and a division for each element fill both 512-bit ports"
_ENTRIES = _EXP + "; entries are hung into lists, 1.00 to 1.14 of cross_entropy's time"
_RESULTS = "exps of the forward, which is at 75 to 83% of its floor; the backward is at 85 to 98% (kernels alone)"
_ROW = "arithmetic: 42 ns a row of 8 vectors on one thread in the cache, of which exps are 18"
_IMAGE = (
    "arithmetic, not the 42 streams: in the cache it takes 0.36 ns a logit on one thread, of which the exp is 0.14; "
    "a gather, a logarithm and four row numbers for every 21 logits"
)

WHY = {
    "ce 4096x32000 float32": _EXP,
    "ce 2048x128256 float32": _EXP,
    "ce 65536x1000 float32": _EXP + ", and the ends of rows",
    "ce 65536x128 float32": _ROW,
    "ce 65536x10 float32": "the call: 2.6 MB stay in the cache; a logarithm and four numbers a row for every 10 logits",
    "ce 4096x32000 bfloat16": _HALF + "; in the cache it takes as long",
    "ce 65536x1000 bfloat16": _HALF,
    "ce 4096x50257 bfloat16": _HALF,
    "ce 8x21x512x512 float32": _IMAGE,
    "ce 8x21x512x512 bfloat16": _IMAGE + "; a gradient through the caches, for a vector of a class is half a line",
    "ce-soft 4096x32000 float32": _TWO_READS,
    "bce 65536x1000 float32": _LOGISTIC,
    "bce 4096x32000 float32": _LOGISTIC,
    "bce-pos 65536x1000 float32": _LOGISTIC,
    "bce-pos 4096x32000 float32": _LOGISTIC,
    "bce 65536x1000 bfloat16": _LOGISTIC + ", for half the bytes",
    "ce-autocast 4096x32000 bfloat16": _HALF,
    "bce-autocast 65536x1000 bfloat16": _LOGISTIC,
    "softmax 4096x32000 float32": _RESULTS,
    "log-softmax 4096x32000 float32": _RESULTS,
    "ce-smoothed 4096x32000 float32": _EXP + ", and a weight for each class",
    "sparse-2 4096x32000 float32": _ENTRIES,
    "sparse-64 4096x32000 float32": _ENTRIES,
    "tokens 4096x32000 float32": "a second exp: forward and backward are two visits, 1.10 of cross_entropy's 'none'",
    "tokens-all 4096x32000 float32": "a second exp: forward and backward are two visits, 1.14 of cross_entropy's 'none'",
}


def limits(result: dict[str, Any]) -> Table:
    """A line for each case: what has to be read and written, what that takes, what the step takes, and what the rest is."""
    header = ["loss", "logits", "dtype", "N×C reads, writes", "floor ms", "step ms", "of the floor", "what the rest is"]
    lines = []
    for case in result["cases"]:
        ours = case["providers"].get(FASTLOSS)
        if ours is None or ours["status"] != "timed" or case["loss"] not in TRAFFIC:
            continue
        floor = case.get("floor")
        reads, writes = TRAFFIC[case["loss"]]
        times = [number(floor["step"]["middle"] * 1e3) if floor else NOTHING, number(ours["step"]["middle"] * 1e3)]
        line = [case["loss"], size(case["shape"]), case["dtype"], f"{reads}, {writes}", *times, share(ours)]
        lines.append([*line, WHY.get(case["key"], NOTHING)])
    return header, lines
