// A warp's lanes, and what they do together. All lanes of a warp take part in everything here.
#pragma once

#include "arguments.h"

namespace urm {

__device__ inline int lane_of_warp() {
  return static_cast<int>(threadIdx.x) % kWarp;
}

__device__ inline int warp_of_block() {
  return static_cast<int>(threadIdx.x) / kWarp;
}

__device__ inline int64_t warps_of_grid() {
  return static_cast<int64_t>(gridDim.x) * (blockDim.x / kWarp);
}

__device__ inline int64_t warp_of_grid() {
  return static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + warp_of_block();
}

template <class T>
__device__ T sum_of_lanes(T x) {
  for (int apart = kWarp / 2; apart > 0; apart /= 2) x += __shfl_xor_sync(kAllLanes, x, apart);
  return x;
}

// NaN if either is.
__device__ inline float larger(float x, float y) {
  return x != x || x > y ? x : y;
}

__device__ inline float largest_of_lanes(float x) {
  for (int apart = kWarp / 2; apart > 0; apart /= 2) x = larger(__shfl_xor_sync(kAllLanes, x, apart), x);
  return x;
}

// Floats that are not negative have the order of their bits.
__device__ inline void raise_to(float* most, float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  atomicMax(reinterpret_cast<unsigned int*>(most), bits);
}

__device__ inline float float_of_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

__device__ inline float infinity() {
  return float_of_bits(0x7F800000u);
}

}  // namespace urm
