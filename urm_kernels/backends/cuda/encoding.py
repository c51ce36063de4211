"""Codes of rows, made on the device."""

from __future__ import annotations

from torch import Tensor

from .. import codes as formats
from ..codes import BLOCK, Codes
from .launching import Launcher, Words, address, table_words
from .plan import WARPS, Card

_WIDEST_TOGETHER = 1024  # up to this r a warp encodes eight rows, else two
_WIDEST_BLOCK = 256  # up to this r a block has WARPS warps, else one


def rotation_words(codes: Codes, r: int) -> Words:
    """struct Rotation."""
    return (r, codes.rotation.shape[1], codes.rotation.shape[0], codes.rotation.data_ptr())


def encode(
    items: Tensor, row_scale: Tensor | None, codes: Codes, rows: Tensor | None, launcher: Launcher, card: Card
) -> None:
    """Of all whole blocks, or of rows (ascending), whose new contents are the items."""
    count, r = items.shape
    tasks = count if rows is not None else len(codes.blocks) * BLOCK
    if tasks == 0 or len(codes.blocks) == 0:
        return
    at_once = 8 if r <= _WIDEST_TOGETHER else 2
    warps = WARPS if r <= _WIDEST_BLOCK else 1
    stride = -(-r // 32) * 32 + 4  # as encode_stride has it
    blocks = min(-(-tasks // (at_once * warps)), card.processors * 64 // warps)
    arguments = [
        table_words(items, None, row_scale),
        rotation_words(codes, r),
        (formats.bits_of(codes, r),),
        (codes.blocks.data_ptr(),),
        (len(codes.blocks),),
        (address(codes.fine),),
        (address(rows),),
        (at_once,),
    ]
    launcher.launch("urm::encode_rows", (blocks, 1), 32 * warps, warps * at_once * stride * 4, arguments)
