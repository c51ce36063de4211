// Philox4x32-10: random words as a function of a counter and a key, the same on every machine and in every order.
//
// J. Salmon, M. Moraes, R. Dror and D. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The authors' known
// answers (Random123, kat_vectors) are tested.
#pragma once

#include "platform.h"

namespace urm {

struct PhiloxWords {
  uint32_t word[4];
};

URM_HOST_DEVICE PhiloxWords philox4x32(PhiloxWords counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t even = static_cast<uint64_t>(counter.word[0]) * 0xD2511F53u;
    const uint64_t odd = static_cast<uint64_t>(counter.word[2]) * 0xCD9E8D57u;
    counter = {{static_cast<uint32_t>(odd >> 32) ^ counter.word[1] ^ key0, static_cast<uint32_t>(odd),
                static_cast<uint32_t>(even >> 32) ^ counter.word[3] ^ key1, static_cast<uint32_t>(even)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// The same of a 64-bit key and two 64-bit halves of a counter, low words first.
URM_HOST_DEVICE PhiloxWords philox(uint64_t key, uint64_t low, uint64_t high) {
  return philox4x32({{static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32), static_cast<uint32_t>(high),
                      static_cast<uint32_t>(high >> 32)}},
                    static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32));
}

// 64 random bits of a number in a stream: one block of four words serves two neighbouring numbers.
URM_HOST_DEVICE uint64_t random_bits(uint64_t seed, uint64_t stream, uint64_t number) {
  const PhiloxWords words = philox(seed, number >> 1, stream);
  const uint32_t first = number & 1 ? words.word[2] : words.word[0];
  const uint32_t second = number & 1 ? words.word[3] : words.word[1];
  return static_cast<uint64_t>(first) << 32 | second;
}

}  // namespace urm
