"""Which cases belong together, and what the CPU kernels are meant to reach: data."""

from dataclasses import dataclass

from .cases import Case
from .providers import CHUNKED, COMPILED, COMPILED_HUGE, EAGER, EAGER_HUGE, FASTLOSS, INPLACE, NO_FORESIGHT, NO_POOL
from .shapes import SHAPES

_SEGMENTATION = (8, 21, 512, 512)
_CE, _SOFT, _SMOOTHED = "cross_entropy", "cross_entropy, probabilities", "cross_entropy, smoothed and weighted"
_PAIRS, _BEST_64 = "sparse_soft_cross_entropy, 2 classes a row", "sparse_soft_cross_entropy, 64 classes a row"
_BCE, _BCE_POS = "binary_cross_entropy_with_logits", "binary_cross_entropy_with_logits, pos_weight"

_CE_AUTOCAST, _BCE_AUTOCAST = "cross_entropy, weighted under autocast", "binary_cross_entropy_with_logits, float32 labels under autocast"


@dataclass(frozen=True)
class Target:
    """What `provider` is meant to reach on `case`: at least so many times as fast as eager and compiled torch, at most so many copies."""

    case: Case
    eager: float
    compiled: float
    copies: float | None = None
    provider: str = FASTLOSS


CPU_TARGETS = (
    Target(Case(_CE, (4096, 32000)), 15, 5, 1.6),
    Target(Case(_CE, (2048, 128256)), 15, 5, 1.6),
    Target(Case(_CE, (65536, 1000)), 9, 4.5, 1.9),
    Target(Case(_CE, (65536, 128)), 9, 4.5, 1.9),
    Target(Case(_CE, (65536, 10)), 6, 1.3),
    Target(Case(_CE, (4096, 32000), "bfloat16"), 8, 4.5),
    Target(Case(_CE, (65536, 1000), "bfloat16"), 8, 4.5),
    Target(Case(_CE, (4096, 50257), "bfloat16"), 8, 4.5),
    Target(Case(_CE, _SEGMENTATION), 8, 4),
    Target(Case(_CE, _SEGMENTATION, "bfloat16"), 8, 4),
    Target(Case(_SOFT, (4096, 32000)), 7, 2.2, 3.2),
    Target(Case(_CE, (4096, 32000)), 20, 6, 1.3, INPLACE),
    Target(Case(_BCE, (65536, 1000)), 9, 3, 3.2),
    Target(Case(_BCE, (4096, 32000)), 9, 3, 3.2),
    Target(Case(_BCE_POS, (65536, 1000)), 9, 3, 3.2),
    Target(Case(_BCE_POS, (4096, 32000)), 9, 3, 3.2),
    Target(Case(_BCE, (65536, 1000), "bfloat16"), 8, 2.5),
    Target(Case(_CE_AUTOCAST, (4096, 32000), "bfloat16"), 8, 4),
    Target(Case(_BCE_AUTOCAST, (65536, 1000), "bfloat16"), 8, 3),
    Target(Case("softmax", (4096, 32000)), 3, 2),
    Target(Case("log_softmax", (4096, 32000)), 3, 2),
    Target(Case(_SMOOTHED, (4096, 32000)), 11, 3.5),
    Target(Case(_PAIRS, (4096, 32000)), 12, 4),
    Target(Case(_BEST_64, (4096, 32000)), 10, 3.5),
    Target(Case("token_statistics", (4096, 32000)), 8, 3),
    Target(Case("token_statistics, all five", (4096, 32000)), 10, 3.5),
)

FRONT = (
    Case(_CE, (4096, 32000)),
    Case(_CE, (2048, 128256)),
    Case(_CE, (65536, 1000)),
    Case(_CE, (4096, 32000), "bfloat16"),
    Case(_CE, _SEGMENTATION),
    Case(_SMOOTHED, (4096, 32000)),
    Case(_SOFT, (4096, 32000)),
    Case(_PAIRS, (4096, 32000)),
    Case(_BCE, (65536, 1000)),
    Case("token_statistics", (4096, 32000)),
)
"""The cases of the README's table."""

USUAL = (FASTLOSS, INPLACE, EAGER, COMPILED, EAGER_HUGE)
EVERYBODY = (FASTLOSS, INPLACE, NO_FORESIGHT, NO_POOL, EAGER, COMPILED, EAGER_HUGE, COMPILED_HUGE)
RIVALS = ("liger-kernel", "flash-attn", "quack-kernels", "liger-kernel, linear", "quack-kernels, linear", "cut-cross-entropy")
"""Measured on CUDA, where they are installed."""


@dataclass(frozen=True)
class Preset:
    """What a run measures; any of it can be overruled on the command line."""

    about: str
    cases: tuple[Case, ...]
    providers: tuple[str, ...] = USUAL
    seconds: float = 6.0
    extras: tuple[str, ...] = ()


def _distinct(*cases: Case) -> tuple[Case, ...]:
    return tuple(dict.fromkeys(cases))


_QUICK = (
    Case(_CE, (65536, 10)),
    Case(_CE, (65536, 1000)),
    Case(_CE, (4096, 32000)),
    Case(_CE, (4096, 32000), "bfloat16"),
    Case(_BCE, (65536, 1000)),
    Case(_BCE, (65536, 1000), "bfloat16"),
)
_VISION = (
    Case(_CE, (65536, 10)),
    Case(_CE, (65536, 100)),
    Case(_CE, (65536, 1000)),
    Case(_CE, (65536, 1000), "bfloat16"),
    Case(_CE, _SEGMENTATION),
    Case(_CE, _SEGMENTATION, "bfloat16"),
    Case(_SMOOTHED, (65536, 1000)),
    Case(_SOFT, (65536, 1000)),
    Case(_BCE, (65536, 1000)),
    Case(_BCE, (16, 1, 1024, 1024)),
)
_LLM = (
    Case(_CE, (4096, 32000)),
    Case(_CE, (4096, 32000), "bfloat16"),
    Case(_CE, (4096, 50257), "bfloat16"),
    Case(_CE, (2048, 128256)),
    Case(_CE, (2048, 128256), "bfloat16"),
    Case(_SMOOTHED, (4096, 32000)),
    Case(_SOFT, (4096, 32000)),
    Case("log_softmax", (4096, 32000)),
    Case("nll_loss", (4096, 32000)),
)
_LINEAR = (
    Case("linear_cross_entropy", (2048, 1024, 32000)),
    Case("linear_cross_entropy", (2048, 1024, 32000), "bfloat16"),
    Case("linear_cross_entropy", (4096, 512, 50257)),
)
_GPU = (
    Case(_CE, (8192, 128256), "bfloat16"),
    Case(_CE, (8192, 32000), "bfloat16"),
    Case(_CE, (8192, 50257), "bfloat16"),
    Case(_CE, (65536, 1000), "bfloat16"),
    Case(_BCE, (65536, 1000), "bfloat16"),
    Case("softmax", (8192, 32000), "bfloat16"),
    Case(_CE, (8192, 32000)),
    Case(_CE, (16384, 32000), "bfloat16"),
    Case(_CE, (8192, 151936), "bfloat16"),
    Case(_CE, (8192, 128256)),
    Case(_CE, (32, 21, 512, 512), "bfloat16"),
    Case(_SMOOTHED, (8192, 32000), "bfloat16"),
    Case(_SOFT, (8192, 32000), "bfloat16"),
    Case("log_softmax", (8192, 32000), "bfloat16"),
    Case(_BCE, (65536, 1000)),
)
_SIZES = tuple(Case(_CE, (4096, classes)) for classes in (16, 64, 256, 1000, 4000, 16000, 64000))
_TABLE = _distinct(*(target.case for target in CPU_TARGETS))

PRESETS = {
    "quick": Preset("large batches, some minutes: what `make bench` runs", _QUICK, seconds=3, extras=("overhead",)),
    "vision": Preset("classification and segmentation", _VISION),
    "llm": Preset("vocabularies of 32000 and more", _LLM),
    "linear": Preset("the last layer and its loss in one", _LINEAR, (FASTLOSS, CHUNKED, EAGER, COMPILED), seconds=30),
    "real": Preset("shapes that people train with, by name: fastloss/bench/shapes.py", tuple(SHAPES.values())),
    "sizes": Preset("cross_entropy float32 from 16 to 64000 classes: where which provider wins", _SIZES),
    "cpu-table": Preset("every row of the CPU targets, filled in: target, measured, met or not", _TABLE, EVERYBODY, seconds=10),
    "gpu": Preset("large batches for a GPU, with --device cuda; the first seven are `make gpu`'s", _GPU, seconds=2),
    "all": Preset(
        "everything above, with overhead, thread scaling and start-up",
        _distinct(*_TABLE, *_VISION, *_LLM, *_SIZES),
        EVERYBODY,
        extras=("overhead", "scaling", "startup"),
    ),
}
