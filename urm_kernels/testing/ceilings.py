"""What this machine can do at best, and how much memory a call took: the figures beside every timing."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import checks
from ..backends import cpu


def read_bandwidth(threads: int | None = None, *, rounds: int = 5) -> float:
    """Bytes a second of one read of memory: median over reads of a buffer that no cache holds."""
    buffer = _buffer()
    threads = threads or cpu.threads()
    read = cpu.extension().read_bandwidth
    return statistics.median(read(buffer.data_ptr(), buffer.numel(), threads) for _ in range(rounds))


def gather_bandwidth(items: Tensor, rows: Tensor, threads: int | None = None, *, rounds: int = 5) -> float:
    """Bytes a second of one read of chosen rows, with nothing computed: median; items [N, r] with unit column stride.

    rows: int64 [n], all of which exist. What the caches still hold of them counts as well.
    """
    if items.dim() != 2 or items.stride(1) != 1 or items.device.type != "cpu":
        raise ValueError("items: a matrix on the CPU, whose rows' elements follow each other, is wanted")
    checks.rows("rows", rows, len(items), items.device)
    rows, threads = rows.contiguous(), threads or cpu.threads()
    read = cpu.extension().gather_bandwidth
    return statistics.median(read(cpu.matrix(items), rows.data_ptr(), len(rows), threads) for _ in range(rounds))


def fma_rate(threads: int | None = None, *, rounds: int = 5, seconds: float = 0.02) -> float:
    """float32 operations a second (a multiply-add counts two) of registers alone: median over runs of `seconds`."""
    return _rate(cpu.extension().fma_rate, threads or cpu.threads(), rounds, seconds)


def code_rate(threads: int | None = None, *, rounds: int = 5, seconds: float = 0.02) -> float:
    """Integer operations a second (a multiply-add counts two) of the fastest products of codes, in registers alone."""
    return _rate(cpu.extension().code_rate, threads or cpu.threads(), rounds, seconds)


def _rate(run: Callable[[int, int], float], threads: int, rounds: int, seconds: float) -> float:
    """Median over runs of `seconds`; run(steps, threads) says how many operations a second it did."""
    steps, elapsed = 1 << 18, 0.0
    while elapsed < seconds / 2:
        steps *= 2
        began = time.perf_counter()
        run(steps, threads)
        elapsed = time.perf_counter() - began
    steps = max(1 << 18, int(steps * seconds / elapsed))
    return statistics.median(run(steps, threads) for _ in range(rounds))


@functools.cache
def _buffer() -> Tensor:
    """Kept for the life of the process: touching new pages costs more than a measurement."""
    try:
        cache = os.sysconf("SC_LEVEL3_CACHE_SIZE")
    except (ValueError, OSError):
        cache = 0
    return torch.ones(max(256 << 20, 4 * cache) // 4)


@dataclass
class PeakMemory:
    """bytes: most resident memory beyond what was there at the start; None until the end, or where unknown."""

    bytes: int | None = None


@contextlib.contextmanager
def peak_extra_memory() -> Iterator[PeakMemory]:
    """Measures the peak of resident memory within, above its start (Linux; `bytes` stays None elsewhere).

    Resident pages are what counts. What the C library's allocator kept from before is given back first (glibc), since
    memory that it hands out again would add nothing. The kernel's counters are exact to some 100 KiB.
    """
    peak = PeakMemory()
    start = _reset_peak()
    yield peak
    if start is not None:
        peak.bytes = max(0, _status("VmHWM") - start)


def _reset_peak() -> int | None:
    """Resident bytes now, the kernel's high-water mark brought down to them; None where that cannot be done."""
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
    try:
        with open("/proc/self/clear_refs", "w") as control:
            control.write("5")
        resident, highest = _status("VmRSS"), _status("VmHWM")
    except (OSError, KeyError):
        return None
    # Some sandboxes take the write and ignore it.
    return resident if highest <= resident + (8 << 20) else None


def _status(field: str) -> int:
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise KeyError(field)
