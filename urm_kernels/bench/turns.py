"""Contestants take turns, so that what else the machine does meets all of them alike; medians are what counts."""

from __future__ import annotations

import contextlib
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Call = Callable[[], Any]

PAUSE = 0.02  # seconds: the thread pools of the one before have stopped spinning by then; OpenMP spins for 5 to 15 ms
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


def timed(call: Call, *, apart: bool = True) -> tuple[float, Any]:
    """(seconds, result); apart: with this thread on a processor of its own."""
    with _apart() if apart else contextlib.nullcontext():
        began = time.perf_counter()
        result = call()
        return time.perf_counter() - began, result


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """This thread on a processor of its own, all others of the process on the rest (Linux).

    Linux may wake a pool's thread on the processor of the one that wakes it, while others stand idle. OpenMP, where one
    thread then spins for the other, loses whole time slices: calls of torch of half a millisecond took 8 to 24.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    if len(allowed) < 2:
        yield
        return
    own = {min(allowed)}
    _place(own, allowed - own)
    try:
        yield
    finally:
        _place(allowed, allowed)


def _place(this: set[int], others: set[int]) -> None:
    for task in map(int, os.listdir("/proc/self/task")):
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(task, this if task == threading.get_native_id() else others)


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
