// The total order of results as one 64-bit key: higher score first, equal scores by the lower row index.
//
// A larger key is a better item. Keys of different rows never compare equal, so a selection by key has exactly one
// answer, whatever order candidates arrive in. Rows are limited to 32 bits; no key of a real score is 0.
#pragma once

#include "canonical_dot.h"

namespace urm {

constexpr uint64_t kNoKey = 0;  // below the key of every score, -inf included

// fp32 -> unsigned, order preserving: negative numbers are complemented, the others get the sign bit.
URM_HOST_DEVICE uint32_t ordered_bits(float score) {
  uint32_t bits;
  memcpy(&bits, &score, sizeof bits);
  return bits ^ ((bits >> 31) ? 0xFFFFFFFFu : 0x80000000u);
}

URM_HOST_DEVICE float from_ordered_bits(uint32_t ordered) {
  const uint32_t bits = ordered ^ ((ordered >> 31) ? 0x80000000u : 0xFFFFFFFFu);
  float score;
  memcpy(&score, &bits, sizeof score);
  return score;
}

// `score` is not NaN and, if zero, is +0.
URM_HOST_DEVICE uint64_t pack_key(float score, uint32_t row) {
  return (static_cast<uint64_t>(ordered_bits(score)) << 32) | (0xFFFFFFFFu - row);
}

// Not above the key of any row with this score, above those of all lower scores.
URM_HOST_DEVICE uint64_t lowest_key(float score) {
  return static_cast<uint64_t>(ordered_bits(score)) << 32;
}

URM_HOST_DEVICE float key_score(uint64_t key) {
  return from_ordered_bits(static_cast<uint32_t>(key >> 32));
}

URM_HOST_DEVICE uint32_t key_row(uint64_t key) {
  return 0xFFFFFFFFu - static_cast<uint32_t>(key);
}

}  // namespace urm
