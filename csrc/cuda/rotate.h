// The rotation of csrc/common/rotation.h, of vectors in shared memory.
#pragma once

#include "warp.h"

namespace urm {

// kGroup lanes of a warp share one vector x [r]; all lanes of the warp are here, `lane` is a place within the group.
// The operations on each element are those of csrc/cpu/kernels_codes.h, in their order.
template <int kGroup>
__device__ void rotate(const Rotation& rotation, int lane, float* x) {
  const float factor = rotation_factor(rotation);
  const int r = static_cast<int>(rotation.r), p = static_cast<int>(rotation.p);
  for (int64_t step = 0; step < rotation.steps; ++step) {
    const float* signs = rotation.signs + step * p;
    const int start = static_cast<int>(start_of_step(rotation, step));
    const auto at = [=](int i) { return start + i < r ? start + i : start + i - r; };
    for (int i = lane; i < p; i += kGroup) x[at(i)] *= __ldg(signs + i) * factor;
    __syncwarp();
    for (int apart = 1; apart < p; apart *= 2) {
      for (int pair = lane; pair < p / 2; pair += kGroup) {
        const int i = 2 * pair - (pair & (apart - 1));
        float &first = x[at(i)], &second = x[at(i + apart)];
        const float a = first, b = second;
        first = a + b;
        second = a - b;
      }
      __syncwarp();
    }
  }
}

}  // namespace urm
