"""Philox and Gumbel noise, for kernels: the operations of csrc/common/philox.h and gumbel.h, one for one.

Kernels that use these are launched with ``enable_fp_fusion=False``. Words are int64 that hold 32 bits: a product of two
fits, as 64 bits without a sign.
"""

import triton
import triton.language as tl


@triton.jit
def _constant(like, value: tl.constexpr):
    return tl.full(like.shape, value, tl.float64)


@triton.jit
def _high(product):
    return (product >> 32) & 0xFFFFFFFF


@triton.jit
def _low(number):
    return number & 0xFFFFFFFF


@triton.jit
def random_words(seed, stream, number):
    """(first, second) of the 64 random bits of a number in a stream; int64, all of the same shape."""
    c0, c1 = _low(number >> 1), _high(number >> 1)
    c2, c3 = _low(stream), _high(stream)
    k0, k1 = _low(seed), _high(seed)
    for _ in tl.static_range(10):
        even, odd = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c2 = _high(odd) ^ c1 ^ k0, _high(even) ^ c3 ^ k1
        c1, c3 = _low(odd), _low(even)
        k0, k1 = _low(k0 + 0x9E3779B9), _low(k1 + 0xBB67AE85)
    odd_number = (number & 1) != 0
    return tl.where(odd_number, c2, c0), tl.where(odd_number, c3, c1)


@triton.jit
def seed_of_round(seed, number):
    """The seed of one round of a walk."""
    first, second = random_words(seed, tl.zeros_like(seed) - 1, tl.zeros_like(seed) + number)
    return (first << 32) | second


@triton.jit
def _scaled_log(n, f):
    z = f / (f + _constant(f, 2.0))
    w = z * z
    p = w * _constant(f, 2.0 / 21) + _constant(f, 2.0 / 19)
    p = p * w + _constant(f, 2.0 / 17)
    p = p * w + _constant(f, 2.0 / 15)
    p = p * w + _constant(f, 2.0 / 13)
    p = p * w + _constant(f, 2.0 / 11)
    p = p * w + _constant(f, 2.0 / 9)
    p = p * w + _constant(f, 2.0 / 7)
    p = p * w + _constant(f, 2.0 / 5)
    p = p * w + _constant(f, 2.0 / 3)
    p = p * w + _constant(f, 2.0)
    low = n * _constant(f, 1.9082149292705877e-10) + z * p
    return n * _constant(f, 0.693147180369123816490) + low


@triton.jit
def canonical_log64(s):
    """log(s) of positive normal float64 s."""
    root_half: tl.constexpr = 0x3FE6A09E667F3BCD
    offset = s.to(tl.int64, bitcast=True) - root_half
    g = ((offset & 0x000FFFFFFFFFFFFF) + root_half).to(tl.float64, bitcast=True)
    return _scaled_log((offset >> 52).to(tl.float64), g - _constant(s, 1.0))


@triton.jit
def gumbel_of(first, second):
    """float32 -log(-log(1 - v)) of the number v that two random words make."""
    first, second = first.to(tl.float64), second.to(tl.float64)
    whole = first * _constant(first, 4294967296.0) + second
    v = (whole + _constant(first, 0.5)) * _constant(first, 5.421010862427522e-20)  # 2**-64
    below_one = _constant(first, 0.9999999999999999)  # 1 - 2**-53
    v = tl.where(v < below_one, v, below_one)
    direct = _scaled_log(tl.zeros_like(v), -v)
    logarithm = tl.where(v < _constant(v, 0.28125), direct, canonical_log64(_constant(v, 1.0) - v))
    return (_constant(v, 0.0) - canonical_log64(-logarithm)).to(tl.float32)


@triton.jit
def gumbel_noise(seed, stream, row):
    """float32 noise of (seed, stream, row)."""
    first, second = random_words(seed, stream, row)
    return gumbel_of(first, second)
