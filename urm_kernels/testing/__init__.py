"""What tests, benchmarks and users share: data of known kinds, float64 oracles, comparisons, ceilings.

Needs nothing beyond the package itself; read_bandwidth, gather_bandwidth, fma_rate and code_rate need the
C++ extension.
"""

from .ceilings import PeakMemory, code_rate, fma_rate, gather_bandwidth, peak_extra_memory, read_bandwidth
from .compare import (
    ThreeWayError,
    allowed_rows,
    brute_force_topk,
    compare_topk,
    full_scores,
    score_tolerance,
    three_way_error,
)
from .data import KINDS, make_items, make_queries
from .machines import available_backends, devices, forced

__all__ = [
    "KINDS",
    "PeakMemory",
    "ThreeWayError",
    "allowed_rows",
    "available_backends",
    "brute_force_topk",
    "code_rate",
    "compare_topk",
    "devices",
    "fma_rate",
    "forced",
    "full_scores",
    "gather_bandwidth",
    "make_items",
    "make_queries",
    "peak_extra_memory",
    "read_bandwidth",
    "score_tolerance",
    "three_way_error",
]
