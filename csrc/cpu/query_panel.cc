// Queries as the panel kernels of every instruction set read them.
#include "kernels.h"

namespace urm {
namespace {

int group_width(int64_t left) {
  return left > 2 ? kQueryGroup : static_cast<int>(left);
}

}  // namespace

int64_t query_panel_floats(int64_t count, int64_t padded) {
  return round_up(count, kQueryGroup) * padded;
}

void pack_query_panel(const float* queries, int64_t count, int64_t padded, float* out) {
  const int64_t steps = padded / kLanes;
  for (int64_t first = 0; first < count; first += kQueryGroup) {
    const int width = group_width(count - first);
    for (int p = 0; p < kLanes; ++p)
      for (int64_t t = 0; t < steps; ++t)
        for (int j = 0; j < width; ++j)
          *out++ = first + j < count ? queries[(first + j) * padded + t * kLanes + kTreeOrder[p]] : 0.0f;
  }
}

}  // namespace urm
