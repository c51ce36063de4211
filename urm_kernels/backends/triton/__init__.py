"""The Triton backend: CUDA tensors, or CPU tensors where Triton's interpreter is on (TRITON_INTERPRET=1)."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Collection
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...float_mode import default_float_mode
from ..table_view import ScanOptions, TableView, Walk

COUNTS = True  # whether it counts what a scan does
PROBABLE = False  # whether it makes use of a recall below 1
ROW_SCALE = True  # whether rows may have a scale


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])


@functools.cache
def _unfit(device: torch.device) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    if torch.version.hip is not None:
        return "the kernels' error model is stated for NVIDIA's tensor cores only"
    if major >= 10 and _version() < (3, 8):
        return f"for Blackwell, Triton 3.8 is needed, this is {'.'.join(map(str, _version()))} (its compiler fails)"
    if major < 8:
        return f"compute capability 8.0 is needed, this device has {major}.{minor}"
    return None


def why_not(device: torch.device, dtypes: Collection[torch.dtype]) -> str | None:
    """None where this backend can run, else the reason."""
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"tensors are on {device}, not on a CUDA device"
    if torch.float64 in dtypes:
        return "float64 is computed by the reference backend"
    reason = _missing() or (_unfit(device) if device.type == "cuda" else None)
    if reason is None and device.type == "cuda" and torch.float8_e4m3fn in dtypes:
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) < (8, 9):
            return f"for float8 items, compute capability 8.9 is needed, this device has {major}.{minor}"
    return reason


def _kernels(name: str) -> ModuleType:
    """Loaded at the first call: importing urm_kernels touches no Triton."""
    return importlib.import_module(f"{__name__}.{name}")


@functools.cache
def card(device: torch.device) -> Any:
    """The device as launches see it: a plan.Card."""
    make = _kernels("plan").Card
    if device.type != "cuda":
        return make(processors=1, capability=0)
    found = torch.cuda.get_device_properties(device)
    return make(processors=found.multi_processor_count, capability=10 * found.major + found.minor)


def _on(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Kernels run on the current device, which need not be the tensors'; the interpreter in the CPU's float mode."""
    return torch.cuda.device(device) if device.type == "cuda" else default_float_mode(device)


def score_topk(
    queries: Tensor, table: TableView, options: ScanOptions, k: int, sorted: bool, counts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See urm_kernels.score_topk; queries are float32 [B, M, r]. What the scan did is added to counts, int64 [5]."""
    device = queries.device
    with _on(device):
        found = _kernels("search").search(queries, table.settled(), options, k, sorted, card(device), counts)
    return found.scores, found.ids


def score_candidates(
    queries: Tensor, table: TableView, candidates: Tensor, query_mask: Tensor | None, reduce: str
) -> Tensor:
    """See urm_kernels.score_candidates; queries are float32 [B, M, r]. Rows that do not exist score NaN."""
    with _on(queries.device):
        return _kernels("candidates").score_candidates(queries, table.settled(), candidates, query_mask, reduce)


def candidate_dots(queries: Tensor, table: TableView, candidates: Tensor) -> Tensor:
    """[B, M, C] dots of every query with candidate rows, [B, C] or the same [C] for all; -1 counts as a zero row."""
    with _on(queries.device):
        return _kernels("candidates").candidate_dots(queries, table.settled(), candidates)


def log_partition(queries: Tensor, table: TableView, options: ScanOptions, temperature: Tensor) -> Tensor:
    """See urm_kernels.log_partition; queries are float32 [B, M, r], temperature a float32 scalar."""
    device = queries.device
    with _on(device):
        return _kernels("partition").log_partition(queries, table.settled(), options, temperature, card(device))


def explore_topk(
    queries: Tensor, table: TableView, options: ScanOptions, walk: Walk, temperature: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See urm_kernels.explore_topk; queries are float32 [B, M, r], temperature a float32 scalar."""
    with _on(queries.device):
        asked = (queries, table.settled(), options, walk, temperature, k)
        return _kernels("explore").explore_topk(*asked)


def partition_weights(
    grad: Tensor,
    logarithms: Tensor,
    queries: Tensor,
    exists: Tensor,
    table: TableView,
    options: ScanOptions,
    temperature: Tensor,
    part: slice,
) -> tuple[Tensor, Tensor, Tensor]:
    """What log_partition's gradient is made of, for some rows; see urm_kernels.gradients."""
    options = options._replace(query_mask=exists)
    with _on(queries.device):
        kernels, scan = _kernels("partition_gradient"), (queries, table.settled(), options, temperature, part)
        return kernels.partition_weights(grad, logarithms, *scan, card(queries.device))
