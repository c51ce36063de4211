// Selection by radix over the 64-bit keys of csrc/common/total_order.h, by one block, for any number wanted.
#pragma once

#include "../common/total_order.h"
#include "warp.h"

namespace urm {

constexpr int kDigit = 8, kBins = 1 << kDigit;  // of a pass
constexpr int64_t kSelectShared = kBins * 4 + 16;

// The rank-th largest (from 1) of `count` keys, of which the `digits` highest bytes may differ; at most `count`. The
// same in all threads of the block.
template <class Key>
__device__ uint64_t key_at_rank(int64_t count, int64_t rank, unsigned char* shared, Key key_of, int digits) {
  uint32_t* bins = reinterpret_cast<uint32_t*>(shared);
  int64_t* found = reinterpret_cast<int64_t*>(shared + kBins * 4);  // digit, and the rank among its keys
  uint64_t prefix = 0;
  for (int pass = 0; pass < digits; ++pass) {
    const int shift = 64 - kDigit * (pass + 1);
    for (int bin = threadIdx.x; bin < kBins; bin += blockDim.x) bins[bin] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
      const uint64_t key = key_of(i);
      const bool same = pass == 0 || key >> (shift + kDigit) == prefix >> (shift + kDigit);
      if (same) atomicAdd(bins + (key >> shift & (kBins - 1)), 1u);
    }
    __syncthreads();
    if (warp_of_block() == 0) {
      // Lane 0 has the highest digits.
      const int top = kBins - 1 - lane_of_warp() * (kBins / kWarp);
      int64_t own = 0;
      for (int i = 0; i < kBins / kWarp; ++i) own += bins[top - i];
      int64_t above = own;
      for (int apart = 1; apart < kWarp; apart *= 2) {
        const int64_t other = __shfl_sync(kAllLanes, above, lane_of_warp() - apart);
        if (lane_of_warp() >= apart) above += other;
      }
      above -= own;
      if (above < rank && rank <= above + own) {
        int digit = top;
        while (above + bins[digit] < rank) above += bins[digit--];
        found[0] = digit;
        found[1] = rank - above;
      }
    }
    __syncthreads();
    prefix |= static_cast<uint64_t>(found[0]) << shift;
    rank = found[1];
  }
  return prefix;
}

constexpr int64_t kSorted = 4096;  // keys that are sorted in shared memory

// Keys in shared memory, a power of two of them, descending (Batcher's bitonic sort).
__device__ inline void sort_keys(uint64_t* keys, int count) {
  for (int run = 2; run <= count; run *= 2)
    for (int apart = run / 2; apart > 0; apart /= 2) {
      __syncthreads();
      for (int pair = threadIdx.x; pair < count / 2; pair += blockDim.x) {
        const int i = 2 * pair - (pair & (apart - 1));
        const uint64_t x = keys[i], y = keys[i + apart];
        if ((x < y) == ((i & run) == 0)) {
          keys[i] = y;
          keys[i + apart] = x;
        }
      }
    }
  __syncthreads();
}

// One block a user: the k best of found[user] keys [B, capacity], all different. Where k is at most kSorted they are
// sorted and become scores fp32 and ids int64 [B, k], padded with -inf and -1; else they go to best [B, k] in any
// order, with kNoKey behind them.
//
// Shared memory: kSelectShared, and 8 bytes for each of the power of two from k (or from the keys, if fewer) on.
__global__ void select_keys(const uint64_t* keys, const unsigned int* found, int64_t capacity, int64_t k, float* scores,
                            int64_t* ids, uint64_t* best) {
  URM_DYNAMIC_SHARED(shared);
  const int64_t user = blockIdx.x;
  const uint64_t* own = keys + user * capacity;
  const int64_t count = found[user] < static_cast<uint64_t>(capacity) ? found[user] : capacity;
  const int64_t taken = count < k ? count : k;
  uint64_t least = kNoKey;
  if (count > k) least = key_at_rank(count, k, shared, [=](int64_t i) { return own[i]; }, 8);
  unsigned int* next = reinterpret_cast<unsigned int*>(shared);
  __syncthreads();
  if (threadIdx.x == 0) *next = 0;
  __syncthreads();
  uint64_t* chosen = best ? best + user * k : reinterpret_cast<uint64_t*>(shared + kSelectShared);
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x)
    if (own[i] >= least) chosen[atomicAdd(next, 1u)] = own[i];
  if (best) {
    for (int64_t i = taken + threadIdx.x; i < k; i += blockDim.x) chosen[i] = kNoKey;
    return;
  }
  int size = 1;
  while (size < taken) size *= 2;
  for (int64_t i = taken + threadIdx.x; i < size; i += blockDim.x) chosen[i] = kNoKey;
  sort_keys(chosen, size);
  for (int64_t i = threadIdx.x; i < k; i += blockDim.x) {
    scores[user * k + i] = i < taken ? key_score(chosen[i]) : -infinity();
    ids[user * k + i] = i < taken ? static_cast<int64_t>(key_row(chosen[i])) : -1;
  }
}

}  // namespace urm
