"""Codes by the reference: what csrc/common/codes.h and csrc/cpu/kernels_codes.h say, in plain torch.

Codes have the bits that the C++ backend makes. Bounds are formed in float64 from the same integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import codes as formats
from .canonical import fma32
from .codes import BLOCK, QUAD, Codes

_CLIPS = {2: (14, 9), 4: (16, 7), 8: (16, 1)}  # of scales tried: the first, in 16ths of the largest code, and how many
_MOST = {2: 3, 4: 7, 8: 127}  # the largest code
_OFFSET = {2: 3, 4: 8, 8: 128}  # added to codes, so that they are unsigned
_SUMS = 4  # running sums of a sum over elements
LARGEST_LENGTH = 2.0**60
LEAST_SCALE = 2.0**-100
LARGEST_SCALED, LEAST_SCALED = 2.0**50, 2.0**-20  # elements of rows that have a scale
_LEAST_KEPT = 2.0**-120
_UNDERFLOW = 2.0**-126


def rotate(rows: Tensor, codes: Codes) -> Tensor:
    """float32 [..., r], rotated by the steps of csrc/common/rotation.h."""
    r, p = rows.shape[-1], codes.rotation.shape[1]
    factor = torch.tensor(1 / math.sqrt(p), dtype=torch.float32, device=rows.device)
    out = rows.clone()
    for step, signs in enumerate(codes.rotation.to(rows.device)):
        at = _rotated_at(r, p, step, rows.device)
        x = out[..., at] * (signs * factor)
        out[..., at] = _hadamard(x)
    return out


def _hadamard(x: Tensor) -> Tensor:
    apart = 1
    while apart < x.shape[-1]:
        pairs = x.unflatten(-1, (-1, 2, apart))
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack([first + second, first - second], -2).flatten(-3)
        apart *= 2
    return x


def unrotate(rows: Tensor, codes: Codes) -> Tensor:
    """float64 [..., r], what :func:`rotate` makes these rows of."""
    r, p = rows.shape[-1], codes.rotation.shape[1]
    factor = float(torch.tensor(1 / math.sqrt(p), dtype=torch.float32))
    out = rows.double().clone()
    for step in reversed(range(len(codes.rotation))):
        at = _rotated_at(r, p, step, rows.device)
        out[..., at] = _hadamard(out[..., at]) * (codes.rotation[step].double().to(rows.device) / (p * factor))
    return out


def _rotated_at(r: int, p: int, step: int, device: torch.device) -> Tensor:
    """The elements that a step takes."""
    start = 0 if p == r else step * (r * 618 // 1000) % r
    return (torch.arange(p, device=device) + start) % r


def _sum(r: int, term: Callable[[slice, Tensor], Tensor], like: Tensor) -> Tensor:
    """The sum over elements of term(elements, sums so far): element e goes to sum e % 4."""
    sums = like.new_zeros((*like.shape[:-1], _SUMS))
    for e in range(0, r, _SUMS):
        width = min(_SUMS, r - e)
        sums[..., :width] = term(slice(e, e + width), sums[..., :width])
    return (sums[..., 0] + sums[..., 2]) + (sums[..., 1] + sums[..., 3])


class EncodedRows(NamedTuple):
    codes: Tensor  # int32 [n, r]
    scale: Tensor  # float32 [n]
    lost: Tensor  # float16 [n]
    norm: Tensor  # float16 [n]


def encode(rows: Tensor, codes: Codes, bits: int) -> EncodedRows:
    """Of float32 rows [n, r], before their rotation."""
    r, most = rows.shape[1], float(_MOST[bits])
    before = rows.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(1)
    w = rotate(rows, codes)
    largest = w.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(1)
    ordinary = (largest >= LEAST_SCALE) & (largest <= LARGEST_LENGTH)
    exponent = torch.frexp(largest.where(ordinary, 1.0)).exponent - 1
    power = torch.ldexp(torch.ones_like(largest), exponent).where(ordinary, 1.0)
    inverse = torch.ldexp(torch.ones_like(largest), -exponent).where(ordinary, 0.0)
    w, largest = w * inverse[:, None], largest.where(ordinary, 0.0) * inverse

    def rounded(x: Tensor, factor: Tensor) -> Tensor:
        x = x * factor[:, None]
        # Of 2 bits the nearest odd code.
        return (torch.round(x * 0.5 - 0.5) * 2 + 1 if bits == 2 else torch.round(x)).clamp(-most, most)

    def both(factor: Tensor) -> tuple[Tensor, Tensor]:
        dot = _sum(r, lambda e, sums: fma32(w[:, e], rounded(w[:, e], factor), sums), w)
        length = _sum(r, lambda e, sums: fma32(rounded(w[:, e], factor), rounded(w[:, e], factor), sums), w)
        return dot, length

    squares = _sum(r, lambda e, sums: fma32(w[:, e], w[:, e], sums), w)
    best, chosen = torch.full_like(largest, -1.0), torch.zeros_like(largest)
    first_clip, clips = _CLIPS[bits]
    for clip in range(clips):
        share = torch.tensor(first_clip - clip, dtype=torch.float32) / torch.tensor(16.0 * most, dtype=torch.float32)
        factor = 1.0 / (largest * share.to(largest.device))
        dot, length = both(factor)
        quality = dot * dot / length
        better = best < quality
        best, chosen = quality.where(better, best), factor.where(better, chosen)
    dot, _ = both(chosen)
    scale = squares / dot
    minus = (-scale)[:, None]

    def rest(e: slice, sums: Tensor) -> Tensor:
        lost = fma32(minus.expand(-1, sums.shape[1]), rounded(w[:, e], chosen), w[:, e])
        return fma32(lost, lost, sums)

    growth = 1.0 + torch.tensor((3 * r + 64) * 2.0**-24, dtype=torch.float32, device=rows.device)
    lost = _sqrt(_sum(r, rest, w)) / scale * growth
    norm = _sqrt(squares) / scale * growth
    scaled = scale * power
    zero = (before == 0) & (squares == 0)
    kept = ~zero & ordinary & (scaled >= LEAST_SCALE) & (scaled * norm <= LARGEST_LENGTH) & (lost <= norm)
    # Of 2 bits there is no code 0: the scale of a zero row is.
    no_scale = zero if bits == 2 else torch.zeros_like(zero)
    return EncodedRows(
        rounded(w, chosen).where(kept[:, None], _no_code(bits)).to(torch.int32),
        scaled.where(kept, 1.0).masked_fill(no_scale, 0.0),
        half_not_below(lost.where(kept, 0.0)),
        half_not_below(norm.where(kept, torch.where(zero, 0.0, torch.inf))),
    )


def _sqrt(x: Tensor) -> Tensor:
    """Correctly rounded, which torch's own of float32 is not on every CPU: a fifth of its results are off by one."""
    return x.double().sqrt().float()


def half_not_below(x: Tensor) -> Tensor:
    half = x.half()
    below = half.float() < x
    return (half.view(torch.int16) + below.to(torch.int16)).view(torch.float16)


def scaled_rows(items: Tensor, row_scale: Tensor | None) -> Tensor:
    rows = items.float()
    if row_scale is None:
        return rows
    # Dots are formed with the row as it lies, and scaled: what may overflow or vanish there may hold anything.
    scale = row_scale.float()
    before = rows.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(1)
    rows = rows * scale[:, None]
    vanished = (rows == 0).all(1) & (before > 0) & (scale != 0)
    enlarges = (before > 0) & (before < LEAST_SCALED) & (scale.abs() > 1)
    return rows.masked_fill((vanished | enlarges | (before > LARGEST_SCALED))[:, None], torch.nan)


def _no_code(bits: int) -> int:
    """Of rows that have none, and past the end of a row."""
    return 1 if bits == 2 else 0


def _padded(codes: Tensor, bits: int) -> Tensor:
    """uint8 [n, quads * 4]: codes + offset, of 2 bits half of that; also past the end of a row."""
    n, r = codes.shape
    out = torch.full((n, formats.quads(r) * QUAD), _no_code(bits), dtype=torch.int32, device=codes.device)
    out[:, :r] = codes
    return ((out + _OFFSET[bits]) // (2 if bits == 2 else 1)).to(torch.uint8)


def _bytes(side: Tensor, *shape: int) -> Tensor:
    return side.contiguous().view(torch.uint8).view(*shape)


def encode_blocks(items: Tensor, row_scale: Tensor | None, codes: Codes) -> None:
    """Writes the codes of all whole blocks of the items."""
    r = items.shape[1]
    bits, step = formats.bits_of(codes, r), max(1, (1 << 22) // (BLOCK * r))
    for first in range(0, len(codes.blocks), step):
        blocks = codes.blocks[first : first + step]
        part = slice(first * BLOCK, (first + len(blocks)) * BLOCK)
        rows = scaled_rows(items[part], None if row_scale is None else row_scale[part])
        encoded = encode(rows, codes, bits)
        wide = _padded(encoded.codes, bits).view(len(blocks), BLOCK, -1, QUAD).transpose(1, 2)
        if bits < 8:
            wide = wide[:, :, : BLOCK // 2] | (wide[:, :, BLOCK // 2 :] << bits)
        if bits == 2:
            even, odd = wide[:, ::2], wide[:, 1::2]
            wide = even.clone()
            wide[:, : odd.shape[1]] |= odd << 4
        sides = (_bytes(side, len(blocks), -1) for side in encoded[1:])
        blocks.copy_(torch.cat([wide.reshape(len(blocks), -1), *sides], 1))
        if codes.fine is not None:
            codes.fine[part] = _fine(encode(rows, codes, formats.fine_bits(bits)), formats.fine_bits(bits))


def _fine(encoded: EncodedRows, bits: int) -> Tensor:
    n = len(encoded.codes)
    wide = _padded(encoded.codes, bits)
    if bits == 4:
        first, second = wide.view(n, -1, 2, QUAD // 2).unbind(2)
        wide = (first | (second << 4)).flatten(1)
    return torch.cat([wide, *(_bytes(side[:, None], n, -1) for side in encoded[1:])], 1)


def encode_rows(items: Tensor, row_scale: Tensor | None, codes: Codes, rows: Tensor) -> None:
    """Writes the codes of rows (ascending), whose new contents are the items, into their places."""
    coded = int((rows < len(codes.blocks) * BLOCK).sum())
    if not coded:
        return
    rows, r = rows[:coded], items.shape[1]
    bits = formats.bits_of(codes, r)
    values = scaled_rows(items[:coded], None if row_scale is None else row_scale[:coded])
    encoded = encode(values, codes, bits)
    blocks, lanes = rows // BLOCK, rows % BLOCK
    wide = _padded(encoded.codes, bits)
    e = torch.arange(wide.shape[1], device=rows.device)
    across = BLOCK if bits == 8 else BLOCK // 2
    quad = e // QUAD // 2 if bits == 2 else e // QUAD
    places = (quad * across + (lanes % across)[:, None]) * QUAD + e % QUAD
    if bits == 8:
        codes.blocks[blocks[:, None], places] = wide
    else:  # what shares bytes one after the other: two halves of a block and, of 2 bits, quads by twos
        for upper in (False, True):
            half = (lanes >= across) == upper
            for odd in range(2 if bits == 2 else 1):
                mine = (e // QUAD) % 2 == odd if bits == 2 else e >= 0
                shift = bits * upper + 4 * odd
                at, field = (blocks[half][:, None], places[half][:, mine]), ((1 << bits) - 1) << shift
                codes.blocks[at] = (codes.blocks[at] & (0xFF - field)) | (wide[half][:, mine] << shift)
    for side, values in zip(formats.sides(codes, r), encoded[1:], strict=True):
        side[blocks, lanes] = values
    if codes.fine is not None:
        fine = formats.fine_bits(bits)
        again = scaled_rows(items[:coded], None if row_scale is None else row_scale[:coded])
        codes.fine[rows] = _fine(encode(again, codes, fine), fine)


class CodedRows(NamedTuple):
    """Decoded: codes float64 [n, r], and scale, lost, norm float64 [n]."""

    codes: Tensor
    scale: Tensor
    lost: Tensor
    norm: Tensor


def decode(codes: Codes, r: int, first: int, last: int) -> CodedRows:
    """Of blocks [first, last)."""
    bits = formats.bits_of(codes, r)
    part = codes._replace(blocks=codes.blocks[first:last])
    count = len(part.blocks)
    across = BLOCK if bits == 8 else BLOCK // 2
    wide = part.blocks[:, : -BLOCK * formats.SIDE_BYTES].view(count, -1, across, QUAD)
    if bits == 2:
        wide = torch.stack([wide & 15, wide >> 4], 2).flatten(1, 2)
    if bits < 8:
        wide = torch.cat([wide & ((1 << bits) - 1), wide >> bits], 2)
    unsigned = wide.transpose(1, 2).reshape(count * BLOCK, -1)[:, :r].double()
    unsigned = unsigned * 2 if bits == 2 else unsigned
    return CodedRows(unsigned - _OFFSET[bits], *(s.double().flatten() for s in formats.sides(part, r)))


def decode_rows(codes: Codes, r: int, rows: Tensor) -> CodedRows:
    """Of chosen rows, from their blocks."""
    blocks, which = (rows // BLOCK).unique_consecutive(return_inverse=True)
    whole = decode(codes._replace(blocks=codes.blocks[blocks]), r, 0, len(blocks))
    at = which * BLOCK + rows % BLOCK
    return CodedRows(*(field[at] for field in whole))


def decode_fine(codes: Codes, r: int, rows: Tensor) -> CodedRows:
    """Of chosen rows."""
    assert codes.fine is not None
    some = codes.fine[rows]
    bits = formats.fine_bits(formats.bits_of(codes, r))
    at = formats.quads(r) * QUAD * bits // 8
    wide = some[:, :at]
    if bits == 4:
        pairs = wide.reshape(len(some), -1, 1, QUAD // 2)
        wide = torch.cat([pairs & 15, pairs >> 4], 2).flatten(1)
    sides = (some[:, at : at + 4].contiguous().view(torch.float32), some[:, at + 4 :].contiguous().view(torch.float16))
    scale, both = (side.double() for side in sides)
    return CodedRows(wide[:, :r].double() - _OFFSET[bits], scale[:, 0], both[:, 0], both[:, 1])


class QueryCodes(NamedTuple):
    """Of queries [B, M, r] that exist: u float64 [B, M, r]; kept and lost float64 [B, M]; step [B]; bounded [B]: the
    others are too long, or not finite, for a certain bound."""

    u: Tensor
    kept: Tensor
    lost: Tensor
    step: Tensor
    exists: Tensor
    bounded: Tensor


def encode_queries(queries: Tensor, exists: Tensor, codes: Codes) -> QueryCodes:
    there = queries.masked_fill(~exists[..., None], 0.0)
    x = rotate(there, codes)
    zero = (there == 0).all(-1).all(-1)
    largest = x.abs().amax((1, 2))
    step = torch.where(zero, torch.ones_like(largest), largest / 127.0)
    bounded = (step >= LEAST_SCALE) & (step <= LARGEST_LENGTH)
    step = step.where(bounded, 1.0)
    x = x.masked_fill(~bounded[:, None, None], 0.0)
    u = torch.round(x / step[:, None, None]).clamp(-127, 127).double()
    wide = step.double()
    kept = torch.linalg.vector_norm(u, dim=2) * wide[:, None]
    lost = torch.linalg.vector_norm(x.double() - u * wide[:, None, None], dim=2)
    kept, lost = ((part * (1 + 1e-6) + _LEAST_KEPT) for part in (kept, lost))
    bounded &= kept.amax(1) + lost.amax(1) <= LARGEST_LENGTH
    return QueryCodes(u, kept, lost, wide, exists, bounded)


def _error(r: int, codes: Codes) -> float:
    p = codes.rotation.shape[1]
    roundings = codes.rotation.shape[0] * (p.bit_length() - 1 + 2)
    return (r // 16 + 2 * roundings + 64) * 2.0**-24


def scan_bounds(queries: QueryCodes, rows: CodedRows, codes: Codes, r: int) -> Tensor:
    """Upper bounds of every user's largest dot, float64 [B, n]: each query's own slack for the table's references, the
    user's largest lengths for what a row exceeds them by."""
    lost_reference, norm_reference = (max(float(x), 0.0) for x in codes.reference)
    kept, lost = queries.kept.amax(1)[:, None], queries.lost.amax(1)[:, None]
    slack = torch.ceil((queries.kept * lost_reference + queries.lost * norm_reference) / queries.step[:, None])
    sums = queries.u @ rows.codes.T + slack[..., None]
    sums = sums.masked_fill(~queries.exists[..., None], -torch.inf).amax(1)
    more = kept * (rows.lost - lost_reference).clamp(min=0) + lost * (rows.norm - norm_reference).clamp(min=0)
    more = more + _error(r, codes) * (kept + lost) * rows.norm
    return rows.scale * (sums * queries.step[:, None] + more) + _UNDERFLOW


def own_bounds(queries: QueryCodes, rows: CodedRows, codes: Codes, r: int) -> Tensor:
    """Upper bounds of every dot, float64 [B, M, n], from each query's own lengths."""
    most = (queries.kept.amax(1) + queries.lost.amax(1))[:, None, None]
    slack = queries.kept[..., None] * rows.lost + queries.lost[..., None] * rows.norm
    slack = slack + _error(r, codes) * most * rows.norm
    return rows.scale * ((queries.u @ rows.codes.T) * queries.step[:, None, None] + slack) + _UNDERFLOW
