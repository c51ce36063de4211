// The library's own exp, log and log-sum-exp over a user's queries: a fixed order of IEEE operations, so that the
// result has the same bits on every machine. Stated error: 2e-6 max(1, largest |score|) against exact arithmetic.
#pragma once

#include "canonical_dot.h"

namespace urm {

constexpr float kLog2E = 1.44269504088896341f;

// x - n ln 2 for an integer n: ln 2 in two parts, the first product is exact.
URM_HOST_DEVICE float minus_logarithms(float x, float n) {
  const float f = fused_multiply_add(n, -0.693359375f, x);
  return fused_multiply_add(n, 2.12194440e-4f, f);
}

// The Taylor polynomial of exp of degree 7: remainder below 5.2e-9 on |f| <= ln(2) / 2.
URM_HOST_DEVICE float exp_polynomial(float f) {
  float p = 1.98412698e-4f;
  p = fused_multiply_add(p, f, 1.38888889e-3f);
  p = fused_multiply_add(p, f, 8.33333333e-3f);
  p = fused_multiply_add(p, f, 4.16666667e-2f);
  p = fused_multiply_add(p, f, 1.66666667e-1f);
  p = fused_multiply_add(p, f, 0.5f);
  p = fused_multiply_add(p, f, 1.0f);
  return fused_multiply_add(p, f, 1.0f);
}

// exp(x) for x <= 0. Below kExpFloor the result is 0: a term of a sum that is at least 1 is lost in rounding there.
constexpr float kExpFloor = -80.0f;

URM_HOST_DEVICE float canonical_exp(float x) {
  if (!(x >= kExpFloor)) return 0.0f;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = fused_multiply_add(x, kLog2E, magic);
  const float n = shifted - magic;
  const uint32_t exponent = static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23;
  float scale;
  memcpy(&scale, &exponent, sizeof scale);
  return exp_polynomial(minus_logarithms(x, n)) * scale;
}

// log(s) for finite s >= 1: s = 2^n g with g in [sqrt(1/2), sqrt(2)), log g = 2 atanh((g - 1) / (g + 1)).
URM_HOST_DEVICE float canonical_log(float s) {
  uint32_t bits;
  memcpy(&bits, &s, sizeof bits);
  const uint32_t offset = bits - 0x3F3504F3u;  // bits of sqrt(1/2)
  const float n = static_cast<float>(static_cast<int32_t>(offset) >> 23);
  bits = (offset & 0x007FFFFFu) + 0x3F3504F3u;
  float g;
  memcpy(&g, &bits, sizeof g);
  const float z = (g - 1.0f) / (g + 1.0f);
  const float w = z * z;
  float p = 0.222222222f;
  p = fused_multiply_add(p, w, 0.285714286f);
  p = fused_multiply_add(p, w, 0.4f);
  p = fused_multiply_add(p, w, 0.666666667f);
  p = fused_multiply_add(p, w, 2.0f);
  const float low = fused_multiply_add(n, -2.12194440e-4f, z * p);
  return fused_multiply_add(n, 0.693359375f, low);
}

// exp(dot - largest) added up, dots in ascending m. Kahan's sum: plain addition would lose the stated error from some
// thousand queries on.
struct SumOfExponentials {
  float largest;  // of all dots; finite
  float sum, excess;

#if defined(__CUDACC__)
  __host__ __device__
#endif
      void add(float dot) {
    const float term = canonical_exp(dot - largest) - excess;
    const float next = sum + term;
    excess = (next - sum) - term;
    sum = next;
  }
};

URM_HOST_DEVICE float log_of(const SumOfExponentials& sum) {
  return sum.largest + canonical_log(sum.sum);
}

// log(sum_m exp(dot[m stride])), m ascending; NaN if any dot is NaN; an infinite maximum is the result.
URM_HOST_DEVICE float canonical_log_sum_exp(const float* dot, int64_t stride, int64_t count) {
  float largest = dot[0];
  for (int64_t m = 0; m < count; ++m) {
    const float d = dot[m * stride];
    if (d != d) return d;
    if (d > largest) largest = d;
  }
  if (largest - largest != 0.0f) return largest;
  SumOfExponentials sum{largest, 0.0f, 0.0f};
  for (int64_t m = 0; m < count; ++m) sum.add(dot[m * stride]);
  return log_of(sum);
}

// The function above, of `count` dots none of which is above `bound`, is at most bound + relative * |bound| + offset as
// these roundings go: log(count) and room for the stated error, twice over.
URM_HOST_DEVICE void log_sum_exp_excess(int64_t count, float* relative, float* offset) {
  *relative = 4e-6f;
  *offset = canonical_log(static_cast<float>(count)) + 8 * *relative;
}

}  // namespace urm
