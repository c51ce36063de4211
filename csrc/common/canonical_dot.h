// The canonical dot product: the one sequence of fp32 roundings that every exact path of this library ends in.
//
//   sum[j] = fma(x[j + 16 t], y[j + 16 t], sum[j]),  t ascending, sum[j] starting from +0, j = 0..15
//   dot    = sums combined 8 apart, then 4, then 2, then 1
//
// Vector widths change nothing: a register of 16, two of 8 or a scalar loop perform the same operations on the same
// operands. Zero padding past the end of a row only ever adds fma(+0, +0, sum), which can change the sign of a zero;
// the sign of a returned zero is fixed to + at the end, so padded and masked tails agree.
#pragma once

#include "platform.h"

namespace urm {

constexpr int kLanes = 16;  // running sums of the canonical dot

URM_HOST_DEVICE float fused_multiply_add(float x, float y, float z) {
#if defined(__CUDA_ARCH__)
  return __fmaf_ieee_rn(x, y, z);  // keeps denormals whatever the compiler was told
#else
  return __builtin_fmaf(x, y, z);
#endif
}

URM_HOST_DEVICE float canonical_tree(float* sum) {
  for (int apart = kLanes / 2; apart > 0; apart /= 2)
    for (int j = 0; j < apart; ++j) sum[j] += sum[j + apart];
  return sum[0];
}

// The statement of the canonical dot as plain code; vector kernels are tested against it bit for bit.
URM_HOST_DEVICE float canonical_dot(const float* x, const float* y, int64_t r) {
  float sum[kLanes] = {};
  for (int64_t e = 0; e < r; ++e) sum[e % kLanes] = fused_multiply_add(x[e], y[e], sum[e % kLanes]);
  return canonical_tree(sum);
}

}  // namespace urm
