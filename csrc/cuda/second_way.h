// Exact selection for users whose threshold was not proven, because fewer than k rows reach it or more than their list
// holds: a radix select over canonical keys. A launch a digit counts the digits of all rows of those users, the most
// significant first, until the keys from the chosen one on fit the list; a last launch collects them. Brute force, and
// no worse: no order of rows and no tie makes it longer. Launches find nothing to do where every user is proven.
#pragma once

#include "rescore.h"

namespace urm {

constexpr int kPasses = 6, kPassBits = 11, kPassBins = 1 << kPassBits;  // the last digit has the nine bits that remain

struct SecondWay {
  int64_t* unproven;     // how many users, of all calls that share it
  int32_t* left;         // [B + 1], whether the user is one of them; how many of this call are
  uint32_t* histograms;  // [B, kPasses, kPassBins]
  uint8_t* proven;       // [B], whether a user's result is certainly exact; null where all are
};

__device__ inline int shift_of_pass(int pass) {
  return pass < kPasses - 1 ? 64 - kPassBits * (pass + 1) : 0;
}

// What the passes before `pass` have found: keys from `least` on hold the k best; they share the digits above `shift`
// with the k-th. fits: no more of them than the list has room for.
struct Narrowed {
  uint64_t least;
  int shift;
  bool fits;
};

// By a whole warp.
__device__ inline Narrowed narrow(const uint32_t* histograms, int64_t wanted, int64_t capacity, int pass) {
  Narrowed out{0, 64, false};
  int64_t rank = wanted;
  const int lane = lane_of_warp();
  constexpr int kOwn = kPassBins / kWarp;
  for (int earlier = 0; earlier < pass && !out.fits; ++earlier) {
    const uint32_t* bins =
        histograms + earlier * kPassBins + (kWarp - 1 - lane) * kOwn;  // lane 0 has the highest digits
    int64_t own = 0;
    for (int i = 0; i < kOwn; ++i) own += bins[i];
    int64_t above = own;
    for (int apart = 1; apart < kWarp; apart *= 2) {
      const int64_t other = __shfl_sync(kAllLanes, above, lane - apart);
      if (lane >= apart) above += other;
    }
    const int64_t total = __shfl_sync(kAllLanes, above, kWarp - 1);
    above -= own;
    if (rank > total) rank = total;  // fewer keys than wanted: all of them
    int digit = 0, found = 0;
    int64_t upto = 0;
    if (above < rank && rank <= above + own) {
      digit = kOwn - 1;
      while (above + bins[digit] < rank) above += bins[digit--];
      upto = above + bins[digit];
      digit += (kWarp - 1 - lane) * kOwn;
      found = 1;
    }
    const uint32_t votes = __ballot_sync(kAllLanes, found);
    const int from = votes ? __ffs(static_cast<int>(votes)) - 1 : 0;
    digit = __shfl_sync(kAllLanes, digit, from);
    above = __shfl_sync(kAllLanes, above, from);
    upto = __shfl_sync(kAllLanes, upto, from);
    out.shift = shift_of_pass(earlier);
    out.least |= static_cast<uint64_t>(digit) << out.shift;
    // Keys above those that share all digits so far were counted out of `wanted`.
    out.fits = wanted - rank + upto <= capacity;
    rank -= above;
  }
  return out;
}

// One block a user; left[B] is zero at first.
__global__ void begin_second_way(int64_t B, Limits limits, Found found, SecondWay second) {
  const int64_t user = blockIdx.x, wanted = limits.wanted[user];
  const unsigned int count = found.count[user];
  const bool short_of = limits.threshold[user] > -infinity() && count < wanted;
  const bool left = wanted > 0 && (short_of || count > found.capacity);
  __syncthreads();
  if (threadIdx.x == 0) {
    second.left[user] = left;
    // An infinite limit rules out nothing, or belongs to a user who can get nothing.
    if (second.proven) second.proven[user] = left || !(fabsf(limits.limit[user]) < infinity());
  }
  if (!left) return;
  if (threadIdx.x == 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(second.unproven), 1ull);
    atomicAdd(second.left + B, 1);
    found.count[user] = 0;
  }
  for (int i = threadIdx.x; i < kPasses * kPassBins; i += blockDim.x)
    second.histograms[user * kPasses * kPassBins + i] = 0;
}

// Calls use(row, score) for every row from first_row on that the user may be given.
template <class Use>
__device__ inline void scores_of_user(const Table& table, const Users& users, const Filter& filter, int64_t user,
                                      int64_t first_row, Use use) {
  constexpr int kAtOnce = 2 * kTileRows;
  const int half = lane_of_warp() / kLanes;
  for (int64_t first = first_row + warp_of_grid() * kAtOnce; first < table.rows; first += warps_of_grid() * kAtOnce) {
    int64_t rows[kTileRows];
    for (int i = 0; i < kTileRows; ++i) {
      const int64_t row = first + half * kTileRows + i;
      rows[i] = row < table.rows ? row : -1;
    }
    scores_of_rows(table, users, user, user + 1, rows, [&](int64_t, int64_t row, float score) {
      if (score == score && is_allowed(filter, user, row)) use(row, score);
    });
  }
}

// Calls use(user) for every user that is left, in all threads.
template <class Use>
__device__ inline void users_left(int64_t B, const SecondWay& second, Use use) {
  if (second.left[B] == 0) return;
  for (int64_t user = 0; user < B; ++user)
    if (second.left[user]) use(user);
}

// Any number of blocks. Shared memory: kPassBins counters.
__global__ void count_digits(Table table, Users users, Filter filter, Limits limits, Found found, SecondWay second,
                             int64_t pass) {
  URM_DYNAMIC_SHARED(shared);
  uint32_t* bins = reinterpret_cast<uint32_t*>(shared);
  users_left(users.B, second, [&](int64_t user) {
    uint32_t* histograms = second.histograms + user * kPasses * kPassBins;
    const Narrowed narrowed = narrow(histograms, limits.wanted[user], found.capacity, static_cast<int>(pass));
    if (narrowed.fits) return;
    for (int i = threadIdx.x; i < kPassBins; i += blockDim.x) bins[i] = 0;
    __syncthreads();
    const int shift = shift_of_pass(static_cast<int>(pass));
    scores_of_user(table, users, filter, user, 0, [&](int64_t row, float score) {
      const uint64_t key = pack_key(score, static_cast<uint32_t>(row));
      if (pass == 0 || key >> narrowed.shift == narrowed.least >> narrowed.shift)
        atomicAdd(bins + ((key & (~uint64_t{0} >> (64 - narrowed.shift))) >> shift), 1u);
    });
    __syncthreads();
    for (int i = threadIdx.x; i < kPassBins; i += blockDim.x)
      if (bins[i]) atomicAdd(histograms + pass * kPassBins + i, bins[i]);
    __syncthreads();
  });
}

// Any number of blocks.
__global__ void collect_unproven(Table table, Users users, Filter filter, Limits limits, Found found,
                                 SecondWay second) {
  users_left(users.B, second, [&](int64_t user) {
    const Narrowed narrowed =
        narrow(second.histograms + user * kPasses * kPassBins, limits.wanted[user], found.capacity, kPasses);
    scores_of_user(table, users, filter, user, 0, [&](int64_t row, float score) {
      if (pack_key(score, static_cast<uint32_t>(row)) >= narrowed.least) append_key(found, user, score, row);
    });
  });
}

// Exact scores of the rows from first_row on, which have no codes, or of all of a small table. Programs: (any number,
// users).
__global__ void score_rows(Table table, Users users, Filter filter, Limits limits, Found found, int64_t first_row) {
  const int64_t user = blockIdx.y;
  if (limits.wanted[user] == 0) return;
  const float threshold = limits.threshold[user];
  int64_t scored = 0;
  scores_of_user(table, users, filter, user, first_row, [&](int64_t row, float score) {
    ++scored;
    if (score >= threshold) append_key(found, user, score, row);
  });
  if (found.counts && scored) {
    atomicAdd(found.counts, static_cast<unsigned long long>(scored * table.r * bytes_of(table.type)));
    atomicAdd(found.counts + 2, static_cast<unsigned long long>(scored));
  }
}

}  // namespace urm
