"""The C++ backend: tensors become addresses, sizes and strides for the extension ``urm_kernels._cpu``."""

from __future__ import annotations

import importlib
from collections.abc import Collection
from types import ModuleType

import torch
from torch import Tensor

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_REDUCE = {"max": 0, "sum": 1, "mean": 2, "logsumexp": 3}
_NO_MATRIX = (0, 0, 0, 0, 0, 0)

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
    items: Tensor,
    k: int,
    query_mask: Tensor | None,
    reduce: str,
    bias: Tensor | None,
    mask: Tensor | None,
    exclude: Tensor | None,
    sorted: bool,
) -> tuple[Tensor, Tensor]:
    """See urm_kernels.score_topk; queries are float32 [B, M, r]."""
    module = extension()
    users = queries.shape[0]
    queries = queries.contiguous()
    query_mask = None if query_mask is None else query_mask.contiguous()
    scores, ids = torch.empty((users, k)), torch.empty((users, k), dtype=torch.int64)
    bias_view = _NO_MATRIX
    if bias is not None:
        bias_view = (bias.data_ptr(), _DTYPES[bias.dtype], 1, bias.shape[0], 0, bias.stride(0))
    if mask is not None and mask.dtype == torch.uint8 and mask.stride(-1) != 1:
        mask = mask.contiguous()
    if exclude is not None:
        exclude = exclude.sort(dim=1).values.contiguous()
    module.score_topk(
        _queries(queries, query_mask),
        _matrix(items),
        bias_view,
        _REDUCE[reduce],
        _filter(mask, exclude),
        k,
        sorted,
        torch.get_num_threads(),
        scores.data_ptr(),
        ids.data_ptr(),
    )
    return scores, ids


def candidate_dots(queries: Tensor, items: Tensor, candidates: Tensor) -> Tensor:
    """[B, M, C] canonical dots of every query with the user's candidate rows [B, C]; -1 counts as a zero row."""
    queries, candidates = queries.contiguous(), candidates.contiguous()
    users, count, _ = queries.shape
    out = torch.empty((users, count, candidates.shape[1]), dtype=torch.float32)
    extension().candidate_dots(
        _queries(queries, None),
        _matrix(items),
        candidates.data_ptr(),
        candidates.shape[1],
        torch.get_num_threads(),
        out.data_ptr(),
    )
    return out


def _queries(queries: Tensor, query_mask: Tensor | None) -> tuple[int, int, int, int, int]:
    return (queries.data_ptr(), 0 if query_mask is None else query_mask.data_ptr(), *queries.shape)


def _matrix(matrix: Tensor) -> tuple[int, int, int, int, int, int]:
    return (matrix.data_ptr(), _DTYPES[matrix.dtype], *matrix.shape, *matrix.stride())


def _filter(mask: Tensor | None, exclude: Tensor | None) -> tuple[int, int, int, int, int, int]:
    kind = address = user_stride = row_stride = 0
    if mask is not None:
        kind = 1 if mask.dtype == torch.bool else 2
        address, row_stride = mask.data_ptr(), mask.stride(-1)
        user_stride = mask.stride(0) if mask.dim() == 2 else 0
    excluded = (0, 0) if exclude is None else (exclude.data_ptr(), exclude.shape[1])
    return (kind, address, user_stride, row_stride, *excluded)
