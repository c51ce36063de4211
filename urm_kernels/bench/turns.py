"""Contestants take turns, so that what else the machine does meets all of them alike; medians are what counts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Call = Callable[[], Any]

PAUSE = 0.005  # seconds: the thread pools of the one before have stopped spinning by then
_SLOW, _VERY_SLOW = 0.5, 1.5  # seconds a call: three rounds above the first, one above the second


class Spread(NamedTuple):
    """Seconds of several calls; low and high are the fastest and the slowest of them."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        return cls(statistics.median(seconds), min(seconds), max(seconds), len(seconds))

    def milliseconds(self) -> dict[str, float]:
        """For a record."""
        return {
            "ms": round(self.median * 1e3, 3),
            "low_ms": round(self.low * 1e3, 3),
            "high_ms": round(self.high * 1e3, 3),
        }


def timed(call: Call) -> tuple[float, Any]:
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, result


def rounds_for(elapsed: float) -> int:
    """Of a call that took `elapsed` seconds once."""
    return 1 if elapsed > _VERY_SLOW else 3 if elapsed > _SLOW else 7


def in_turns(calls: Mapping[str, Call], rounds: int | Mapping[str, int]) -> dict[str, Spread]:
    """One call of each a turn, until each had its rounds; the first turn is for warming up and is not counted."""
    wanted = dict.fromkeys(calls, rounds) if isinstance(rounds, int) else dict(rounds)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(max(wanted.values()) + 1):
        for name, call in calls.items():
            if turn <= wanted[name]:
                time.sleep(PAUSE)
                seconds[name].append(timed(call)[0])
    return {name: Spread.of(each[1:]) for name, each in seconds.items()}
