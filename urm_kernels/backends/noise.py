"""Philox4x32-10 and the library's Gumbel noise in plain torch, with the bits of csrc/common/philox.h and gumbel.h.

Words are int64 tensors that hold 32 bits. Seeds, streams and rows are int64 tensors or integers; all broadcast. Philox:
J. Salmon, M. Moraes, R. Dror and D. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
DIRECT_LOG1P = 0.28125  # below this, log1p needs no rounded 1 - v
_ATANH = tuple(2.0 / n for n in range(21, 0, -2))
_LN2 = (0.693147180369123816490, 1.9082149292705877e-10)  # the first has 32 bits
_ROOT_HALF = 0x3FE6A09E667F3BCD  # bits of sqrt(1/2)
_MANTISSA = 0x000FFFFFFFFFFFFF


def _product(x: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """(high, low) words of a 64-bit product, which int64 could not hold."""
    low, high = x * (multiplier & 0xFFFF), x * (multiplier >> 16)
    return (high + (low >> 16)) >> 16, (((high & 0xFFFF) << 16) + low) & _WORD


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four random words of four counter words and two key words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        even, odd = _product(c0, _MULTIPLIERS[0]), _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = odd[0] ^ c1 ^ k0, odd[1], even[0] ^ c3 ^ k1, even[1]
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _halves(number: Tensor) -> tuple[Tensor, Tensor]:
    return number & _WORD, (number >> 32) & _WORD


def random_words(seed: Tensor, stream: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    """(first, second): 64 random bits of a number in a stream; one Philox block serves two neighbouring numbers."""
    words = philox4x32((*_halves(number >> 1), *_halves(stream)), _halves(seed))
    odd = (number & 1).bool()
    return torch.where(odd, words[2], words[0]), torch.where(odd, words[3], words[1])


def seed_of_round(seed: Tensor, number: int) -> Tensor:
    """The seed of one round of a walk: random bits of the call's seed in stream -1, which no user has."""
    first, second = random_words(seed, torch.full_like(seed, -1), torch.full_like(seed, number))
    return (first << 32) | second


def _scaled_log(n: Tensor, f: Tensor) -> Tensor:
    z = f / (f + 2.0)
    w = z * z
    p = torch.full_like(w, _ATANH[0])
    for c in _ATANH[1:]:
        p = p * w
        p = p + c
    high, low = n * _LN2[0], n * _LN2[1]
    low = low + z * p
    return high + low


def canonical_log64(s: Tensor) -> Tensor:
    """log(s) of positive normal float64 s."""
    offset = s.view(torch.int64) - _ROOT_HALF
    g = ((offset & _MANTISSA) + _ROOT_HALF).view(torch.float64)
    return _scaled_log((offset >> 52).double(), g + -1.0)


def canonical_log1p_minus(v: Tensor) -> Tensor:
    """log(1 - v) of float64 v in (0, 1 - 2**-53]."""
    return torch.where(v < DIRECT_LOG1P, _scaled_log(torch.zeros_like(v), -v), canonical_log64(1.0 - v))


def open_uniform(first: Tensor, second: Tensor) -> Tensor:
    """float64 in (0, 1): (first 2**32 + second + 1/2) 2**-64, rounded, but below 1."""
    whole = first.double() * 4294967296.0
    whole = whole + second.double()
    v = (whole + 0.5) * 2.0**-64
    return v.clamp(max=1.0 - 2.0**-53)


def gumbel_of(v: Tensor) -> Tensor:
    """-log(-log(1 - v)) in float64; a zero is +0."""
    return 0.0 - canonical_log64(-canonical_log1p_minus(v))


def gumbel_noise(seed: Tensor, stream: Tensor, row: Tensor) -> Tensor:
    """float32 noise of (seed, stream, row)."""
    return gumbel_of(open_uniform(*random_words(seed, stream, row))).float()


def perturbed_scores(scores: Tensor, temperature: Tensor, seed: Tensor, stream: Tensor, row: Tensor) -> Tensor:
    """float32 score / temperature + noise, one rounding each; a zero is +0."""
    return (scores / temperature + gumbel_noise(seed, stream, row)) + 0.0
