// Which tiles hold a row that a mask allows: the others need not be read.
#pragma once

#include "threshold.h"
#include "tile.h"

namespace urm {

// Of one mask for all users, and the rows that have not been removed; null: every tile may.
struct Allowed {
  uint32_t* tiles;  // bits, zero at first
  int32_t* all;     // zero at first
};

__device__ inline bool may_hold(const Allowed& allowed, int64_t tile) {
  return !allowed.tiles || *allowed.all || (allowed.tiles[tile / 32] >> tile % 32 & 1);
}

// Codes in an order of their own: tiles are found from the rows that are allowed, unless these are more than one in so
// many, of which a sample tells. Then few tiles have none.
constexpr int64_t kMostDense = 16, kDensitySample = 1024;

// Any number of blocks. Shared memory: 16 bytes.
__global__ void mark_allowed(Filter filter, Codes codes, Allowed allowed) {
  URM_DYNAMIC_SHARED(shared);
  filter.exclude_count = 0;
  const int64_t rows = codes.count * kBlockRows, step = (rows + kDensitySample - 1) / kDensitySample;
  if (codes.order) {
    unsigned int* dense = reinterpret_cast<unsigned int*>(shared);
    if (threadIdx.x == 0) *dense = 0;
    __syncthreads();
    unsigned int own = 0;
    for (int64_t i = threadIdx.x; i * step < rows; i += blockDim.x) {
      const int64_t row = sampled_row(i, step);
      own += row < rows && is_allowed(filter, 0, row);
    }
    atomicAdd(dense, own);
    __syncthreads();
    if (*dense * kMostDense * step > rows) {
      if (blockIdx.x == 0 && threadIdx.x == 0) *allowed.all = 1;
      return;
    }
  }
  for (int64_t first = warp_of_grid() * kWarp; first < rows; first += warps_of_grid() * kWarp) {
    const int64_t row = first + lane_of_warp();
    const bool mine = is_allowed(filter, 0, row);
    const bool marks = codes.order ? mine : __any_sync(kAllLanes, mine) && lane_of_warp() == 0;
    const int64_t tile = (marks ? place_of(codes, row) : 0) / kRowsOfTile;
    if (marks && !(allowed.tiles[tile / 32] >> tile % 32 & 1)) atomicOr(allowed.tiles + tile / 32, 1u << tile % 32);
  }
}

}  // namespace urm
