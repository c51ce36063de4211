// A random rotation as steps: each multiplies p of the r elements by random signs and applies the Hadamard matrix of
// size p, the largest power of two that is not above r. Where p == r three steps are as good as a random rotation, one
// is not: rows with few non-zeros keep large elements. Elsewhere six steps take p elements from different places on,
// around the end, so that all of them mix.
#pragma once

#include "canonical_dot.h"

namespace urm {

struct Rotation {
  int64_t r = 0, p = 0, steps = 0;
  const float* signs = nullptr;  // [steps, p], +-1
};

URM_HOST_DEVICE int64_t hadamard_size(int64_t r) {
  int64_t p = 1;
  while (2 * p <= r) p *= 2;
  return p;
}

// The first element of a step: golden-section places lie far from each other.
URM_HOST_DEVICE int64_t start_of_step(const Rotation& rotation, int64_t step) {
  return rotation.p == rotation.r ? 0 : step * (rotation.r * 618 / 1000) % rotation.r;
}

// Makes the Hadamard matrix, of +1 and -1, orthonormal.
URM_HOST_DEVICE float rotation_factor(const Rotation& rotation) {
  return static_cast<float>(1 / sqrt(static_cast<double>(rotation.p)));
}

// Roundings of one vector, each at most 2^-24 of its length: a multiplication and log2 p additions a step, and the
// factor's own.
URM_HOST_DEVICE int64_t rotation_roundings(const Rotation& rotation) {
  int64_t levels = 0;
  while (int64_t{1} << levels < rotation.p) ++levels;
  return rotation.steps * (levels + 2);
}

}  // namespace urm
