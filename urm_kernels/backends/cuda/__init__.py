"""The CUDA backend: packed tables on a GPU, by the kernels of csrc/cuda.

They come from the extension ``urm_kernels._cuda`` or, where it was not built, through CuPy, which compiles the same
sources at the first call. Tests without a GPU run them on the CPU (python_tests/simt).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from ...float_mode import default_float_mode
from ..codes import Codes
from ..table_view import ScanOptions, TableView
from . import encoding, launching, search
from .plan import Card

COUNTS = True  # whether it counts what a scan does
PROBABLE = True  # whether it makes use of a recall below 1
ROW_SCALE = True  # whether rows may have a scale


@functools.cache
def _unfit(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "its kernels are written for NVIDIA's tensor cores"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"compute capability 8.0 is needed, this device has {major}.{minor}"
    return None


def why_not(device: torch.device, dtypes: Collection[torch.dtype]) -> str | None:
    """None where this backend can run, else the reason."""
    if device.type != "cuda" and launching.stand_in(device) is None:
        return f"tensors are on {device}, not on a CUDA device"
    if torch.float64 in dtypes:
        return "float64 is computed by the reference backend"
    reason = _unfit(device) if device.type == "cuda" else None
    return reason or launching.why_not(device)


def declines(queries: Tensor, table: TableView) -> str | None:
    """Why this backend leaves a table to others, or None."""
    if table.codes is None:
        return "the table has no codes"
    if table.overlay is not None:
        return "rows of the table are being replaced"
    _, reference, blocks, fine, cells = table.codes
    if any(part is not None and part.data_ptr() % 16 for part in (reference, blocks, fine, *(cells or ())[:5])):
        return "the codes do not lie at multiples of 16 bytes"
    return None


@functools.cache
def card(device: torch.device) -> Card:
    """The device as launches see it."""
    if device.type != "cuda":
        return Card(processors=1)
    return Card(processors=torch.cuda.get_device_properties(device).multi_processor_count)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Kernels run on the current device, which need not be the tensors'; a stand-in's in the CPU's float mode."""
    return torch.cuda.device(device) if device.type == "cuda" else default_float_mode(device)


def score_topk(
    queries: Tensor,
    table: TableView,
    options: ScanOptions,
    k: int,
    sorted: bool,
    counts: Tensor | None = None,
    proven: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See urm_kernels.score_topk; queries are float32 [B, M, r]. What the scan did is added to counts, int64 [5];
    proven, bool [B], all True, becomes False for users whose result need not be exact."""
    device = queries.device
    with _on(device):
        launcher = launching.launcher(device)
        found = search.search(queries, table, options, k, launcher, card(device), counts, proven)
    return found.scores, found.ids


def encode_blocks(items: Tensor, row_scale: Tensor | None, codes: Codes) -> None:
    """Writes the codes of all whole blocks of the items."""
    with _on(items.device):
        encoding.encode(items, row_scale, codes, None, launching.launcher(items.device), card(items.device))


def encode_rows(items: Tensor, row_scale: Tensor | None, codes: Codes, rows: Tensor) -> None:
    """Writes the codes of rows (ascending), whose new contents are the items, into their places."""
    with _on(items.device):
        encoding.encode(items, row_scale, codes, rows, launching.launcher(items.device), card(items.device))
