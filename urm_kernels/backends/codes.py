"""Codes of a packed table as tensors: what csrc/common/codes.h describes."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 32  # rows
MAX_CELL = 4096  # rows of a cell
CELL_BITS = 4  # of the code of a cell
QUAD = 4  # elements whose products a 32-bit lane adds
SIDE_BYTES = 8  # of a row: scale, lost, norm
MAX_WIDTH = 8192  # up to here sums of products fit 32 bits
FEWEST_PROBABLE = 16  # elements of rows that have probable bounds
STEPS = {True: 3, False: 6}  # of a rotation, by whether r is a power of two


class Cells(NamedTuple):
    """Runs of codes whose rows are alike, and one code for each, from which bounds of all its rows follow.

    order: int32 [N // 32 * 32, 2]: of place p the row whose codes lie there, and of row p the place of its codes. bias:
    float32 [N // 32 * 32], the table's bias in the order of the codes, or None. blocks: uint8, codes of cells as 4-bit
    codes of rows, the last block filled up. reference: float32 [2], as that of Codes. most: float32 [cells], the
    largest bias of a cell, or None. rows: of a cell; places behind the last whole cell have none.
    """

    order: Tensor
    bias: Tensor | None
    blocks: Tensor
    reference: Tensor
    most: Tensor | None
    rows: int

    def number(self) -> int:
        """Cells."""
        return len(self.order) // self.rows


class Codes(NamedTuple):
    """Low-bit copies of rows, from which certain upper bounds follow.

    rotation: float32 [steps, p], random signs. reference: float32 [2], of lost and norm: what most rows exceed.
    blocks: uint8 [N // 32, bytes of a block]; the last N % 32 rows have no codes. fine: uint8 [N // 32 * 32, bytes of a
    row] or None, 8-bit codes for the survivors of 4-bit ones, 4-bit ones for those of 2-bit ones. cells: None where
    codes lie in the order of the rows.
    """

    rotation: Tensor
    reference: Tensor
    blocks: Tensor
    fine: Tensor | None = None
    cells: Cells | None = None


def quads(r: int) -> int:
    return -(-r // QUAD)


def block_bytes(r: int, bits: int) -> int:
    together = 2 if bits == 2 else 1  # quads
    return -(-quads(r) // together) * together * QUAD * BLOCK * bits // 8 + BLOCK * SIDE_BYTES


def fine_bits(bits: int) -> int:
    """Of the codes beside those of `bits`."""
    return 4 if bits == 2 else 8


def fine_bytes(r: int, bits: int) -> int:
    """Of a row of fine codes of `bits`."""
    return quads(r) * QUAD * bits // 8 + SIDE_BYTES


def bits_of(codes: Codes, r: int) -> int:
    """2, 4 or 8, of the blocks. 2 bits, whose blocks of up to four elements are as large as those of 4 bits, come with
    fine codes of 4 bits, and nothing else does."""
    if codes.fine is not None and codes.fine.shape[1] == fine_bytes(r, 4):
        return 2
    return 4 if codes.blocks.shape[1] == block_bytes(r, 4) else 8


def are_shapes(blocks: int, fine: int | None, r: int) -> bool:
    """Whether some kind of codes has blocks and fine rows of so many bytes."""
    if fine is None:
        return blocks in (block_bytes(r, 4), block_bytes(r, 8))
    return (blocks, fine) in [(block_bytes(r, bits), fine_bytes(r, fine_bits(bits))) for bits in (2, 4)]


def hadamard_size(r: int) -> int:
    """The largest power of two that is not above r."""
    return 1 << (max(r, 1).bit_length() - 1)


def rotation(r: int, seed: int) -> Tensor:
    """float32 [steps, p], the random signs of a rotation."""
    random = torch.Generator().manual_seed(seed)
    p = hadamard_size(r)
    return torch.randint(2, (STEPS[p == r], p), generator=random).mul_(2).sub_(1).float()


def slack_shares(recall: float, codes: Codes, r: int) -> tuple[float, float]:
    """Shares of the certain slack, of the blocks and of the fine codes, with which a row's bound is below its score
    with a probability of at most 1 - recall. (1, 1): the bounds are the certain ones.

    What a code lost is orthogonal to its row, and a random rotation gives it any direction in the r - 1 dimensions that
    are left: its product with a query is normal with a standard deviation of |lost| |query| / sqrt(r - 1). Of two
    levels the first may fail in 7 of 8 cases. Few elements are not mixed well by random signs.
    """
    if recall == 1 or r < FEWEST_PROBABLE:
        return 1.0, 1.0
    parts = (1.0, 1.0) if codes.fine is None else (7 / 8, 1 / 8)
    deviations = (max(-NormalDist().inv_cdf((1 - recall) * part), 2.0**-10) for part in parts)
    first, second = (min(z / math.sqrt(r - 1), 1.0) for z in deviations)
    return first, second


def sides(codes: Codes, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, lost and norm [N // 32, 32] of every coded row, as views."""
    at = block_bytes(r, bits_of(codes, r)) - BLOCK * SIDE_BYTES
    scale = codes.blocks[:, at : at + 4 * BLOCK].view(torch.float32)
    lost = codes.blocks[:, at + 4 * BLOCK : at + 6 * BLOCK].view(torch.float16)
    return scale, lost, codes.blocks[:, at + 6 * BLOCK :].view(torch.float16)


def references(codes: Codes, r: int) -> Tensor:
    """The 10 % quantiles of lost and norm in a sample of the blocks, float32 [2]."""
    if not len(codes.blocks):
        return torch.zeros(2, device=codes.blocks.device)
    sample = codes._replace(blocks=codes.blocks[:: max(1, len(codes.blocks) // 2048)])
    lost, norm = (part.flatten().float() for part in sides(sample, r)[1:])
    finite = torch.isfinite(norm) & (norm > 0)
    if not finite.any():
        return torch.zeros(2, device=codes.blocks.device)
    at = (int(finite.sum()) - 1) // 10 + 1
    return torch.stack([part[finite].kthvalue(at).values for part in (lost, norm)])
