"""The protocol: everybody's turn in every round, the order rotated, medians over rounds, ratios within rounds.

On a machine that others use too, absolute times drift by factors; a ratio of two steps taken a moment apart does not. So a ratio here is
the median over rounds of (their time / our time in the same round), with its quartiles.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles
from time import perf_counter

from .runner import Times

Step = Callable[[int], Times]


@dataclass(frozen=True)
class Spread:
    """A median and the quartiles around it."""

    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, _, high = quantiles(values, n=4, method="inclusive")
        return cls(low, median(values), high)


@dataclass
class Series:
    """All times of one contestant, a Times for each round."""

    times: list[Times] = field(default_factory=list)

    def spread(self, part: str = "step") -> Spread:
        return Spread.of([getattr(times, part) for times in self.times])

    def ratio_to(self, other: "Series", part: str = "step") -> Spread:
        """How many times longer `other` took, round by round."""
        pairs = zip(self.times, other.times, strict=True)
        return Spread.of([getattr(theirs, part) / max(getattr(ours, part), 1e-9) for ours, theirs in pairs])


def interleave(steps: dict[str, Step], seconds: float, least: int = 5, most: int = 60, warm: int = 2) -> dict[str, Series]:
    """Time every step in rounds until `seconds` are over, in at least `least` and at most `most` rounds after `warm` untimed ones."""
    turn = 0
    for _ in range(warm):
        for step in steps.values():
            step(turn)
        turn += 1
    series = {name: Series() for name in steps}
    names = list(steps)
    end = perf_counter() + seconds
    rounds = 0
    while rounds < least or (rounds < most and perf_counter() < end):
        for position in range(len(names)):
            name = names[(rounds + position) % len(names)]
            series[name].times.append(steps[name](turn))
        turn += 1
        rounds += 1
    return series
