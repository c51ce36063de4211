// Sums of exponentials that no order of addition can change.
//
//   exp(s) = mantissa 2^(n - 24), n the integer nearest to s / ln 2, mantissa an integer of some 25 bits
//
// Mantissas are added as integers, so that threads, tiles and the order of rows cannot matter. Exponents are taken in
// groups of eight, floor(n / 8), with one integer sum each, in units of the group's lowest exponent. The groups that
// count are the largest and `depth` below it: a rule on the scores themselves, hence also the same whatever was left
// out early because a bound showed it to be below them. With 8 depth >= 24 + log2(rows), all that is left out together
// is below 2^-22 of the sum.
#pragma once

#include "canonical_dot.h"
#include "log_sum_exp.h"

namespace urm {

// From here on neighbouring scores are a unit apart, and the logarithm of the number of rows is within the stated error
// of the largest score: that score is the result.
constexpr float kHugeScore = 0x1p24f;

constexpr int kGroupBits = 3;
constexpr int kGroupExponents = 1 << kGroupBits;
constexpr int kGroups = 8;                // of a ring: the largest, and at most 7 = (24 + 32) / 8 below it
constexpr int32_t kNoGroup = -(1 << 28);  // below that of every score

constexpr double kLn2 = 0.693147180559945309417;
constexpr float kMantissaScale = 0x1p24f;

static inline int depth_of_groups(int64_t rows) {
  int bits = 0;
  while (bits < 32 && (int64_t{1} << bits) < rows) ++bits;
  return (24 + bits + kGroupExponents - 1) / kGroupExponents;
}

// For |score| < kHugeScore.
URM_HOST_DEVICE void split_exponential(float score, int32_t* exponent, uint32_t* mantissa) {
  const float n = __builtin_rintf(score * kLog2E);
  *exponent = static_cast<int32_t>(n);
  *mantissa = static_cast<uint32_t>(__builtin_rintf(exp_polynomial(minus_logarithms(score, n)) * kMantissaScale));
}

// The sum of one thread's share.
struct ExponentialSum {
  // Group g at g modulo kGroups. Lanes are added to while rows are scanned and emptied into `high` (2^32) and `low`
  // before they overflow: they hold 2^28 mantissas.
  uint64_t lanes[kGroups][kLanes] = {};
  uint64_t high[kGroups] = {}, low[kGroups] = {};
  int32_t top = kNoGroup;  // the largest group, here or as another share has found it
  int32_t depth = kGroups - 1;
  float largest = -__builtin_inff();  // of the scores that are huge or infinite

  static int place(int32_t group) { return group & (kGroups - 1); }

  bool counts(int32_t group) const { return group >= top - depth; }

  // Makes room for a group that may be above all before.
  void raise(int32_t group) {
    if (group <= top) return;
    const int64_t gap = static_cast<int64_t>(group) - top;
    for (int64_t i = 0; i < gap && i < kGroups; ++i) {
      const int p = place(static_cast<int32_t>(group - i));
      for (uint64_t& lane : lanes[p]) lane = 0;
      high[p] = low[p] = 0;
    }
    top = group;
  }

  void add(float score) {
    if (!(__builtin_fabsf(score) < kHugeScore)) return add_huge(score);
    int32_t exponent;
    uint32_t mantissa;
    split_exponential(score, &exponent, &mantissa);
    const int32_t group = exponent >> kGroupBits;
    raise(group);
    if (counts(group)) lanes[place(group)][0] += static_cast<uint64_t>(mantissa) << (exponent & (kGroupExponents - 1));
  }

  void add_huge(float score) {
    if (score > largest) largest = score;
  }

  void empty_lanes() {
    for (int p = 0; p < kGroups; ++p)
      for (uint64_t& lane : lanes[p]) {
        high[p] += lane >> 32;
        low[p] += lane & 0xFFFFFFFFu;
        lane = 0;
      }
  }

  // Scores below this certainly do not count: a unit of the exponent and 2^-20 of it are room for the roundings that
  // find the exponent.
  float least_score() const {
    if (top == kNoGroup) return -__builtin_inff();
    const float least = static_cast<float>((static_cast<double>(top - depth) * kGroupExponents - 1) * kLn2);
    return least - __builtin_fabsf(least) * 0x1p-20f;
  }
};

// log(sum of exponentials) of `count` shares, their lanes emptied, `stride` apart.
static inline float log_of_sum(const ExponentialSum* shares, int64_t count, int64_t stride) {
  int32_t top = kNoGroup;
  float largest = -__builtin_inff();
  for (int64_t s = 0; s < count; ++s) {
    if (shares[s * stride].top > top) top = shares[s * stride].top;
    if (shares[s * stride].largest > largest) largest = shares[s * stride].largest;
  }
  if (top == kNoGroup || largest >= kHugeScore) return largest;
  double total = 0;
  for (int32_t group = top - shares->depth; group <= top; ++group) {
    uint64_t high = 0, low = 0;
    for (int64_t s = 0; s < count; ++s) {
      const ExponentialSum& share = shares[s * stride];
      if (group > share.top) continue;
      high += share.high[ExponentialSum::place(group)];
      low += share.low[ExponentialSum::place(group)];
    }
    high += low >> 32;
    low &= 0xFFFFFFFFu;
    total = total * (1.0 / (1 << kGroupExponents)) + (static_cast<double>(high) * 0x1p32 + static_cast<double>(low));
  }
  const float sum = static_cast<float>(total * 0x1p-24);
  const double exponent = static_cast<double>(top) * kGroupExponents;
  return static_cast<float>(exponent * kLn2 + static_cast<double>(canonical_log(sum)));
}

}  // namespace urm
