// Gumbel noise of a (seed, stream, row), the same bits on every machine: a counter's random bits through a logarithm of
// the library's own, a fixed order of IEEE double operations without a fused one.
//
// log and log1p are within 4 units in the last place of exact arithmetic where they are used, the noise before its one
// rounding to float within 2^-50 max(1, |noise|). 64 bits: at 5e7 equal items, 32 would leave most draws to ties.
#pragma once

#include "philox.h"

namespace urm {

// Operations that no compiler option contracts or flushes.
URM_HOST_DEVICE double plain_product(double x, double y) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(x, y);
#else
  return x * y;
#endif
}

URM_HOST_DEVICE double plain_sum(double x, double y) {
#if defined(__CUDA_ARCH__)
  return __dadd_rn(x, y);
#else
  return x + y;
#endif
}

URM_HOST_DEVICE double plain_quotient(double x, double y) {
#if defined(__CUDA_ARCH__)
  return __ddiv_rn(x, y);
#else
  return x / y;
#endif
}

// n ln 2 + log(1 + f) for 1 + f in [sqrt(1/2), sqrt(2)): log(1 + f) = 2 atanh(z), z = f / (2 + f), z^2 < 0.0295. The
// Taylor polynomial of degree 10 in z^2 leaves less than 2^-60 of the result. ln 2 is in two parts: n times the first,
// of 32 bits, is exact.
URM_HOST_DEVICE double scaled_log(double n, double f) {
  const double z = plain_quotient(f, plain_sum(2.0, f));
  const double w = plain_product(z, z);
  double p = 2.0 / 21;
  p = plain_sum(plain_product(p, w), 2.0 / 19);
  p = plain_sum(plain_product(p, w), 2.0 / 17);
  p = plain_sum(plain_product(p, w), 2.0 / 15);
  p = plain_sum(plain_product(p, w), 2.0 / 13);
  p = plain_sum(plain_product(p, w), 2.0 / 11);
  p = plain_sum(plain_product(p, w), 2.0 / 9);
  p = plain_sum(plain_product(p, w), 2.0 / 7);
  p = plain_sum(plain_product(p, w), 2.0 / 5);
  p = plain_sum(plain_product(p, w), 2.0 / 3);
  p = plain_sum(plain_product(p, w), 2.0);
  const double low = plain_sum(plain_product(n, 1.9082149292705877e-10), plain_product(z, p));
  return plain_sum(plain_product(n, 0.693147180369123816490), low);
}

// log(s) for a positive normal s = 2^n (1 + f).
URM_HOST_DEVICE double canonical_log64(double s) {
  const uint64_t root_half = 0x3FE6A09E667F3BCDull;
  uint64_t bits;
  memcpy(&bits, &s, sizeof bits);
  const int64_t offset = static_cast<int64_t>(bits - root_half);
  bits = (static_cast<uint64_t>(offset) & 0x000FFFFFFFFFFFFFull) + root_half;
  double g;
  memcpy(&g, &bits, sizeof g);
  return scaled_log(static_cast<double>(offset >> 52), plain_sum(g, -1.0));
}

// log(1 - v) for v in (0, 1 - 2^-53]; 1 - v is rounded only where that changes little.
constexpr double kDirectLog1p = 0.28125;

URM_HOST_DEVICE double canonical_log1p_minus(double v) {
  return v < kDirectLog1p ? scaled_log(0.0, -v) : canonical_log64(plain_sum(1.0, -v));
}

// A number in (0, 1) from 64 random bits: (bits + 1/2) 2^-64, rounded, but below 1.
URM_HOST_DEVICE double open_uniform(uint64_t bits) {
  // Both parts are exact, so their sum is the integer rounded once.
  const double high = plain_product(static_cast<double>(static_cast<uint32_t>(bits >> 32)), 4294967296.0);
  const double whole = plain_sum(high, static_cast<double>(static_cast<uint32_t>(bits)));
  const double v = plain_product(plain_sum(whole, 0.5), 0x1p-64);
  return v < 1.0 - 0x1p-53 ? v : 1.0 - 0x1p-53;
}

// A zero is +0.
URM_HOST_DEVICE double gumbel_of(double v) {
  return plain_sum(0.0, -canonical_log64(-canonical_log1p_minus(v)));
}

URM_HOST_DEVICE float noise_of_bits(uint64_t bits) {
  return static_cast<float>(gumbel_of(open_uniform(bits)));
}

URM_HOST_DEVICE float gumbel_noise(uint64_t seed, uint64_t stream, uint64_t row) {
  return noise_of_bits(random_bits(seed, stream, row));
}

URM_HOST_DEVICE float scaled_score(float score, float temperature) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(score, temperature);
#else
  return score / temperature;
#endif
}

// score / temperature + noise, one rounding each; a zero is +0.
URM_HOST_DEVICE float perturbed_score(float score, float temperature, uint64_t seed, uint64_t stream, uint64_t row) {
  return scaled_score(score, temperature) + gumbel_noise(seed, stream, row) + 0.0f;
}

}  // namespace urm
