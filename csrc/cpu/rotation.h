// A random rotation as steps: each multiplies p of the r elements by random signs and applies the Hadamard matrix of
// size p, the largest power of two that is not above r. Where p == r three steps are as good as a random rotation, one is
// not: rows with few non-zeros keep large elements. Elsewhere six steps take p elements from different places on, around
// the end, so that all of them mix.
#pragma once

#include <cmath>
#include <cstdint>

namespace urm {

struct Rotation {
  int64_t r = 0, p = 0, steps = 0;
  const float* signs = nullptr;  // [steps, p], +-1

  static int64_t hadamard_size(int64_t r) {
    int64_t p = 1;
    while (2 * p <= r) p *= 2;
    return p;
  }

  static int64_t steps_for(int64_t r) { return hadamard_size(r) == r ? 3 : 6; }

  // The first element of a step: golden-section places lie far from each other.
  int64_t start(int64_t step) const { return p == r ? 0 : step * (r * 618 / 1000) % r; }

  float factor() const { return static_cast<float>(1 / std::sqrt(static_cast<double>(p))); }

  // Roundings of one vector, each at most 2^-24 of its length: a multiplication and log2 p additions a step, and the
  // factor's own.
  int64_t roundings() const {
    int64_t levels = 0;
    while (int64_t{1} << levels < p) ++levels;
    return steps * (levels + 2);
  }
};

}  // namespace urm
