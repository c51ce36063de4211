"""The level above a packed table's codes: rows that are alike lie together, in cells, each with a code of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends import codes as formats
from .backends import reference_codes
from .backends.codes import BLOCK, CELL_BITS, MAX_CELL, Cells, Codes
from .backends.reference_codes import LARGEST_LENGTH, half_not_below

DEFAULT_ROWS = 64  # of a cell
MAX_ROWS = 2**31 - 1  # of a table: places are int32
_LEAST_LENGTH = 2.0**-14  # what is shorter may have underflowed


def rows_of_cells(blocks: Any) -> int:
    """The rows of a cell that pack(blocks=...) asks for, 0 for none."""
    if blocks is True or blocks is False:
        return DEFAULT_ROWS if blocks else 0
    if not isinstance(blocks, int) or blocks % BLOCK or not BLOCK <= blocks <= MAX_CELL:
        raise ValueError(
            f"blocks: True, False or a number of rows, a multiple of {BLOCK} up to {MAX_CELL}, is wanted, "
            f"{blocks!r} came"
        )
    return blocks


def check_rows(rows: int) -> None:
    if rows > MAX_ROWS:
        raise ValueError(f"blocks: tables of up to {MAX_ROWS:,} rows can be packed in blocks, this one has {rows:,}")


def blocks_of_cells(coded: int, cell_rows: int) -> int:
    """Blocks that hold the codes of all cells of so many rows."""
    return -(-(coded // cell_rows) // BLOCK)


def order_of_moved(order: Tensor, moved: Tensor, rows: int) -> Tensor:
    """The coded of so many rows by their places, after each has moved to a number of its own (-1: it is gone)."""
    coded = rows // BLOCK * BLOCK
    after = moved[order[:, 0].long()]
    after = after[(after >= 0) & (after < coded)]
    missing = torch.ones(coded, dtype=torch.bool, device=order.device)
    missing[after] = False
    return torch.cat([after, missing.nonzero().flatten()])


def room_for_cells(order: Tensor, r: int, cell_rows: int, has_bias: bool) -> Cells:
    """Cells of rows in an order (int64 [N], the rows by their places) that have no codes yet."""
    coded, device = len(order), order.device
    both = torch.empty((coded, 2), dtype=torch.int32, device=device)
    both[:, 0] = order
    both[order, 1] = torch.arange(coded, dtype=torch.int32, device=device)
    blocks = torch.zeros(
        (blocks_of_cells(coded, cell_rows), formats.block_bytes(r, CELL_BITS)), dtype=torch.uint8, device=device
    )
    bias = torch.empty(coded, device=device) if has_bias else None
    most = torch.empty(coded // cell_rows, device=device) if has_bias else None
    return Cells(both, bias, blocks, torch.zeros(2, device=device), most, cell_rows)


def write_cells(encoder: Any, codes: Codes, first: int, rows: Tensor, row_scale: Tensor | None) -> None:
    """Codes of cells from ``first`` on; ``rows`` are theirs, whose own codes and biases have been written.

    The code of a cell is that of its rows' mean. Its lost and norm are the largest distance of a row from it, and the
    longest row: it is a code of every row of the cell, as docs/design.md proves bounds for.
    """
    cells = codes.cells
    assert cells is not None
    count, r = len(rows) // cells.rows, rows.shape[1]
    if not count:
        return
    scaled = reference_codes.scaled_rows(rows, row_scale)
    centres = torch.nan_to_num(scaled, 0.0, 0.0, 0.0).view(count, cells.rows, r).mean(1)
    at = torch.arange(first, first + count, device=rows.device)
    encoder.encode_rows(torch.nan_to_num(centres, 0.0, 0.0, 0.0), None, _coded(codes), at)
    lost, norm = _lengths(codes, at.repeat_interleave(cells.rows), scaled)
    blocks = slice(first * cells.rows // BLOCK, (first + count) * cells.rows // BLOCK)
    norm = norm.where(formats.sides(codes, r)[2][blocks].flatten().isfinite(), torch.inf)
    for side, lengths in zip(formats.sides(_coded(codes), r)[1:], (lost, norm), strict=True):
        side[at // BLOCK, at % BLOCK] = half_not_below(lengths.view(count, cells.rows).amax(1))
    if cells.most is not None and cells.bias is not None:
        places = slice(first * cells.rows, (first + count) * cells.rows)
        cells.most[first : first + count] = cells.bias[places].view(count, cells.rows).amax(1)


def widen_cells(codes: Codes, places: Tensor, rows: Tensor, row_scale: Tensor | None) -> None:
    """Makes cells hold new rows at places (ascending), whose own codes and biases have been written. What a cell's code
    says of its rows only ever grows, so that who reads it meanwhile is right."""
    cells = codes.cells
    assert cells is not None
    within = places < cells.number() * cells.rows
    places, rows, r = places[within], rows[within], rows.shape[1]
    if not len(places):
        return
    scaled = reference_codes.scaled_rows(rows, None if row_scale is None else row_scale[within])
    of = places // cells.rows
    lost, norm = _lengths(codes, of, scaled)
    norm = norm.where(formats.sides(codes, r)[2][places // BLOCK, places % BLOCK].isfinite(), torch.inf)
    changed, which = of.unique(return_inverse=True)
    for side, lengths in zip(formats.sides(_coded(codes), r)[1:], (lost, norm), strict=True):
        at = (changed // BLOCK, changed % BLOCK)
        largest = lengths.new_zeros(len(changed)).scatter_reduce_(0, which, lengths, "amax")
        side[at] = torch.maximum(side[at], half_not_below(largest))
    if cells.most is not None and cells.bias is not None:
        cells.most.scatter_reduce_(0, of, cells.bias[places], "amax")


def share_left(codes: Codes, queries: Tensor, least: Tensor) -> float:
    """Of pairs of a query [n, r] and a cell, those whose bound reaches the least score [n] that is of use."""
    cells, r = codes.cells, queries.shape[1]
    assert cells is not None
    asked = reference_codes.encode_queries(queries[:, None], torch.ones_like(queries[:, :1], dtype=torch.bool), codes)
    rows = reference_codes.decode(_coded(codes), r, 0, len(cells.blocks))
    bounds = reference_codes.scan_bounds(asked, rows, _coded(codes), r)[:, : cells.number()]
    if cells.most is not None:
        bounds = bounds + cells.most
    left = ~(bounds < least[:, None]) | ~asked.bounded[:, None]
    return float(left.double().mean())


def references(codes: Codes, r: int) -> Tensor:
    """As :func:`urm_kernels.backends.codes.references`, of the cells."""
    return formats.references(_coded(codes), r)


def _coded(codes: Codes) -> Codes:
    """The codes of the cells, as those of rows."""
    assert codes.cells is not None
    return Codes(codes.rotation, codes.cells.reference, codes.cells.blocks)


def _lengths(codes: Codes, of: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Not below |w / a - c| and |x| / a of rows x, rotated w, for the codes c and scales a of their cells.

    Measured before the rotation, from what it makes of a c: both lengths are the same but for a relative 2^-20.
    """
    r = rows.shape[1]
    some, which = of.unique_consecutive(return_inverse=True)
    decoded = reference_codes.decode_rows(_coded(codes), r, some)
    centres = reference_codes.unrotate(decoded.codes, codes)  # over a
    scale = decoded.scale.float()[which][:, None]
    relative = rows / scale
    growth = 1.0 + (3 * r + 64) * 2.0**-24
    lost = torch.linalg.vector_norm(relative - centres.float()[which], dim=1) * growth
    norm = torch.linalg.vector_norm(relative, dim=1) * growth
    lost = lost + 2.0**-21 * (norm + torch.linalg.vector_norm(centres, dim=1).float()[which])  # of the differences
    norm = torch.maximum(norm, lost).clamp(min=_LEAST_LENGTH)
    ordinary = scale[:, 0] * norm <= LARGEST_LENGTH
    return lost.clamp(min=_LEAST_LENGTH).where(ordinary, 0.0), norm.where(ordinary, torch.inf)
