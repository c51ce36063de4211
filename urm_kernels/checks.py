"""Arguments checked in words: which argument, what came, what was wanted.

Only shapes, dtypes and devices are looked at here; nothing reads a tensor's values, so calls stay traceable and never
wait for a device. Values (row indices out of range) are checked inside the ops.
"""

from __future__ import annotations

import numbers
import operator
from typing import Any

import torch
from torch import Tensor

from .backends import codes as formats

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
REDUCTIONS = ("max", "sum", "mean", "logsumexp")
MAX_ROWS = 2**32 - 1  # rows are 32 bits of a 64-bit key
MAX_COUNT = 2**63 - 1  # a signed 64-bit size


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def floats(name: str, tensor: Tensor, *, float8: bool = False) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: a torch.Tensor is wanted, {type(tensor).__name__} came")
    if tensor.dtype not in FLOATS and not (float8 and tensor.dtype == torch.float8_e4m3fn):
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


def width(name: str, items: Tensor, queries: Tensor) -> None:
    if items.dim() != 2 or items.shape[1] != queries.shape[2]:
        raise ValueError(f"{name}: shape [N, r] with r = {queries.shape[2]} is wanted, {_shape(items)} came")


def items(items: Tensor, queries: Tensor) -> None:
    floats("items", items)
    same_device("items", items, queries.device)
    width("items", items, queries)
    number_of_rows("items", items.shape[0])


def table(
    factors: Tensor,
    text: Tensor | None,
    text_projection: Tensor | None,
    row_scale: Tensor | None,
    bias: Tensor | None,
    trainable: bool,
) -> None:
    """The parts of an ItemTable."""
    floats("factors", factors, float8=True)
    if factors.dim() != 2:
        raise ValueError(f"factors: shape [N, r] is wanted, {_shape(factors)} came")
    rows, r = factors.shape
    number_of_rows("factors", rows)
    if (text is None) != (text_projection is None):
        raise ValueError("text, text_projection: both are wanted, or neither")
    if text is not None and text_projection is not None:
        floats("text", text)
        floats("text_projection", text_projection)
        same_device("text", text, factors.device)
        same_device("text_projection", text_projection, factors.device)
        if text.dim() != 2 or text.shape[0] != rows:
            raise ValueError(f"text: shape [N, t] with N = {rows} is wanted, {_shape(text)} came")
        if _shape(text_projection) != [text.shape[1], r]:
            raise ValueError(
                f"text_projection: shape [t, r] = [{text.shape[1]}, {r}] is wanted, {_shape(text_projection)} came"
            )
    for name, vector in (("row_scale", row_scale), ("bias", bias)):
        per_row(name, vector, rows, factors.device)
    if trainable and factors.dtype == torch.float8_e4m3fn:
        raise TypeError("trainable: float8 factors have no gradients; train in float32 and convert")


def rows(name: str, rows: Tensor, count: int, device: torch.device | None, *, pads: bool = False) -> None:
    """Numbers of rows that exist, int64 [n], or -1 where pads are allowed; looks at the values."""
    _typed(name, rows, (torch.int64,), rows.device if device is None and isinstance(rows, Tensor) else device)
    if rows.dim() != 1:
        raise ValueError(f"{name}: shape [n] is wanted, {_shape(rows)} came")
    if rows.numel():
        low, high = (int(bound) for bound in rows.aminmax())
        if low < -int(pads) or high >= count:
            bad = high if high >= count else low
            raise ValueError(f"{name}: rows from {-int(pads)} to {count - 1} are wanted, {bad} came")


def number_of_rows(name: str, rows: int) -> None:
    if rows > MAX_ROWS:
        raise ValueError(f"{name}: at most {MAX_ROWS} rows are possible, {rows} came; split the table")


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


def recall(recall: float) -> float:
    if not isinstance(recall, numbers.Real) or isinstance(recall, bool):
        raise TypeError(f"recall: a number above 0 and at most 1 is wanted, {recall!r} came")
    if not 0 < recall <= 1:
        raise ValueError(f"recall: a number above 0 and at most 1 is wanted, {recall} came")
    return float(recall)


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
    per_row("bias", bias, rows, device)


def per_row(name: str, vector: Tensor | None, rows: int, device: torch.device) -> None:
    if vector is None:
        return
    floats(name, vector)
    same_device(name, vector, device)
    if vector.dim() != 1 or vector.shape[0] != rows:
        raise ValueError(f"{name}: shape [N] = [{rows}] is wanted, {_shape(vector)} came")


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


def alive(bits: Tensor | None, rows: int) -> None:
    """The bits of a table's rows, of which no other number must have come by load_state_dict or functional_call."""
    if bits is not None and (bits.dtype != torch.uint8 or bits.dim() != 1 or bits.shape[0] != (rows + 7) // 8):
        raise ValueError(f"alive: uint8 of shape [{(rows + 7) // 8}] is wanted, {bits.dtype} {_shape(bits)} came")


def codes(blocks: Tensor | None, fine: Tensor | None, items: Tensor) -> None:
    """The codes of a table, which no other tensors must have replaced."""
    if blocks is None:
        return
    rows, r = items.shape
    fits = formats.are_shapes(blocks.shape[1], None if fine is None else fine.shape[1], r)
    if blocks.shape[0] != rows // formats.BLOCK or not fits or blocks.dtype != torch.uint8:
        raise ValueError(f"codes: {blocks.dtype} {_shape(blocks)} are no codes of {rows} rows of width {r}")


def cells(order: Tensor | None, blocks: Tensor | None, cell_rows: int, items: Tensor) -> None:
    """Likewise the order of the codes and the codes of cells."""
    if order is None or blocks is None:
        return
    coded = items.shape[0] // formats.BLOCK * formats.BLOCK
    wanted = [-(-(coded // max(cell_rows, 1)) // formats.BLOCK), formats.block_bytes(items.shape[1], formats.CELL_BITS)]
    if cell_rows < 1 or list(order.shape) != [coded, 2] or list(blocks.shape) != wanted:
        raise ValueError(f"codes: {_shape(order)} and {_shape(blocks)} are no cells of {coded} rows")


def candidates(candidates: Tensor, users: int, device: torch.device) -> None:
    _typed("candidates", candidates, (torch.int64,), device)
    if candidates.dim() not in (1, 2) or (candidates.dim() == 2 and candidates.shape[0] != users):
        raise ValueError(f"candidates: shape [B, C] with B = {users}, or [C], is wanted, {_shape(candidates)} came")


def streams(streams: Tensor, users: int, device: torch.device) -> None:
    _typed("streams", streams, (torch.int64,), device)
    if streams.dim() != 1 or streams.shape[0] != users:
        raise ValueError(f"streams: shape [B] = [{users}] is wanted, {_shape(streams)} came")


def temperature(temperature: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A scalar of the dtype of computation. Tensors' values are looked at in the op, and on the CPU only."""
    if isinstance(temperature, Tensor):
        floats("temperature", temperature)
        same_device("temperature", temperature, device)
        if temperature.dim():
            raise ValueError(f"temperature: a scalar is wanted, shape {_shape(temperature)} came")
        return temperature.to(dtype)
    if not isinstance(temperature, numbers.Real) or isinstance(temperature, bool):
        raise TypeError(f"temperature: a number or a scalar tensor is wanted, {temperature!r} came")
    positive_normal("temperature", temperature, dtype)
    # Filled, not copied from the host: a GPU need not be waited for, and a graph can be captured.
    return torch.full((), float(temperature), dtype=dtype, device=device)


def positive_normal(name: str, value: Any, dtype: torch.dtype) -> None:
    """What is neither zero, infinite nor denormal in the dtype."""
    limits = torch.finfo(dtype)
    if not limits.tiny <= value <= limits.max:
        raise ValueError(f"{name}: a number from {limits.tiny:.4g} to {limits.max:.4g} is wanted, {value} came")


def _typed(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], device: torch.device | None) -> None:
    wanted = " or ".join(str(dtype) for dtype in dtypes)
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: a torch.Tensor of {wanted} is wanted, {type(tensor).__name__} came")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: dtype {wanted} is wanted, {tensor.dtype} came")
    if device is not None:
        same_device(name, tensor, device)
