"""Rows as the tensor cores take them, and their lengths."""

import triton
import triton.language as tl

_SQUARE = tl.constexpr("{ .reg .b32 zero; mov.b32 zero, 0x80008000; fma.rn.bf16x2 $0, $1, $1, zero; }")


@triton.jit
def squares_of(v, TENSOR_SQUARES: tl.constexpr):
    """Squared lengths of the rows of a tile, at most 2^-8 too small.

    Widening and adding bfloat16 squares is as much work as all the rest of a tile with few queries. With TENSOR_SQUARES
    they are rounded in pairs, and the tensor core adds them: its sum is the same in every column.
    """
    if TENSOR_SQUARES:
        squares = tl.inline_asm_elementwise(_SQUARE, "=r,r", [v], dtype=tl.bfloat16, is_pure=True, pack=2)
        return tl.max(tl.dot(squares, tl.full([v.shape[1], 16], 1.0, tl.bfloat16)), 1)
    else:
        wide = v.to(tl.float32)
        return tl.sum(wide * wide, 1)


@triton.jit
def rows_at(pointers, inside, negative):
    """The elements in the product's type: float8 becomes bfloat16, exactly. Rows that are `negative` change sign.

    float8 products of the tensor cores would lose three of the queries' four digits, and keep about fourteen bits of a
    sum; widening takes a few instructions of the time in which half as many bytes are read.
    """
    v = tl.load(pointers, mask=inside, other=0.0)
    if v.dtype == tl.float8e4nv:
        v = v.to(tl.bfloat16)
    if negative is not None:
        if v.dtype == tl.float32:
            sign = tl.where(negative, -(2**31), 0).to(tl.int32)
            v = (v.to(tl.int32, bitcast=True) ^ sign[:, None]).to(tl.float32, bitcast=True)
        else:
            sign = tl.where(negative, -(2**15), 0).to(tl.int16)
            v = (v.to(tl.int16, bitcast=True) ^ sign[:, None]).to(v.dtype, bitcast=True)
    return v
