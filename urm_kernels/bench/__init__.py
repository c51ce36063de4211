"""Measuring on the machine at hand: ours, other ways to the same result and ceilings, in turns and checked first.

``python -m urm_kernels.bench --help`` is for users; the repository's own benchmarks (bench/) consist of the same parts.
"""

from .cells import Cell
from .contest import Contest, Experience, Table
from .measure import check, figures, measure, tolerance, with_peers
from .peers import PEERS, Peer, SkipError
from .turns import Spread, in_turns, rounds_for, timed

__all__ = [
    "PEERS",
    "Cell",
    "Contest",
    "Experience",
    "Peer",
    "SkipError",
    "Spread",
    "Table",
    "check",
    "figures",
    "in_turns",
    "measure",
    "rounds_for",
    "timed",
    "tolerance",
    "with_peers",
]
