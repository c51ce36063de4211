"""Arguments checked in words: which argument, what came, what was wanted.

Only shapes, dtypes and devices are looked at here; nothing reads a tensor's values, so calls stay traceable and never
wait for a device. Values (row indices out of range) are checked inside the ops.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
REDUCTIONS = ("max", "sum", "mean", "logsumexp")
MAX_ROWS = 2**32 - 1  # rows are 32 bits of a 64-bit key
MAX_COUNT = 2**63 - 1  # a signed 64-bit size


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def floats(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: a torch.Tensor is wanted, {type(tensor).__name__} came")
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name}: dtype float32, float16, bfloat16 or float64 is wanted, {tensor.dtype} came")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: a dense (strided) tensor is wanted, layout {tensor.layout} came")
    if type(tensor) is not Tensor and hasattr(tensor, "placements"):
        raise TypeError(f"{name}: a plain tensor is wanted, a DTensor came; pass .to_local() or .full_tensor()")


def same_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name}: is on {tensor.device}, queries are on {device}; move one of them")


def queries(queries: Tensor, projection: Tensor | None) -> Tensor:
    """[B, M, r] in the dtype of computation: float32, or float64 where that came."""
    floats("queries", queries)
    if not 1 <= queries.dim() <= 3:
        raise ValueError(f"queries: shape [B, M, r], [B, r] or [r] is wanted, {_shape(queries)} came")
    if projection is not None:
        floats("projection", projection)
        same_device("projection", projection, queries.device)
        if projection.dim() != 2 or projection.shape[0] != queries.shape[-1]:
            raise ValueError(
                f"projection: shape [d, r] with d = {queries.shape[-1]}, the last dimension of queries, is wanted, "
                f"{_shape(projection)} came"
            )
        dtype = torch.promote_types(queries.dtype, projection.dtype)
        queries = queries.to(dtype) @ projection.to(dtype)
    if queries.dim() < 3:
        queries = queries.reshape(-1, 1, queries.shape[-1]) if queries.dim() == 2 else queries[None, None]
    # Not left to .to(), which costs 2 us where it has nothing to do.
    return queries if queries.dtype in (torch.float32, torch.float64) else queries.to(torch.float32)


def items(items: Tensor, queries: Tensor) -> int:
    floats("items", items)
    same_device("items", items, queries.device)
    if items.dim() != 2 or items.shape[1] != queries.shape[2]:
        raise ValueError(f"items: shape [N, r] with r = {queries.shape[2]} is wanted, {_shape(items)} came")
    rows = items.shape[0]
    if rows > MAX_ROWS:
        raise ValueError(f"items: at most {MAX_ROWS} rows are possible, {rows} came; split the table")
    return rows


def count(name: str, value: int) -> int:
    """A size as int: whatever Python takes for an index, except truth values."""
    if type(value) is not int and not isinstance(value, torch.SymInt):
        truth = isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool)
        try:
            index = None if truth else operator.index(value)
        except TypeError:
            index = None
        if index is None:
            raise TypeError(f"{name}: an integer is wanted, {value!r} of type {type(value).__name__} came")
        value = index
    if value < 0 or value > MAX_COUNT:
        raise ValueError(f"{name}: an integer from 0 to {MAX_COUNT} is wanted, {value} came")
    return value


def flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: True or False is wanted, {value!r} came")


def backend(backend: str | None) -> str:
    """The name, "" for a free choice; which names there are is the op's to know."""
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"backend: a name or None is wanted, {backend!r} came")
    return backend or ""


def reduce(reduce: str) -> None:
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce: one of {', '.join(REDUCTIONS)} is wanted, {reduce!r} came")


def query_mask(mask: Tensor | None, users: int, count: int, device: torch.device) -> None:
    if mask is None:
        return
    _typed("query_mask", mask, (torch.bool,), device)
    if mask.dim() != 2 or mask.shape[0] != users or mask.shape[1] != count:
        raise ValueError(f"query_mask: shape [B, M] = [{users}, {count}] is wanted, {_shape(mask)} came")


def bias(bias: Tensor | None, rows: int, device: torch.device) -> None:
    if bias is None:
        return
    floats("bias", bias)
    same_device("bias", bias, device)
    if bias.dim() != 1 or bias.shape[0] != rows:
        raise ValueError(f"bias: shape [N] = [{rows}] is wanted, {_shape(bias)} came")


def mask(mask: Tensor | None, users: int, rows: int, device: torch.device) -> None:
    if mask is None:
        return
    _typed("mask", mask, (torch.bool, torch.uint8), device)
    width = rows if mask.dtype == torch.bool else (rows + 7) // 8
    kind = "bool, one a row" if mask.dtype == torch.bool else "a uint8 bitset, eight rows a byte"
    if mask.dim() not in (1, 2) or mask.shape[-1] != width or (mask.dim() == 2 and mask.shape[0] != users):
        raise ValueError(f"mask: shape [{width}] or [{users}, {width}] ({kind}) is wanted, {_shape(mask)} came")


def exclude(exclude: Tensor | None, users: int, device: torch.device) -> None:
    if exclude is None:
        return
    _typed("exclude", exclude, (torch.int64,), device)
    if exclude.dim() != 2 or exclude.shape[0] != users:
        raise ValueError(f"exclude: shape [B, E] with B = {users} is wanted, {_shape(exclude)} came")


def _typed(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    wanted = " or ".join(str(dtype) for dtype in dtypes)
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: a torch.Tensor of {wanted} is wanted, {type(tensor).__name__} came")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: dtype {wanted} is wanted, {tensor.dtype} came")
    same_device(name, tensor, device)
