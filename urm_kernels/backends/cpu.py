"""The C++ backend: tensors become addresses, sizes and strides for the extension ``urm_kernels._cpu``."""

from __future__ import annotations

import importlib
from collections.abc import Collection
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import codes as formats
from .codes import Cells, Codes
from .table_view import ScanOptions, TableView, Walk

ROW_SCALE = True  # whether rows may have a scale
COUNTS = True  # whether it counts what a scan does
PROBABLE = True  # whether it makes use of a recall below 1
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float8_e4m3fn: 3}
_REDUCE = {"max": 0, "sum": 1, "mean": 2, "logsumexp": 3}

_extension: ModuleType | None = None
_missing: str | None = None


def extension() -> ModuleType:
    """The compiled module, loaded at the first call. Raises ImportError in words where it was not built."""
    global _extension, _missing
    if _extension is None:
        if _missing is None:
            try:
                _extension = importlib.import_module("urm_kernels._cpu")
                return _extension
            except ImportError as error:
                _missing = f"the C++ extension was not built or does not load ({error})"
        raise ImportError(_missing)
    return _extension


def why_not(device: torch.device, dtypes: Collection[torch.dtype]) -> str | None:
    """None where this backend can run, else the reason."""
    if device.type != "cpu":
        return f"tensors are on {device}"
    if torch.float64 in dtypes:
        return "float64 is computed by the reference backend"
    if _extension is None:
        try:
            extension()
        except ImportError as error:
            return str(error)
    return None


def instruction_set() -> str:
    """The instruction set in use: URM_CPU_ISA, or the best that the processor has."""
    return extension().instruction_set()


def threads() -> int:
    """Threads of a call: exactly URM_NUM_THREADS, or at most torch's own number, fewer where a call is small."""
    return extension().threads(torch.get_num_threads())


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
    whether users' results are certainly exact is written to proven, bool [B]."""
    users = queries.shape[0]
    scores, ids = torch.empty((users, k)), torch.empty((users, k), dtype=torch.int64)
    arguments, _held = _scan(queries, table, options)
    extension().score_topk(
        *arguments,
        k,
        sorted,
        torch.get_num_threads(),
        scores.data_ptr(),
        ids.data_ptr(),
        0 if counts is None else counts.data_ptr(),
        0 if proven is None else proven.data_ptr(),
    )
    return scores, ids


def nearest(queries: Tensor, table: TableView, k: int) -> tuple[Tensor, Tensor]:
    """As :func:`score_topk` under max, whatever URM_CPU_SCAN says: for what the library asks itself."""
    scores, ids = torch.empty((len(queries), k)), torch.empty((len(queries), k), dtype=torch.int64)
    (asked, held, *_), _held = _scan(queries, table, ScanOptions())
    extension().nearest(asked, held, k, torch.get_num_threads(), scores.data_ptr(), ids.data_ptr())
    return scores, ids


def ask_for_large_pages(tensor: Tensor) -> None:
    """A hint for memory that has not been written yet, and will be scanned."""
    extension().ask_for_large_pages(tensor.data_ptr(), tensor.nbytes)


def encode_blocks(items: Tensor, row_scale: Tensor | None, codes: Codes) -> None:
    """Writes the codes of all whole blocks of the items."""
    extension().encode_blocks(*_encoding(items, row_scale, codes), torch.get_num_threads())


def encode_rows(items: Tensor, row_scale: Tensor | None, codes: Codes, rows: Tensor) -> None:
    """Writes the codes of rows (ascending), whose new contents are the items, into their places."""
    arguments = _encoding(items, row_scale, codes)
    extension().encode_rows(*arguments, rows.data_ptr(), len(codes.blocks))


def _encoding(items: Tensor, row_scale: Tensor | None, codes: Codes) -> tuple[Any, ...]:
    r = items.shape[1]
    fine = 0 if codes.fine is None else codes.fine.data_ptr()
    rotation = _rotation(codes, r)
    return matrix(items), _vector(row_scale), rotation, formats.bits_of(codes, r), codes.blocks.data_ptr(), fine


def _rotation(codes: Codes, r: int) -> tuple[int, int, int]:
    return codes.rotation.data_ptr(), r, codes.rotation.shape[0]


def _codes(codes: Codes | None, r: int, recall: float) -> tuple[Any, ...] | None:
    if codes is None:
        return None
    fine = 0 if codes.fine is None else codes.fine.data_ptr()
    blocks = codes.blocks
    return (
        formats.bits_of(codes, r),
        blocks.data_ptr(),
        len(blocks),
        fine,
        _rotation(codes, r),
        *codes.reference.tolist(),
        *formats.slack_shares(recall, codes, r),
        _cells(codes.cells),
    )


def _cells(cells: Cells | None) -> tuple[Any, ...] | None:
    if cells is None:
        return None
    order, bias, blocks, reference, most, rows = cells
    return (
        order.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        rows,
        cells.number(),
        blocks.data_ptr(),
        *reference.tolist(),
        0 if most is None else most.data_ptr(),
    )


def log_partition(queries: Tensor, table: TableView, options: ScanOptions, temperature: Tensor) -> Tensor:
    """See urm_kernels.log_partition; queries are float32 [B, M, r], temperature a float32 scalar."""
    out = torch.empty(queries.shape[0])
    arguments, _held = _scan(queries, table, options)
    extension().log_partition(*arguments, temperature.item(), torch.get_num_threads(), out.data_ptr())
    return out


def log_partition_backward(
    grad: Tensor,
    logarithms: Tensor,
    queries: Tensor,
    table: TableView,
    options: ScanOptions,
    temperature: Tensor,
    needs_items: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of queries, items, bias (empty [0] where not needed) and temperature."""
    grad, logarithms = grad.contiguous(), logarithms.contiguous()
    grad_queries = torch.empty(queries.shape)
    rows, r = table.items.shape
    grad_items, grad_bias = torch.empty((rows, r) if needs_items else (0,)), torch.empty(rows if needs_bias else 0)
    arguments, _held = _scan(queries, table, options)
    grad_temperature = extension().log_partition_backward(
        *arguments,
        temperature.item(),
        torch.get_num_threads(),
        logarithms.data_ptr(),
        grad.data_ptr(),
        grad_queries.data_ptr(),
        grad_items.data_ptr() if needs_items else 0,
        grad_bias.data_ptr() if needs_bias else 0,
    )
    return grad_queries, grad_items, grad_bias, torch.tensor(grad_temperature, dtype=torch.float32)


def score_candidates(
    queries: Tensor, table: TableView, candidates: Tensor, query_mask: Tensor | None, reduce: str
) -> Tensor:
    """See urm_kernels.score_candidates; queries are float32 [B, M, r]."""
    return _candidates(queries, table, candidates, query_mask, reduce, True)


def candidate_dots(queries: Tensor, table: TableView, candidates: Tensor) -> Tensor:
    """[B, M, C] dots of every query with candidate rows, [B, C] or the same [C] for all; -1 counts as a zero row."""
    return _candidates(queries, table, candidates, None, "max", False)


def _candidates(
    queries: Tensor, table: TableView, candidates: Tensor, query_mask: Tensor | None, reduce: str, reduced: bool
) -> Tensor:
    queries, candidates = queries.contiguous(), candidates.contiguous()
    query_mask = None if query_mask is None else query_mask.contiguous()
    users, count, _ = queries.shape
    width = candidates.shape[-1]
    out = torch.empty((users, width) if reduced else (users, count, width))
    extension().score_candidates(
        _queries(queries, query_mask),
        _table(table),
        _REDUCE[reduce],
        candidates.data_ptr(),
        width,
        candidates.dim() == 1,
        reduced,
        torch.get_num_threads(),
        out.data_ptr(),
    )
    return out


def explore_topk(
    queries: Tensor, table: TableView, options: ScanOptions, walk: Walk, temperature: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See urm_kernels.explore_topk; queries are float32 [B, M, r], temperature a float32 scalar."""
    users, neighbors = queries.shape[0], walk.neighbors
    scores, ids = torch.empty((users, k)), torch.empty((users, k), dtype=torch.int64)
    counts = torch.empty((walk.rounds, users), dtype=torch.int64)
    arguments, _held = _scan(queries, table, options)
    extension().explore_topk(
        *arguments,
        (neighbors.data_ptr(), neighbors.dtype == torch.int64, neighbors.shape[1]),
        walk.first,
        list(walk.widths),
        temperature.item(),
        walk.seed.item(),
        walk.streams.data_ptr(),
        k,
        torch.get_num_threads(),
        scores.data_ptr(),
        ids.data_ptr(),
        counts.data_ptr(),
    )
    return scores, ids, counts


def can_copy_rows(table: Tensor) -> bool:
    """Whether :func:`write_rows` and :func:`read_rows` take it: on the CPU, the elements of a row side by side."""
    if table.device.type != "cpu" or (table.dim() > 1 and table.stride(-1) != 1):
        return False
    return why_not(table.device, ()) is None


def write_rows(target: Tensor, rows: Tensor, values: Tensor) -> None:
    """``target[rows] = values``, which have the target's dtype."""
    values = values.contiguous()
    size = target.element_size()
    width = target.shape[1] if target.dim() == 2 else 1
    extension().write_rows(
        target.data_ptr(), target.stride(0) * size, width * size, rows.data_ptr(), len(rows), values.data_ptr()
    )


def read_rows(source: Tensor, rows: Tensor) -> Tensor:
    """``source[rows]``, on this thread alone: for some thousand rows, waking another one takes longer."""
    rows, size = rows.contiguous(), source.element_size()
    out = torch.empty((len(rows), *source.shape[1:]), dtype=source.dtype)
    width = source.shape[1] if source.dim() == 2 else 1
    extension().read_rows(
        out.data_ptr(), width * size, rows.data_ptr(), len(rows), source.data_ptr(), source.stride(0) * size
    )
    return out


def _scan(queries: Tensor, table: TableView, options: ScanOptions) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """(the extension's first arguments, tensors that must live as long as these addresses)."""
    query_mask, reduce, mask, exclude, recall = options
    queries = queries.contiguous()
    query_mask = None if query_mask is None else query_mask.contiguous()
    if mask is not None and mask.dtype == torch.uint8 and mask.stride(-1) != 1:
        mask = mask.contiguous()
    if exclude is not None:
        exclude = exclude.sort(dim=1).values.contiguous()
    arguments = (_queries(queries, query_mask), _table(table, recall), _REDUCE[reduce], _filter(mask, exclude))
    return arguments, (queries, query_mask, mask, exclude)


def _table(table: TableView, recall: float = 1.0) -> tuple[Any, ...]:
    items, bias, row_scale, alive, overlay, codes = table
    newer = None
    if overlay is not None:
        rows = overlay.rows
        newer = (
            rows.data_ptr(),
            len(rows),
            matrix(overlay.items),
            _vector(overlay.bias),
            _vector(overlay.row_scale),
        )
    bits = 0 if alive is None else alive.data_ptr()
    return matrix(items), _vector(bias), _vector(row_scale), newer, bits, _codes(codes, items.shape[1], recall)


def _vector(vector: Tensor | None) -> tuple[int, int, int, int, int, int] | None:
    if vector is None:
        return None
    return (vector.data_ptr(), _DTYPES[vector.dtype], 1, vector.shape[0], 0, vector.stride(0))


def _queries(queries: Tensor, query_mask: Tensor | None) -> tuple[int, int, int, int, int]:
    return (queries.data_ptr(), 0 if query_mask is None else query_mask.data_ptr(), *queries.shape)


def matrix(tensor: Tensor) -> tuple[int, int, int, int, int, int]:
    """[rows, columns] as the extension takes it."""
    return (tensor.data_ptr(), _DTYPES[tensor.dtype], *tensor.shape, *tensor.stride())


def _filter(mask: Tensor | None, exclude: Tensor | None) -> tuple[int, int, int, int, int, int] | None:
    if mask is None and exclude is None:
        return None
    kind = address = user_stride = row_stride = 0
    if mask is not None:
        kind = 1 if mask.dtype == torch.bool else 2
        address, row_stride = mask.data_ptr(), mask.stride(-1)
        user_stride = mask.stride(0) if mask.dim() == 2 else 0
    excluded = (0, 0) if exclude is None else (exclude.data_ptr(), exclude.shape[1])
    return (kind, address, user_stride, row_stride, *excluded)
