"""The library's own arithmetic in plain torch: float32 results with the bits of every other backend.

A float32 fused multiply-add is computed in float64, where the product is exact, and the one rounding of the sum is made
safe for the second (to float32) by rounding to odd (S. Boldo and G. Melquiond, "Emulation of FMA and correctly rounded
sums", IEEE Trans. Comput. 57(4), 2008).
"""

from __future__ import annotations

import torch
from torch import Tensor

LANES = 16  # running sums of a canonical dot


def fma32(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """round(x y + z) in float32, rounded once; arguments are float32 and broadcast."""
    product = x.double() * y.double()  # exact: 48 bits
    addend = z.double()
    total = product + addend
    # TwoSum: what the float64 addition lost, exactly.
    back = total - product
    lost = (product - (total - back)) + (addend - back)
    # Rounding to odd: an inexact sum whose last bit is even moves one step towards what was lost.
    bits = total.view(torch.int64)
    inexact = torch.isfinite(total) & (lost != 0) & ((bits & 1) == 0)
    step = torch.where((lost > 0) == (total > 0), 1, -1)
    return torch.where(inexact, bits + step, bits).view(torch.float64).float()


def canonical_dots(queries: Tensor, rows: Tensor) -> Tensor:
    """queries [..., r] . rows [..., r], leading dimensions broadcast, in the order of csrc/common/canonical_dot.h."""
    if queries.dtype == torch.float64 or rows.dtype == torch.float64:
        return (queries.double() * rows.double()).sum(-1)
    r = queries.shape[-1]
    shape = torch.broadcast_shapes(queries.shape, rows.shape)[:-1]
    sums = torch.zeros((*shape, LANES), dtype=torch.float32, device=queries.device)
    for first in range(0, r, LANES):
        width = min(LANES, r - first)
        part = slice(first, first + width)
        sums[..., :width] = fma32(queries[..., part].float(), rows[..., part].float(), sums[..., :width])
    for apart in (8, 4, 2, 1):
        sums = sums[..., :apart] + sums[..., apart : 2 * apart]
    return sums[..., 0]


def scalar(value: float, like: Tensor) -> Tensor:
    """A float32 constant on the device of `like`."""
    return torch.tensor(value, dtype=torch.float32, device=like.device)


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    total = scalar(coefficients[0], x).expand_as(x)
    for c in coefficients[1:]:
        total = fma32(total, x, scalar(c, x))
    return total


def minus_logarithms(x: Tensor, n: Tensor) -> Tensor:
    """x - n ln 2, the operations of csrc/common/log_sum_exp.h."""
    return fma32(n, scalar(2.12194440e-4, x), fma32(n, scalar(-0.693359375, x), x))


def exp_polynomial(f: Tensor) -> Tensor:
    """exp(f) for small f, the operations of csrc/common/log_sum_exp.h."""
    return _polynomial((1.98412698e-4, 1.38888889e-3, 8.33333333e-3, 4.16666667e-2, 1.66666667e-1, 0.5, 1.0, 1.0), f)


def canonical_exp(x: Tensor) -> Tensor:
    """exp(x) for x <= 0, the operations of csrc/common/log_sum_exp.h."""
    small = ~(x >= -80.0)
    x = x.masked_fill(small, 0.0)
    magic = scalar(12582912.0, x)
    n = fma32(x, scalar(1.44269504088896341, x), magic) - magic
    p = exp_polynomial(minus_logarithms(x, n))
    scale = ((n.to(torch.int32) + 127) << 23).view(torch.float32)
    return (p * scale).masked_fill(small, 0.0)


def canonical_log(s: Tensor) -> Tensor:
    """log(s) for finite s >= 1, the operations of csrc/common/log_sum_exp.h."""
    root_half = 0x3F3504F3
    offset = s.view(torch.int32) - root_half
    n = (offset >> 23).to(torch.float32)
    g = ((offset & 0x007FFFFF) + root_half).view(torch.float32)
    z = (g - 1.0) / (g + 1.0)
    p = _polynomial((0.222222222, 0.285714286, 0.4, 0.666666667, 2.0), z * z)
    low = fma32(n, scalar(-2.12194440e-4, s), z * p)
    return fma32(n, scalar(0.693359375, s), low)


def canonical_log_sum_exp(dots: Tensor, exists: Tensor) -> Tensor:
    """log(sum over existing m of exp(dots[:, m])): dots [B, M, n], exists [B, M]."""
    there = exists[..., None]
    largest = dots.masked_fill(~there, -torch.inf).amax(1)
    terms = canonical_exp(dots - largest[:, None])
    total, excess = torch.zeros_like(largest), torch.zeros_like(largest)  # Kahan's sum
    for m in range(dots.shape[1]):
        term = terms[:, m] - excess
        following = total + term
        excess = torch.where(there[:, m], (following - total) - term, excess)
        total = torch.where(there[:, m], following, total)
    finite = torch.isfinite(largest)
    return torch.where(finite, largest + canonical_log(total.masked_fill(~finite, 1.0)), largest)
