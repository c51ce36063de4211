// The guessed threshold: exact scores of a sample, and what the scan compares with.
#pragma once

#include "../common/total_order.h"
#include "canonical.h"
#include "queries.h"
#include "select.h"

namespace urm {

// Of every `step` rows one is sampled, at a place that differs from stretch to stretch: a catalogue may be periodic.
__device__ inline int64_t sampled_row(int64_t at, int64_t step) {
  const uint32_t scattered = static_cast<uint32_t>(at) * 0x9E3779B1u;
  return at * step + static_cast<int64_t>(static_cast<uint64_t>(scattered) * static_cast<uint64_t>(step) >> 32);
}

// maxima fp32 [B, slots]: of each user the best score among `turns` of `sample` rows, which lie far apart: slot s has
// samples s, s + slots, ... Eight slots a warp, which may stand alone.
__global__ void sample_maxima(Table table, Users users, Filter filter, int64_t step, int64_t sample, int64_t slots,
                              int64_t turns, float* maxima) {
  const int half = lane_of_warp() / kLanes, own = lane_of_warp() % kLanes / kTileQueries;
  for (int64_t first = warp_of_grid() * 2 * kTileRows; first < slots; first += warps_of_grid() * 2 * kTileRows) {
    const int64_t slot = first + half * kTileRows;
    for (int64_t user = 0; user < users.B; user += kTileQueries) {
      const int64_t last = user + kTileQueries < users.B ? user + kTileQueries : users.B;
      float best[kTileQueries];
      for (float& each : best) each = -infinity();
      for (int64_t turn = 0; turn < turns; ++turn) {
        int64_t rows[kTileRows];
        for (int i = 0; i < kTileRows; ++i) {
          const int64_t at = turn * slots + slot + i;
          const int64_t row = sampled_row(at, step);
          rows[i] = slot + i < slots && at < sample && row < table.rows ? row : -1;
        }
        scores_of_rows(table, users, user, last, rows, [&](int64_t of, int64_t row, float score) {
          // By number, so that the array stays in registers.
          for (int j = 0; j < kTileQueries; ++j)
            if (user + j == of && score > best[j] && is_allowed(filter, of, row)) best[j] = score;
        });
      }
      // With one query a user each of a row's lanes has another one; with several, the first has them all.
      for (int j = 0; j < kTileQueries && user + j < last; ++j) {
        const bool mine = lane_of_warp() % kTileQueries == (users.places == 1 ? j : 0);
        if (mine && slot + own < slots) maxima[(user + j) * slots + slot + own] = best[j];
      }
    }
  }
}

// What a scan compares with, of every user: see prune.h. inverse: 1 / step.
struct Limits {
  float *threshold, *limit, *inverse;
  int64_t* wanted;  // k, or 0 for a user who can get nothing
};

// One block a user: the rank-th best maximum, and the limits that follow from it. raise: where a threshold that is
// there already is higher, from that one.
//
// Shared memory: kSelectShared.
__global__ void set_limits(int64_t k, int64_t rank, const float* maxima, int64_t slots, int64_t raise, Users users,
                           const float* largest, QueryCodes codes, Limits limits) {
  URM_DYNAMIC_SHARED(shared);
  const int64_t user = blockIdx.x;
  float threshold = raise ? limits.threshold[user] : -infinity();
  if (rank > 0 && rank <= slots) {
    const float* own = maxima + user * slots;
    const uint64_t key = key_at_rank(
        slots, rank, shared, [=](int64_t i) { return static_cast<uint64_t>(ordered_bits(own[i])) << 32; }, 4);
    threshold = threshold < key_score(key) ? key_score(key) : threshold;
  }
  if (warp_of_block() != 0) return;
  const int32_t count = users.count[user];
  bool nan = false;
  for (int64_t m = lane_of_warp(); m < count; m += kWarp) {
    const float most = largest[user * users.places + m];
    nan |= most != most;
  }
  nan = __any_sync(kAllLanes, nan);
  if (lane_of_warp() != 0) return;
  const bool served = count > 0 && !nan;
  float relative = 0.0f, offset = 0.0f;
  if (users.log_sum_exp && count) log_sum_exp_excess(count, &relative, &offset);
  const float step = codes.step[user];
  const bool bounded = step > 0.0f && codes.kept_most[user] + codes.lost_most[user] <= kLargestCodedLength;
  if (!bounded) codes.step[user] = 0.0f;
  const float inverse = bounded ? 1.0f / step : 1.0f;
  const float margin = 0x1p-20f * (fabsf(threshold) + offset);
  float limit = (threshold - offset - kCodeUnderflow - margin) * inverse;
  // Neither an infinite threshold nor one whose quotient overflows says anything of a bound: everything survives, as
  // for users without a certain one.
  if (!(limit < infinity())) limit = -infinity();
  if (!bounded) limit = -infinity();
  if (!served) limit = infinity();
  limits.threshold[user] = threshold;
  limits.limit[user] = limit;
  limits.inverse[user] = inverse;
  limits.wanted[user] = served ? k : 0;
}

}  // namespace urm
