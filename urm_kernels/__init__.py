"""Exact multi-query top-k over tens of millions of factored items, as torch ops.

Importing needs no GPU, no Triton and no compiler; see ``python -m urm_kernels`` for what this machine can use.
"""

from .exploring import ExploreStats, explore_topk
from .graph import NeighborGraph
from .interop import in_kind
from .scoring import ScanStats, TopK, log_partition, score_candidates, score_topk
from .table import ItemTable

__version__ = "0.1.0"
__all__ = [
    "ExploreStats",
    "ItemTable",
    "NeighborGraph",
    "ScanStats",
    "TopK",
    "__version__",
    "explore_topk",
    "in_kind",
    "log_partition",
    "score_candidates",
    "score_topk",
]
