// Sums of exponentials that no order of addition can change.
//
//   exp(s) = mantissa 2^(n - 24), n the integer nearest to s / ln 2, mantissa an integer of some 24 bits
//
// Mantissas of one exponent n are added as integers, so that threads, tiles and the order of rows cannot matter. What
// counts is the `window` exponents below the largest: a rule on the scores themselves, hence also the same whatever was
// left out early because a bound showed it to be below the window. With window = 24 + ceil(log2(rows)) all that is
// left out together is below 2^-22 of the sum.
#pragma once

#include <cstdint>

#include "canonical_dot.h"
#include "log_sum_exp.h"

namespace urm {

// From here on neighbouring scores are a unit apart, and the logarithm of the number of rows is within the stated error
// of the largest score: that score is the result.
constexpr float kHugeScore = 0x1p24f;

constexpr int kExponentialBins = 64;    // at least the widest window, 24 + 32
constexpr int32_t kNoExponent = -(1 << 30);  // below that of every score

constexpr double kLn2 = 0.693147180559945309417;
constexpr float kMantissaScale = 0x1p24f;

static inline int exponential_window(int64_t rows) {
  int bits = 0;
  while (bits < 32 && (int64_t{1} << bits) < rows) ++bits;
  return 24 + bits;
}

// For |score| < kHugeScore.
URM_HOST_DEVICE void split_exponential(float score, int32_t* exponent, uint32_t* mantissa) {
  const float n = __builtin_rintf(score * kLog2E);
  *exponent = static_cast<int32_t>(n);
  *mantissa = static_cast<uint32_t>(__builtin_rintf(exp_polynomial(minus_logarithms(score, n)) * kMantissaScale));
}

// The sum of one thread's share: a ring of bins, bin n at n modulo kExponentialBins. Bins are exact up to 2^37 rows.
struct ExponentialSum {
  uint64_t bins[kExponentialBins] = {};
  int32_t top = kNoExponent;                // the largest exponent, here or as another share has found it
  int32_t window = kExponentialBins;
  float largest = -__builtin_inff();  // of the scores that are huge or infinite

  void raise(int32_t exponent) {
    if (exponent <= top) return;
    const int64_t gap = static_cast<int64_t>(exponent) - top;
    for (int64_t i = 0; i < gap && i < kExponentialBins; ++i) bins[(exponent - i) & (kExponentialBins - 1)] = 0;
    top = exponent;
  }

  void add(int32_t exponent, uint32_t mantissa) {
    if (exponent > top) raise(exponent);
    else if (exponent <= top - window) return;
    bins[exponent & (kExponentialBins - 1)] += mantissa;
  }

  void add_huge(float score) {
    if (score > largest) largest = score;
  }

  // Mantissas at an exponent of the window of a top that is not below this one's.
  uint64_t at(int32_t exponent) const { return exponent > top ? 0 : bins[exponent & (kExponentialBins - 1)]; }

  // Scores below this are certainly outside the window: half a unit of the exponent and 2^-20 of it are room for the
  // roundings that find the exponent.
  float least_score() const {
    if (top == kNoExponent) return -__builtin_inff();
    const float least = static_cast<float>((static_cast<double>(top) - window) * kLn2);
    return least - __builtin_fabsf(least) * 0x1p-20f;
  }
};

// log(sum of exponentials) of all shares together.
static inline float log_of_sum(const ExponentialSum* shares, int64_t count, int64_t stride) {
  int32_t top = kNoExponent;
  float largest = -__builtin_inff();
  for (int64_t s = 0; s < count; ++s) {
    if (shares[s * stride].top > top) top = shares[s * stride].top;
    if (shares[s * stride].largest > largest) largest = shares[s * stride].largest;
  }
  if (top == kNoExponent || largest >= kHugeScore) return largest;
  double total = 0;
  for (int32_t n = top - shares->window + 1; n <= top; ++n) {
    uint64_t mantissas = 0;
    for (int64_t s = 0; s < count; ++s) mantissas += shares[s * stride].at(n);
    total = total * 0.5 + static_cast<double>(mantissas);
  }
  const float sum = static_cast<float>(total * 0x1p-24);
  return static_cast<float>(static_cast<double>(top) * kLn2 + static_cast<double>(canonical_log(sum)));
}

}  // namespace urm
