"""Which backend runs a call, and why the others do not."""

from __future__ import annotations

import logging
import os
from types import ModuleType

import torch
from torch import Tensor

from . import cpu, cuda, reference, triton
from .table_view import TableView

log = logging.getLogger("urm_kernels")

# Preferred first.
BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "cuda": cuda, "triton": triton, "reference": reference}

FUNCTIONS = ("score_topk", "score_candidates", "log_partition", "explore_topk")

_said: set[str] = set()


def choose(function: str, queries: Tensor, table: TableView, requested: str, *, counts: bool = False) -> ModuleType:
    """The backend of a call: the one asked for (argument, then URM_BACKEND), else the first that can do it.

    Raises ValueError where the one asked for cannot, with its reason; a preferred backend that declines on its own
    ground says why, once, in the log.
    """
    if requested := requested or os.environ.get("URM_BACKEND", ""):
        if requested not in BACKENDS:
            raise ValueError(f"backend: one of {', '.join(BACKENDS)} is wanted, {requested!r} came")
        reason = _why_not(BACKENDS[requested], function, queries, table, counts)
        if reason:
            raise ValueError(f"backend: {requested!r} cannot run this call: {reason}")
        return BACKENDS[requested]
    for name, backend in BACKENDS.items():
        reason = _why_not(backend, function, queries, table, counts)
        if reason is None:
            return backend
        _say_once(f"backend {name} declines: {reason}")
    raise AssertionError("the reference backend takes every call")


def _why_not(backend: ModuleType, function: str, queries: Tensor, table: TableView, counts: bool) -> str | None:
    reason = backend.why_not(table.items.device, (queries.dtype, *table.dtypes()))
    if reason is None and not hasattr(backend, function):
        return f"it has no {function}"
    if reason is None and table.row_scale is not None and not backend.ROW_SCALE:
        return "it has no kernel for rows with a scale"
    if reason is None and counts and not backend.COUNTS:
        return "it does not count what a scan does"
    if reason is None and hasattr(backend, "declines"):
        return backend.declines(queries, table)
    return reason


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        log.info(message)


def describe() -> list[tuple[str, str]]:
    """(backend, what it runs or why not) on the CPU and, where torch sees one, the GPU. The first that can is taken."""
    places = [torch.device("cpu")] + ([torch.device("cuda", 0)] if torch.cuda.is_available() else [])
    lines = []
    for name, backend in BACKENDS.items():
        reasons = [f"{place.type}: {_usable(backend, place)}" for place in places]
        lines.append((name, "; ".join(reasons)))
    return lines


def _usable(backend: ModuleType, place: torch.device) -> str:
    reason = backend.why_not(place, (torch.float32,))
    if reason is not None:
        return reason
    declined = [backend.why_not(place, (dtype,)) for dtype in (torch.float8_e4m3fn, torch.float64)]
    declined += [f"it has no {function}" for function in FUNCTIONS if not hasattr(backend, function)]
    return ", but ".join(["usable", *filter(None, declined)])
